"""What killed writers leave of files that they did not end: no part of anything, only space."""

import contextlib
import re
import time
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError
from .store_paths import UNLASTING, StorePath

_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)
_LEFTOVER_SECONDS = 3600


def is_leftover(name: str) -> bool:
    """Whether a file of this name is a temporary one of `atomic_file`."""
    return _LEFTOVER.fullmatch(name) is not None


def sweep(path: StorePath, names: Collection[str]) -> None:
    """Remove what killed writers left of a store that is whole.

    **In a folder** those are temporary files (`sweep_folder`).  Should a clock be wrong, a live
    writer's shard stays uncommitted; nothing that stands is ever lost.

    **On S3** they are parts of uploads that were never ended, which nobody sees and somebody pays
    for.  Where a worker that outlived its driver is still at one, its upload ends in "no such
    upload" and is made again (`retries`): what it puts there are the bytes that stand.

    Args:
        path: Folder of the store.
        names: Its objects, relative to it.
    """
    if isinstance(path, Path):
        sweep_folder(path)
        return
    # Only space is at stake, and listing uploads is a right of its own.
    with contextlib.suppress(UserError, OSError):
        path.end_uploads(lambda name: name in names or name.partition("/")[0] in UNLASTING)


def sweep_folder(path: Path) -> None:
    """Remove the temporary files of `atomic_file` below a folder that were not touched for an hour.

    A live writer touches its file all the time.  Should a clock be wrong by more than that, its
    rename fails.
    """
    oldest = time.time() - _LEFTOVER_SECONDS
    for place in path.rglob(".*.tmp"):
        # Another process may sweep too, and the disk may be read-only.
        with contextlib.suppress(OSError):
            known = is_leftover(place.name) and place.is_file() and not place.is_symlink()
            if known and place.stat().st_mtime < oldest:
                place.unlink()
