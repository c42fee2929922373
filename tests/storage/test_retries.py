import errno
from collections.abc import Callable

import pytest

from semmae.errors import DamageError, UserError
from semmae.storage import retries
from semmae.storage.retries import Patience, is_own_fault, may_pass, patiently


def named(name: str, **attributes: int) -> Exception:
    """An error of a package that may not be installed."""
    base = type(name, (Exception,), {})
    error: Exception = type("Inner", (base,), {})("of that package")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


PASSING = [
    TimeoutError("slow"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.ENOTCONN, "transport endpoint is not connected"),
    OSError(errno.EBUSY, "slow down"),
    named("HTTPClientError"),
    named("ClientError"),
    named("ClientError", status=503),
    named("HttpError", code=429),
]
OWN = [
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "permission denied"),
    IsADirectoryError(errno.EISDIR, "is a directory"),
    OSError(errno.ELOOP, "too many links"),
]
FINAL = [
    OSError(errno.EINVAL, "bad request"),
    OSError("Forbidden: bucket"),
    named("NoCredentialsError"),
    named("ClientError", status=403),
    ValueError("no such thing"),
]


class Storage:
    """Fails with an error for some tries, then answers."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error, self.failures, self.tries = error, failures, 0

    def __call__(self) -> str:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error
        return "read"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        retries, "PATIENCE", Patience(tries=4, first_wait=0.001, longest_wait=0.002)
    )


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_patiently__tries_again_what_may_pass(error: Exception) -> None:
    storage = Storage(error, failures=3)
    assert patiently(storage, "place") == "read"
    assert storage.tries == 4


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_patiently__gives_up_after_the_tries_in_one_sentence(error: Exception) -> None:
    storage = Storage(error, failures=99)
    with pytest.raises(UserError, match=r"storage of the/place does not answer: 4 tries") as met:
        patiently(storage, "the/place")
    assert storage.tries == 4
    assert met.value.__cause__ is error
    assert "\n" not in str(met.value)


@pytest.mark.parametrize("error", OWN, ids=repr)
def test_patiently__passes_on_at_once_what_is_of_the_file(error: Exception) -> None:
    storage = Storage(error, failures=1)
    with pytest.raises(type(error)) as met:
        patiently(storage, "place")
    assert (met.value, storage.tries) == (error, 1)
    assert is_own_fault(error)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_patiently__says_at_once_what_no_try_changes(error: Exception) -> None:
    storage = Storage(error, failures=1)
    with pytest.raises(UserError, match=r"the/place cannot be read: \w+: "):
        patiently(storage, "the/place")
    assert storage.tries == 1


def test_patiently__passes_on_what_is_lost_alone_once_that_is_sure() -> None:
    error, answers = OSError(errno.EIO, "input/output error"), [False, True]
    storage = Storage(error, failures=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "PATIENCE", Patience(tries=9, first_wait=0.001, longest_wait=0.002))
        with pytest.raises(OSError, match="input/output error") as met:
            patiently(storage, "place", alone=lambda: answers.pop(0))
    assert (met.value, storage.tries, answers) == (error, 5, [])


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN])
def test_patiently__does_not_ask_that_of_mounts(number: int) -> None:
    storage = Storage(OSError(number, "no mount"), failures=99)
    with pytest.raises(UserError, match="4 tries"):
        patiently(storage, "place", alone=lambda: bool(1 / 0))


def test_patiently__leaves_a_sentence_as_it_is() -> None:
    storage = Storage(DamageError("said already"), failures=1)
    with pytest.raises(DamageError, match="said already"):
        patiently(storage, "place")
    assert (storage.tries, may_pass(storage.error)) == (1, False)


def test_patiently__waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep: Callable[[float], None] = waited.append
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr(retries, "PATIENCE", Patience())
    with pytest.raises(UserError, match="7 tries"):
        patiently(Storage(TimeoutError(), failures=99), "place")
    least = [0.5, 1, 2, 4, 8, 16]
    assert [low <= wait <= low + 0.5 for low, wait in zip(least, waited, strict=True)] == [True] * 6
    assert sum(waited) < 60
