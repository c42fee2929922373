"""What is costly to load and wanted by several threads: loaded by one of them, and kept."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar, TypeVarTuple
from weakref import WeakSet

Ts = TypeVarTuple("Ts")
R = TypeVar("R")


class _Entry(Generic[R]):
    """What is loaded, in a list of its own, or is being loaded by who holds the lock."""

    def __init__(self, loaded: list[R]) -> None:
        self.loaded, self.lock = loaded, threading.Lock()


class SingleFlight(Generic[*Ts, R]):
    """The last results of a function, each made once however many threads ask for it meanwhile.

    `functools.lru_cache` has each of them make it.  A forked process keeps what was loaded and gets
    locks of its own, as those of before may be held by threads that it has not.

    Args:
        load: The function; its arguments must be hashable.
        most: Results that are kept; None for all.
    """

    def __init__(self, load: Callable[[*Ts], R], most: int | None = None) -> None:
        self._load, self._most = load, most
        self._kept: OrderedDict[tuple[*Ts], _Entry[R]] = OrderedDict()
        self._lock = threading.Lock()
        _there.add(self)

    def __call__(self, *args: *Ts) -> R:
        """The result; what the function raises passes through, and who is next tries again."""
        with self._lock:
            entry = self._kept.setdefault(args, _Entry([]))
            self._kept.move_to_end(args)
            while self._most is not None and len(self._kept) > self._most:
                self._kept.popitem(last=False)
        with entry.lock:  # who waits here has it even if it is not kept any more by then
            if not entry.loaded:
                entry.loaded.append(self._load(*args))
            return entry.loaded[0]

    def forget_other_threads(self) -> None:
        """In a forked child the threads that were loading are gone, and their locks are not."""
        self._lock = threading.Lock()
        done = ((key, entry.loaded) for key, entry in self._kept.items() if entry.loaded)
        self._kept = OrderedDict((key, _Entry(loaded)) for key, loaded in done)


_there: WeakSet[SingleFlight[*tuple[Any, ...], Any]] = WeakSet()


def _forget_other_threads() -> None:
    for there in _there:
        there.forget_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
