"""Mistakes a user can mend.

The command line prints these as one sentence, without a traceback, and ends with exit code 1.
Every message says what was expected, what came, where, and what to do.  Each class is also the
builtin kind that a caller from Python would expect.
"""

import errno

_FULL = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""What libraries say where memory ran out, beside torch's own class."""


class UserError(Exception):
    """Base of every error that is the user's to mend, not a fault of the program."""


class MissingError(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or holds nothing of use."""


class SettingError(UserError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class MismatchError(UserError, ValueError):
    """Two things that must belong together do not: a store and its images, a run and its data."""


class DamageError(UserError, OSError):
    """A stored object is not what was written: truncated, altered, or not complete."""


class UnreadableError(UserError, OSError):
    """What is stored cannot be read now, as its disk or mount fails or denies it; it may be sound.

    Its cause is what the system said.
    """


class MemoryFullError(UserError, MemoryError):
    """The memory of the machine or of a device does not hold what was asked of it."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the machine's or a device's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(word in told for word in _FULL))
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, the kind of the error where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
