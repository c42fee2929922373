"""The images of one shard of an extraction: read and decoded ahead of the network, in batches."""

import functools
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import UserError
from ..pipeline.decoding import BadImage
from ..pipeline.image_loading import LoadedImage
from ..pipeline.load_clock import END_SIGNAL
from ..pipeline.plan import Plan
from ..pipeline.quarantine import fatal_images
from ..pipeline.sources import ImageReader
from ..storage.part_tries import Tries
from .previous_store import PreviousRows

TRIES = 3
"""Tries of a shard that end with the worker's death before its images are tried one by one."""

MOST_TRIES = 8
"""Tries of a shard in one run before it is given up."""

_AHEAD = 2
"""Batches that are decoded ahead of the network."""

Load = Callable[..., LoadedImage]
"""Reads and decodes one image, as `pipeline.image_loading.load_image` does."""


@dataclass(frozen=True)
class ShardImages:
    """The images of a shard."""

    plan: Plan
    """Those of the shard alone."""
    start: int
    """Row of the first in the store."""
    reader: ImageReader
    load: Load
    """Of an image, by reader, place in the plan, and what it is known by."""
    fatal: dict[int, str]
    """Those that kill the process that decodes them, and how."""
    previous: PreviousRows | None
    """What an earlier store holds of them."""

    def batches(
        self, size: int, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, list[LoadedImage]]]:
        """Position of the first image of each batch and its images, loaded ahead of their use.

        Args:
            size: Images of a batch; the last one may have fewer.
            pool: Threads that load them.
        """
        waiting: list[list[Future[LoadedImage]]] = []
        begun, count = 0, len(self.plan)
        for first in range(0, count, size):
            while begun < count and len(waiting) <= _AHEAD:
                places = range(begun, min(begun + size, count))
                waiting.append([pool.submit(self._load, place) for place in places])
                begun += size
            yield first, [future.result() for future in waiting.pop(0)]

    def _load(self, place: int) -> LoadedImage:
        if place in self.fatal:
            try:
                data = self.reader.read(place)
            except BadImage as unreadable:
                return LoadedImage(None, None, None, 0, unreadable)
            bad = BadImage("fatal", f"decoding it kills the process ({self.fatal[place]})")
            if self.fatal[place] == END_SIGNAL.name:
                bad = BadImage("hanging", "decoding it does not end")
            return LoadedImage(None, None, None, zlib.crc32(data), bad)
        known = None if self.previous is None else self.previous.crc32(place)
        return self.load(self.reader, place, known=known)


def fatal_after(tries: Tries, shard: str, plan: Plan, load: Load) -> dict[int, str]:
    """The images of a shard that kill, looked for once it ended its worker too often.

    Args:
        tries: Of the shard.
        shard: What it is, for messages.
        plan: Its images.
        load: Loads one, as of `ShardImages`.

    Raises:
        UserError: The shard ended its worker too often in this run, and no image of it does.
    """
    if tries.in_run >= MOST_TRIES:
        raise UserError(
            f"{shard} ended its worker {tries.in_run} times, and no image of it does so by itself: "
            "see whether memory runs out, and use a smaller --batch-size or fewer --workers; or, "
            "where their machines are that busy, raise --decode-timeout"
        )
    if tries.before < TRIES:
        return {}
    reader = ImageReader(plan, in_memory_limit=0)
    return fatal_images(functools.partial(load, reader), range(len(plan)))
