"""Where a part store may lie, a folder or a URL, and what is done in either way."""

import shutil
from pathlib import Path

from .connections import is_url, whole_place
from .remote_path import RemotePath

StorePath = Path | RemotePath
"""Where a part store may lie: a folder, or a URL."""

_UNLASTING = frozenset(("runs", "cache"))


def lasts(name: str) -> bool:
    """Whether what has this name, relative to its store, is part of what the store is."""
    return name.partition("/")[0] not in _UNLASTING


def store_path(place: str | Path) -> StorePath:
    """The place that a text names: the one way from a setting to where a store lies.

    Args:
        place: A URL, or a path, from ``~`` on too.  ``file://`` is a path; a path stays relative if
            it is.
    """
    text = str(place)
    if "://" not in text:
        return Path(place).expanduser()
    whole = whole_place(text)
    return RemotePath(whole) if is_url(whole) else Path(whole)


def read_range(path: StorePath, start: int, stop: int) -> bytes:
    """Bytes of a file, fewer than asked for where it ends before.

    Args:
        path: An existing file.
        start: First byte.
        stop: One past the last byte.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(path, RemotePath):
        return path.read_range(start, stop)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(max(stop - start, 0))


def sizes_below(path: StorePath) -> dict[str, int]:
    """Bytes of every file in a folder and in those in it, by path relative to it.

    A link counts as a file, whatever it leads to.

    Args:
        path: The folder; without one there are no files.
    """
    if isinstance(path, RemotePath):
        return path.sizes_below()
    files = (place for place in path.rglob("*") if place.is_symlink() or not place.is_dir())
    return {file.relative_to(path).as_posix(): file.lstat().st_size for file in files}


def remove_tree(path: StorePath) -> None:
    """Remove a folder and all that is in it, as far as the system allows it."""
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)
