"""Finding the images that kill the process that decodes them, by letting another process die."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from ..errors import UserError
from .load_clock import heed_end_signal

_DEATHS = 2
"""Deaths alone that make an image fatal: a process may be killed for no fault of its image."""


def fatal_images(load: Callable[[int], object], indices: Sequence[int]) -> dict[int, str]:
    """The images that kill the process that loads them.

    A child process loads one image after another and says which it begins, so that its death names
    the suspect; that one is loaded alone then, since memory may have run out for others before it
    or the kill may have come from elsewhere, and the child goes on behind it.

    Args:
        load: Loads an image; pickled.  What it raises is no matter here.
        indices: Which images.

    Returns:
        How the process ended, such as ``"SIGSEGV"`` or ``"exit code 3"``, of each fatal image.

    Raises:
        UserError: No child process can be started.
    """
    fatal: dict[int, str] = {}
    left = list(indices)
    while left:
        suspect, _ = _ends_at(load, left)
        if suspect is None:
            break
        alone = [_ends_at(load, [suspect]) for _ in range(_DEATHS)]
        if all(index is not None for index, _ in alone):
            fatal[suspect] = alone[-1][1]
        left = left[left.index(suspect) + 1 :]
    return fatal


def _ends_at(load: Callable[[int], object], indices: Sequence[int]) -> tuple[int | None, str]:
    """The image at which a child that loads them dies, and how; None if it outlives them all."""
    # Not forked: this process has threads, and their locks would be copied as they stand.
    context = multiprocessing.get_context("spawn")
    told, telling = context.Pipe(duplex=False)
    with told:
        with telling:
            child = context.Process(target=_load_all, args=(load, indices, telling), daemon=True)
            child.start()
        begun = None
        with contextlib.suppress(EOFError):
            while True:
                begun = told.recv()
        child.join()
    if child.exitcode == 0:
        return None, ""
    if begun is None:
        raise UserError(
            "the process that looks for images that kill cannot start (it ended with "
            f"{_end(child.exitcode)}): see whether memory and processes are left on this machine"
        )
    return begun, _end(child.exitcode)


def _load_all(load: Callable[[int], object], indices: Sequence[int], telling: Connection) -> None:
    heed_end_signal()
    for index in indices:
        telling.send(index)
        # Only death counts; an exception is found again, and told, where the image is used.
        with contextlib.suppress(Exception):
            load(index)


def _end(code: int | None) -> str:
    """How a process ended, in words that do not vary."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
