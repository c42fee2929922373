"""How often a shard was begun and not finished: what tells a poison image from bad luck.

A worker that a shard kills cannot say so; it leaves one empty file a try in
``runs/tries/<shard>/``, named after the run, and takes them away when the shard is committed.
"""

import contextlib
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from .files import write_atomically


class Tries(NamedTuple):
    """How often a shard was begun without an end."""

    before: int
    """In all runs, this time not counted."""
    in_run: int
    """In this run, this time not counted."""


def _folder(path: Path, shard: int) -> Path:
    return path / "runs" / "tries" / f"{shard:05d}"


def begin_try(path: Path, shard: int, run: str) -> Tries:
    """Note that a shard is begun.

    Args:
        path: Folder of the store.
        shard: Number of the shard.
        run: Name of the run, without dots.

    Raises:
        UserError: The system refused the write.
    """
    folder = _folder(path, shard)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    earlier = [name for name in names if not name.startswith(".")]
    write_atomically(folder / f"{run}.{uuid.uuid4().hex}", b"")
    return Tries(len(earlier), sum(name.partition(".")[0] == run for name in earlier))


def forget_tries(path: Path, shard: int) -> None:
    """Forget the tries of a shard, which is committed now."""
    # Another writer of the same shard may be at it too; what stays does no harm.
    with contextlib.suppress(OSError):
        shutil.rmtree(_folder(path, shard))
