"""How far workers are, told by them and shown now and then."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Tell = Callable[[int], None]
"""Says how many images of its shard a worker has done so far."""


class Told(NamedTuple):
    """How far a shard is."""

    images: int
    """That are done."""
    worker: str
    """Who does it."""


HERE = "this process"
"""Name of the worker that is no actor."""

Watch = Callable[[Mapping[int, Told]], None]
"""Takes how far each shard is; called now and then, from another thread."""

WATCH_SECONDS = 2.0
"""Seconds between two calls of a `Watch`."""


class Tally:
    """What workers told; an actor of its own on Ray, so that telling never holds a worker up."""

    def __init__(self) -> None:
        self._told: dict[int, Told] = {}

    def tell(self, shard: int, images: int, worker: str) -> None:
        """Keep what a worker says of its shard."""
        self._told[shard] = Told(images, worker)

    def told(self) -> dict[int, Told]:
        """What was said last of each shard."""
        return self._told


@contextlib.contextmanager
def watched(told: Callable[[], Mapping[int, Told]], watch: Watch) -> Iterator[None]:
    """Call ``watch`` with what was told, now and then, while the block runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(WATCH_SECONDS):
            # Whatever befalls the tally, the work goes on; it is for the eye alone.
            with contextlib.suppress(Exception):
                watch(told())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * WATCH_SECONDS)


def telling(watch: Watch | None, shard: int) -> Tell:
    """Tells of one shard to a `Watch`, or to nobody."""
    return lambda images: None if watch is None else watch({shard: Told(images, HERE)})
