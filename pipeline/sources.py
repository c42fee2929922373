"""Where images come from: folders of files, or Parquet as data sets lie on the Hugging Face hub.

`list_images` makes the frozen plan of a data set once; `ImageReader` gives the encoded bytes of
any of its images in any process.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import DamageError, MissingError, SettingError, UserError
from .decoding import BadImage
from .plan import Plan, make_plan

Split = Literal["train", "val", "all"]

#: Names, without case, that make a file of a folder an image.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)

# Folders and Parquet prefixes of each split; a test split is the validation split of last resort.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_PARQUET_PREFIX = re.compile(r"[A-Za-z]+")

_LISTING_THREADS = 8
_ROWS_A_BATCH = 256
_READ_AHEAD_BYTES = 1 << 20
_MOST_CLASSES = 1_000_000


class _Listed(NamedTuple):
    """Some images, column by column, before they are sorted."""

    paths: list[str]
    rows: list[int]
    sizes: list[int]
    labels: list[int]


def list_images(data: str | Path, split: Split = "all") -> Plan:
    """List the images of a data set.

    **Folders.**  Images are the files below ``data`` with one of `IMAGE_EXTENSIONS`, whatever they
    hold; links are followed, names that start with a dot are skipped.  Sub-folders ``train`` (or
    ``training``), ``val`` (``validation``, ``valid``) and ``test`` are splits; the rest of ``data``
    is listed by "all" only, without labels.  Where all images of a split (or of ``data``, if it has
    none) lie in sub-folders, those are the classes; labels count the sorted union of the class
    folders of all splits, so that they agree between splits.  A split with images directly in it
    has no labels.

    **Parquet.**  ``data`` is one file, or a folder with files in it or in its ``data`` folder;
    names like ``train-*.parquet`` tell the split.  Column ``image`` is binary or
    ``struct<bytes: binary, ...>``, column ``label`` (optional) an integer.  The image column is
    read once, in pieces, for the sizes.  Class names are the label numbers, or the names of a
    ``classes.txt`` of lines ``wnid<TAB>name`` beside the files, if it has one for each label.

    Args:
        data: A local folder or ``.parquet`` file.
        split: "val" takes a test split where there is no validation split; without any splits
            "train" and "all" list everything.

    Returns:
        The plan; its root is the absolute folder, its keys are paths relative to it (``train/a.jpg``
        whatever the split), with ``#row`` in Parquet.

    Raises:
        MissingError: ``data`` or the split is not there, holds no images, or cannot be read.
        SettingError: ``data`` is a URL, an unknown kind of file, or holds both images and Parquet;
            ``split`` is unknown; or the Parquet columns are not as above.
        DamageError: A Parquet file is damaged.
    """
    if split not in ("train", "val", "all"):
        raise SettingError(f"split is train, val or all, not {split!r}")
    if "://" in str(data):
        raise SettingError(f"{data} is a URL, but only local folders and files are read so far")
    place = Path(data).expanduser().absolute()
    if not place.exists():
        raise MissingError(f"{place} does not exist: give a folder of images or of Parquet files")
    if place.is_file():
        if place.suffix.lower() != ".parquet":
            raise SettingError(f"{place} is one file: give a folder of images or a .parquet file")
        return _list_parquet(place.parent, [place.name], split)
    parquet = _parquet_files(place)
    if not parquet:
        return _list_folder(place, split)
    if next(_walk(place, ""), None) is not None:
        raise SettingError(
            f"{place} holds both image files and Parquet files: give the folder of one of them"
        )
    return _list_parquet(place, parquet, split)


def _chosen(split: Split, names: list[str], split_of: Callable[[str], str | None]) -> list[str]:
    """Those of the names that belong to a split; all of them where none belongs to any."""
    splits = {split_of(name) for name in names} - {None}
    if split == "all" or (split == "train" and not splits):
        return names
    wanted = "test" if split == "val" and "val" not in splits else split
    return [name for name in names if split_of(name) == wanted]


def _no_split(place: Path, split: Split, kind: str) -> MissingError:
    return MissingError(
        f"{place} has no {split} split ({kind}): give data that has one, or ask for split all"
    )


# Folders of image files.


def _list_folder(root: Path, split: Split) -> Plan:
    top = [entry.name for entry in _visible(root) if entry.is_dir()]
    split_folders = [name for name in top if name.lower() in _SPLIT_OF]
    chosen = _chosen(split, split_folders, lambda name: _SPLIT_OF[name.lower()])
    if split == "val" and not chosen:
        raise _no_split(root, split, "a folder val or validation")
    classes = {
        folder: _class_folders(root / folder)
        for folder in (split_folders if split_folders else [""])
    }
    class_names = sorted(set().union(*classes.values()), key=os.fsencode)
    if split != "all" and split_folders and not chosen:
        raise _no_split(root, split, "a folder train")
    number = {name: label for label, name in enumerate(class_names)}
    listed = _Listed([], [], [], [])
    for start in chosen if split != "all" and split_folders else [""]:
        for path, size in _walk(root, start):
            first, _, rest = path.partition("/")
            folder, inside = (first, rest) if first in classes else ("", path)
            name = inside.partition("/")[0]
            has_class = "/" in inside and name in classes.get(folder, ())
            listed.paths.append(path)
            listed.rows.append(-1)
            listed.sizes.append(size)
            listed.labels.append(number[name] if has_class else -1)
    if not listed.paths:
        endings = " ".join(sorted(IMAGE_EXTENSIONS))
        raise MissingError(f"{root} holds no images for split {split}: looked for {endings}")
    return _plan(root, listed, class_names)


def _class_folders(folder: Path) -> set[str]:
    """Names of the sub-folders that are classes: none where images lie beside them."""
    names = set()
    for entry in _visible(folder):
        if entry.is_dir():
            names.add(entry.name)
        elif _is_image(entry):
            return set()
    return names


def _walk(root: Path, start: str) -> Iterator[tuple[str, int]]:
    """Path relative to root, and size, of each image below ``root / start``, level by level.

    Folders are read by several threads: on network file systems the waiting is all the cost.
    """
    level = [(start, frozenset[tuple[int, int]]())]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        while level:
            below: list[tuple[str, frozenset[tuple[int, int]]]] = []
            for images, folders in pool.map(partial(_scan, root), level):
                yield from images
                below += folders
            level = below


def _scan(
    root: Path, folder: tuple[str, frozenset[tuple[int, int]]]
) -> tuple[list[tuple[str, int]], list[tuple[str, frozenset[tuple[int, int]]]]]:
    """Images and sub-folders of one folder; ``folder`` is its path and the folders it lies in."""
    path, parents = folder
    place = root / path
    status = place.stat()
    here = (status.st_dev, status.st_ino)
    if here in parents:  # a link to a folder above would go round for ever
        return [], []
    prefix = f"{path}/" if path else ""
    images, folders = [], []
    for entry in _visible(place):
        if entry.is_dir():
            folders.append((prefix + entry.name, parents | {here}))
        elif _is_image(entry):
            images.append((prefix + entry.name, _size(entry)))
    return images, folders


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise MissingError(f"the folder {folder} cannot be listed: {error.strerror}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a name that is no folder counts; a link to nowhere does, and is found bad later."""
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
        return False
    return entry.is_file() or entry.is_symlink()


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def _plan(root: Path, listed: _Listed, class_names: list[str]) -> Plan:
    try:
        return make_plan(
            str(root),
            paths=listed.paths,
            rows=listed.rows,
            sizes=listed.sizes,
            labels=listed.labels,
            class_names=class_names,
        )
    except UnicodeEncodeError as error:
        raise SettingError(f"{root} holds a file name that is not UTF-8: rename it") from error


# Parquet files.
