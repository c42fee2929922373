"""Data sets that are folders of image files: their splits, classes and plan."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..errors import MissingError
from ..storage.lookahead import done_ahead
from .data_root import DataRoot, FolderListing
from .plan import Plan
from .plan_rows import listed_rows, sorted_rows
from .remote import open_root
from .splits import Split, chosen_of, split_named

#: Names, without case, that make a file of a folder or tar an image.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)

# Where folders lie on a server, waiting is all the cost, and threads share it.  Where they do not,
# threads wait for the interpreter's lock at every name: 16 of them take twice as long as none.
_LISTING_THREADS = 16

# Folders that are listed without threads, to see whether that is waiting.
_TRIED = 4

# The root and the folders of splits and classes are looked at more than once; to keep the listings
# of all folders would be to keep all images in memory.
_KEPT_LISTINGS = 16

_Scan = Callable[[str], FolderListing]


class _Folder(NamedTuple):
    """A folder still to be listed."""

    path: str  # relative to the root, "" for the root itself
    above: frozenset[tuple[int, int]]  # device and inode of the folders that it lies in


def plan_of_folder(root: DataRoot, split: Split, sizes: bool = True) -> Plan:
    """The plan of the images in a folder, as `list_images` says.

    Args:
        root: The folder.
        split: The images wanted.
        sizes: Whether each file is asked for its size where names alone are cheaper; else those
            have size -1.

    Raises:
        MissingError: The split is not there, holds no images, or a folder cannot be listed.
        SettingError: A name is not UTF-8.
        UserError: The storage does not answer.
    """
    scan = _scanner(root, sizes)
    homes = _split_folders(scan)
    if not homes and "images" in scan("").folders:
        inner = open_root(root.place("images"))
        inner_scan = _scanner(inner, sizes)
        if homes := _split_folders(inner_scan):
            root, scan = inner, inner_scan
    homes = homes or [""]
    chosen = chosen_of(root.root, split, homes, split_named)
    classes = {home: _class_folders(scan, home) for home in homes}
    class_names = sorted(set().union(*classes.values()), key=os.fsencode)
    number = {name: label for label, name in enumerate(class_names)}
    rows = sorted_rows(
        listed_rows(
            listing.files,
            rows=np.full(len(listing.files), -1),
            sizes=listing.sizes,
            labels=np.full(len(listing.files), number.get(_class_of(folder, classes), -1)),
        )
        for start in ([""] if split == "all" else chosen)
        for folder, listing in _walk(scan, start)
        if len(listing.files)
    )
    if not rows.num_rows:
        endings = " ".join(sorted(IMAGE_EXTENSIONS))
        raise MissingError(f"{root.root} holds no images for split {split}: looked for {endings}")
    return Plan(root.root, rows, tuple(class_names))


def holds_images(root: DataRoot) -> bool:
    """Whether there is an image file anywhere below a folder."""
    return any(len(listing.files) for _, listing in _walk(_scanner(root, sizes=False), ""))


def _scanner(root: DataRoot, sizes: bool) -> _Scan:
    """Lists folders; the last ones are remembered."""
    return lru_cache(_KEPT_LISTINGS)(partial(root.scan, endings=IMAGE_EXTENSIONS, sizes=sizes))


def _split_folders(scan: _Scan) -> list[str]:
    return [name for name in scan("").folders if split_named(name)]


def _class_folders(scan: _Scan, folder: str) -> set[str]:
    """Names of the sub-folders that are classes: none where images lie beside them."""
    listing = scan(folder)
    return set() if len(listing.files) else set(listing.folders)


def _class_of(folder: str, classes: dict[str, set[str]]) -> str:
    """Name of the class that the files of a folder belong to, "" if to none."""
    home, _, inside = ("", "", folder) if "" in classes else folder.partition("/")
    name = inside.partition("/")[0]
    return name if name in classes.get(home, ()) else ""


def _walk(scan: _Scan, start: str) -> Iterator[tuple[str, FolderListing]]:
    """Each folder from ``start`` down, level by level, with what it holds."""
    level = [_Folder(start, frozenset())]
    while level:
        below: list[_Folder] = []
        listings = _listings(scan, (folder.path for folder in level))
        for folder, listing in zip(level, listings, strict=True):
            here = listing.identity
            if here is not None and here in folder.above:
                continue  # a link to a folder above would go round for ever
            yield folder.path, listing
            above = folder.above | ({here} if here is not None else set())
            prefix = f"{folder.path}/" if folder.path else ""
            below += [_Folder(prefix + name, above) for name in listing.folders]
        level = below


def _listings(scan: _Scan, folders: Iterable[str]) -> Iterator[FolderListing]:
    """What folders hold, in order; looked at ahead of use where that is mostly waiting."""
    rest = iter(folders)
    passed = used = 0.0
    for folder in islice(rest, _TRIED):
        began, spent = time.perf_counter(), time.thread_time()
        listing = scan(folder)
        passed += time.perf_counter() - began
        used += time.thread_time() - spent
        yield listing
    ahead = passed > 2 * used
    yield from done_ahead(scan, rest, _LISTING_THREADS) if ahead else map(scan, rest)
