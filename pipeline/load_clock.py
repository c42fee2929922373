"""What reading and decoding images takes, told apart; and a bound on how long decoding may take."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from operator import itemgetter

END_SIGNAL = signal.SIGALRM
"""What ends a process in which a decoding does not end."""

_LOOK_SECONDS = 1.0
"""Seconds between two looks at what is being decoded, at most."""

_GRACE = 2.0
"""Seconds over the bound after which the kernel ends the process, should nothing else have."""


def heed_end_signal() -> None:
    """Let `END_SIGNAL` end this process, which may have been started with it ignored.

    For the main thread of a process that nobody but us works in.
    """
    signal.signal(END_SIGNAL, signal.SIG_DFL)


class LoadClock:
    """Sums what threads spend on reading and on decoding, by the clock on the wall.

    Several threads may add up to more than passes; what they wait for (storage, a processor, the
    interpreter's lock) counts.

    A decoding that does not end cannot be broken off, since a thread in a decoder's own code heeds
    nothing: its process ends, by `END_SIGNAL`.  A thread looks for such a decoding; the kernel's
    timer is set behind it, as a decoder may hold the interpreter's lock for ever.  Reading is not
    bounded: storage has a patience of its own.

    Args:
        bound: Seconds that a decoding may take; 0 for any.
    """

    def __init__(self, bound: float = 0.0) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._seconds = {"read": 0.0, "decode": 0.0}
        self._decoding: dict[int, tuple[float, Callable[[], str]]] = {}
        self._watched = False

    def __reduce__(self) -> tuple[type["LoadClock"], tuple[float]]:
        return LoadClock, (self._bound,)

    @property
    def seconds(self) -> dict[str, float]:
        """What went to ``read`` and ``decode`` so far."""
        with self._lock:
            return dict(self._seconds)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Counts the block as reading from storage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds["read"] += time.perf_counter() - began

    @contextlib.contextmanager
    def decoding(self, name: Callable[[], str]) -> Iterator[None]:
        """Counts the block as decoding, what else is done to the pixels included, and bounds it.

        Args:
            name: Gives the name of the image, which is told if it does not end.
        """
        thread, began = threading.get_ident(), time.perf_counter()
        with self._lock:
            self._decoding[thread] = (began, name)
            if self._bound and not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._decoding[thread]
                self._seconds["decode"] += time.perf_counter() - began

    def _watch(self) -> None:
        """End the process when a decoding takes too long; return when nothing is decoded."""
        while True:
            with self._lock:
                self._watched = bool(self._decoding)
                if not self._watched:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    return
                began, name = min(self._decoding.values(), key=itemgetter(0))
                left = began + self._bound - time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, max(left, 0) + _GRACE)
            if left <= 0:
                print(
                    f"decoding {name()} does not end within --decode-timeout {self._bound:g} s: "
                    "this process ends, and the next worker or run begins its shard again",
                    file=sys.stderr,
                    flush=True,
                )
                signal.pthread_kill(threading.get_ident(), END_SIGNAL)
                os._exit(1)  # someone in this process catches the signal
            time.sleep(min(_LOOK_SECONDS, max(left, 0.01)))
