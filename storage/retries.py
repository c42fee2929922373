"""Patience with storage that fails now and then.

A request is made again, after waits that grow, where the failure may pass: a time-out, a dropped
connection, a server that is busy or broken, a network file system that lost its server.  What
belongs to the file itself (it is not there, may not be read, is a folder) is said at once; that its
disk has lost it alone, after a few tries.
"""

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long storage that fails is asked again."""

    tries: int = 7
    first_wait: float = 0.5
    """Seconds before the second try; each later wait is twice the one before."""
    longest_wait: float = 16.0
    """Seconds."""
    enough: float = 60.0
    """Seconds after which no further try is begun."""


PATIENCE = Patience()
"""In force in this process."""

# Of a file, not of the way to it.
_OWN_KINDS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OWN_NUMBERS = {errno.ELOOP, errno.ENAMETOOLONG}

LOST_NUMBERS = {errno.EIO, errno.EBADMSG, errno.EUCLEAN}
"""What the system says of a file that its disk has lost; it says so of a lost mount, too."""

_SURE_TRIES = 4
"""After which it is asked whether it is the file alone that fails: some four seconds."""

# What s3fs makes of answers that would be the same the next time.
_FINAL_NUMBERS = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOSYS", "EMSGSIZE", "ENOTEMPTY", "EEXIST", "EREMCHG")
    if hasattr(errno, name)
}

# Classes, by name since their packages may not be installed, of botocore, aiohttp, google-auth and
# requests, whose exceptions are no OSError throughout.
_PASSING_NAMES = frozenset(
    (
        "HTTPClientError",
        "ConnectionError",
        "IncompleteReadError",
        "ResponseParserError",
        "ClientError",
        "TransportError",
        "RequestException",
    )
)
_PASSING_STATUS = {408, 425, 429}


def is_own_fault(error: BaseException) -> bool:
    """Whether an error says something of the file itself: absent, forbidden, a folder."""
    if _is_of_upload(error):
        return False
    return isinstance(error, _OWN_KINDS) or (
        isinstance(error, OSError) and error.errno in _OWN_NUMBERS
    )


def _is_of_upload(error: BaseException) -> bool:
    """Whether S3 does not know, or no longer, the upload that a part belongs to."""
    answer = getattr(error.__cause__, "response", None) or {}
    return bool(answer.get("Error", {}).get("Code") == "NoSuchUpload")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, UserError) or is_own_fault(error):
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, OSError):
        told = error.errno is not None or type(error) is not OSError  # gcsfs: forbidden
        return told and error.errno not in _FINAL_NUMBERS
    return any(kind.__name__ in _PASSING_NAMES for kind in type(error).__mro__)


def patiently(
    request: Callable[[], Result],
    place: str,
    doing: str = "read",
    alone: Callable[[], bool] = lambda: False,
) -> Result:
    """What a request to storage gives, made again while its failure may pass.

    Args:
        request: Makes it; it may be called several times.
        place: What it is about, for messages.
        doing: What is done to that, likewise: ``read``, ``written``, ``removed``.
        alone: Tells, where the system says what it says of a file that its disk has lost, whether
            the rest of the storage answers; asked after some tries.

    Raises:
        OSError: The file itself is at fault (`is_own_fault`, ``alone``); as it came.
        UserError: The storage does not answer however often it is asked, or answers something
            that no further try would change.
    """
    began, attempt = time.monotonic(), 0
    while True:
        attempt += 1
        try:
            return request()
        except Exception as error:
            if isinstance(error, UserError) or is_own_fault(error):
                raise
            if not may_pass(error):
                raise UserError(
                    f"{place} cannot be {doing}: {_told(error)}; see to its address and to your "
                    "rights to it"
                ) from error
            last = attempt >= PATIENCE.tries or time.monotonic() - began >= PATIENCE.enough
            if (last or attempt >= _SURE_TRIES) and _is_lost(error) and alone():
                raise
            if last:
                raise UserError(
                    f"the storage of {place} does not answer: {attempt} tries, the last ended in "
                    f"{_told(error)}; see to the network or the mount and run the command again"
                ) from error
        # A random part, so that workers do not ask all at once.
        wait = min(PATIENCE.first_wait * 2 ** (attempt - 1), PATIENCE.longest_wait)
        time.sleep(wait + random.uniform(0, PATIENCE.first_wait))


def _is_lost(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in LOST_NUMBERS


def _told(error: Exception) -> str:
    """Kind and first line of an error."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
