"""How often a shard was begun and not finished: what tells a poison image from bad luck.

A worker that a shard kills cannot say so; it leaves an empty file ``<shard>.<run>.<unique>`` a try
in ``runs/tries/``, and takes those of the shard away when it is committed.
"""

import uuid
from typing import NamedTuple

from .files import write_atomically
from .store_paths import StorePath


class Tries(NamedTuple):
    """How often a shard was begun without an end."""

    before: int
    """In all runs, this time not counted."""
    in_run: int
    """In this run, this time not counted."""


def begin_try(path: StorePath, shard: int, run: str) -> Tries:
    """Note that a shard is begun.

    Args:
        path: Folder of the store.
        shard: Number of the shard.
        run: Name of the run, without dots.

    Raises:
        UserError: The system refused the write.
    """
    earlier = [place.name.split(".")[1] for place in _tries(path, shard)]
    write_atomically(path / "runs" / "tries" / f"{shard:05d}.{run}.{uuid.uuid4().hex}", b"")
    return Tries(len(earlier), earlier.count(run))


def take_back_try(path: StorePath, shard: int, run: str) -> None:
    """Forget one try of a shard in a run, which ended for no fault of the shard.

    Args:
        path: Folder of the store.
        shard: Number of the shard.
        run: Name of the run, as `begin_try` was given it.
    """
    for place in _tries(path, shard):
        if place.name.split(".")[1] == run:
            place.unlink(missing_ok=True)
            return


def forget_tries(path: StorePath, shard: int) -> None:
    """Forget the tries of a shard, which is committed now."""
    for place in _tries(path, shard):
        place.unlink(missing_ok=True)  # another writer of the same shard may be at it too


def _tries(path: StorePath, shard: int) -> list[StorePath]:
    return list((path / "runs" / "tries").glob(f"{shard:05d}.*"))
