"""What killed writers leave of files that they did not end: no part of anything, only space."""

import contextlib
import re
import time
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError
from .store_paths import StorePath, lasts

_LEFTOVER = re.compile(r"\.(.*)\.[0-9a-f]{32}\.tmp", re.DOTALL)
_LEFTOVER_SECONDS = 3600


def is_leftover(name: str) -> bool:
    """Whether a file of this name is a temporary one of `atomic_file`."""
    return _LEFTOVER.fullmatch(name) is not None


def sweep(path: StorePath, names: Collection[str]) -> None:
    """Remove what killed writers left of a store that is whole.

    **In a folder** those are temporary files: all of objects that stand, others once they are old
    (`sweep_folder`).

    **On S3** they are parts of uploads that were never ended, which nobody sees and somebody pays
    for.  Where a worker that outlived its driver is still at one, its upload ends in "no such
    upload" and is made again (`retries`): what it puts there are the bytes that stand.

    Args:
        path: Folder of the store.
        names: Its objects and records, relative to it.
    """
    if isinstance(path, Path):
        sweep_folder(path, list(filter(lasts, names)))
        return
    # Only space is at stake, and listing uploads is a right of its own.
    with contextlib.suppress(UserError, OSError):
        path.end_uploads(lambda name: name in names or not lasts(name))


def sweep_folder(path: Path, standing: Collection[str] = ()) -> None:
    """Remove temporary files of `atomic_file` below a folder: those not touched for an hour.

    A live writer touches its file all the time.  Should a clock be wrong by more than that, its
    rename fails.

    Args:
        path: The folder.
        standing: Files, relative to it, that stand with the bytes that any writer would give them.
            Their temporary files go at once: a live writer makes its own again
            (`write_atomically`), or is content with what stands (`write_image_cache`).
    """
    oldest = time.time() - _LEFTOVER_SECONDS
    stands = {path / name for name in standing}
    for place in path.rglob(".*.tmp"):
        # Another process may sweep too, and the disk may be read-only.
        with contextlib.suppress(OSError):
            known = _LEFTOVER.fullmatch(place.name)
            if not known or not place.is_file() or place.is_symlink():
                continue
            if place.with_name(known[1]) in stands or place.stat().st_mtime < oldest:
                place.unlink()
