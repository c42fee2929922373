"""Shards of an extraction, written by a thread while the worker makes the next one."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamageError, MissingError
from ..pipeline.shard_worker import Record
from ..storage.image_cache import ImageCacheWriter
from ..storage.part_identity import StoreIdentity
from ..storage.part_records import read_commit
from ..storage.part_tries import forget_tries
from ..storage.store_paths import StorePath
from .pace import ACTIVITIES
from .shard_images import ShardImages
from .store_filling import commit_shard


@dataclass
class MadeShard:
    """What is made of a shard, until it is written."""

    shard: int
    images: ShardImages
    cache: ImageCacheWriter | None
    """Of the images that the store keeps."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of `META_SCHEMA`, one an image."""
    arrays: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    """Of each array of the store the pieces, (B, ...), batch by batch."""
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    """Seconds by activity."""
    compared: list[int] = field(default_factory=lambda: [0, 0])
    """Patches whose label is that of full precision, of how many."""


class ShardWriter:
    """Writes one shard at a time behind its caller's back.

    Args:
        output: Folder or URL of the store.
        identity: Its identity.
    """

    def __init__(self, output: StorePath, identity: StoreIdentity) -> None:
        self._output, self._identity = output, identity
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[Record] | None = None

    def written(self, shard: int) -> Future[Record] | None:
        """The record of a shard that is committed already, None if it is not.

        A worker that died may have got that far, and so may one that outlived its driver.
        """
        with contextlib.suppress(MissingError, DamageError):
            commit = read_commit(self._output, self._identity, shard)
            forget_tries(self._output, shard)
            found: Future[Record] = Future()
            found.set_result({name: commit[name] for name in ("shard", "ok", "bad")})
            return found
        return None

    def write(self, made: MadeShard, begun: contextlib.ExitStack) -> Future[Record]:
        """Begin to write a shard, as soon as the one before is written.

        Args:
            made: The shard.
            begun: Ends what is written of it already.

        Returns:
            Its record, there when it is committed.

        Raises:
            UserError: The one before cannot be written.
        """
        began = time.perf_counter()
        self.wait()
        made.spent["hold"] = time.perf_counter() - began
        self._under_way = self._thread.submit(self._write, made, begun.pop_all())
        return self._under_way

    def wait(self) -> None:
        """Wait until nothing is being written; raises what went wrong with it."""
        if self._under_way is not None:
            self._under_way.result()

    def refuse_failure(self) -> None:
        """Raise what went wrong with what was being written, if anything did so far."""
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()

    def _write(self, made: MadeShard, begun: contextlib.ExitStack) -> Record:
        began = time.perf_counter()
        begun.close()
        whole = {name: np.concatenate(pieces) for name, pieces in made.arrays.items()}
        cache = None if made.cache is None else made.cache.description
        record = commit_shard(self._output, made.shard, made.rows, cache, **whole)
        forget_tries(self._output, made.shard)
        made.spent["write"] = time.perf_counter() - began
        told = {**record, "seconds": made.spent}
        equal, compared = made.compared
        return {**told, "equal": equal, "compared": compared} if compared else told
