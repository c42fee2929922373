"""Where images come from: folders of files, or Parquet as data sets lie on the Hugging Face hub.

`list_images` makes the frozen plan of a data set once; `ImageReader` gives the encoded bytes of
any of its images in any process.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import MissingError, SettingError
from .decoding import BadImage
from .parquet import ParquetImages, plan_of_parquet
from .plan import Plan, make_plan

Split = Literal["train", "val", "all"]

#: Names, without case, that make a file of a folder an image.
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)

# Folders and Parquet prefixes of each split; a test split is the validation split of last resort.
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "valid"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

_LISTING_THREADS = 8


class _Folder(NamedTuple):
    """A folder still to be listed."""

    path: str  # relative to the root, "" for the root itself
    above: frozenset[tuple[int, int]]  # device and inode of the folders that it lies in


def list_images(data: str | Path, split: Split = "all") -> Plan:
    """List the images of a data set.

    **Folders.**  Images are the files below ``data`` with one of `IMAGE_EXTENSIONS`, whatever they
    hold; links are followed, names that start with a dot are skipped.  Sub-folders ``train`` (or
    ``training``), ``val`` (``validation``, ``valid``) and ``test`` are splits; the rest of ``data``
    is listed by "all" only, without labels.  Splits inside ``images`` alone (as ADE20K lies, beside
    ``annotations``) make ``data/images`` the root.

    Where all images of a split (or of ``data``, if it has none) lie in sub-folders, those are the
    classes; labels count the sorted union of the class folders of all splits, so that they agree
    between splits.  A split with images directly in it has no labels.

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
        The plan; its root is the absolute folder, its keys are paths relative to it
        (``train/a.jpg`` whatever the split), with ``#row`` in Parquet.

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


def _chosen(
    place: Path, split: Split, names: list[str], split_of: Callable[[str], str | None]
) -> list[str]:
    """Those of the folders or files that belong to a split; all where none belongs to any."""
    splits = {split_of(name) for name in names} - {None}
    if split == "all" or (split == "train" and not splits):
        return names
    wanted = "test" if split == "val" and "val" not in splits else split
    chosen = [name for name in names if split_of(name) == wanted]
    if not chosen:
        raise MissingError(
            f"{place} has no {split} split: expected a folder {split}/ or files {split}-*.parquet; "
            "add one, or ask for split all"
        )
    return chosen


# Folders of image files.


def _list_folder(root: Path, split: Split) -> Plan:
    homes = _split_folders(root)
    if not homes and (root / "images").is_dir() and (homes := _split_folders(root / "images")):
        root = root / "images"
    homes = homes or [""]
    chosen = _chosen(root, split, homes, lambda name: _SPLIT_OF.get(name.lower()))
    classes = {home: _class_folders(root / home) for home in homes}
    class_names = sorted(set().union(*classes.values()), key=os.fsencode)
    number = {name: label for label, name in enumerate(class_names)}
    paths, sizes, labels = [], [], []
    for start in [""] if split == "all" else chosen:
        for path, size in _walk(root, start):
            paths.append(path)
            sizes.append(size)
            labels.append(number.get(_class_of(path, classes), -1))
    if not paths:
        endings = " ".join(sorted(IMAGE_EXTENSIONS))
        raise MissingError(f"{root} holds no images for split {split}: looked for {endings}")
    try:
        return make_plan(
            str(root),
            paths=paths,
            rows=np.full(len(paths), -1),
            sizes=sizes,
            labels=labels,
            class_names=class_names,
        )
    except UnicodeEncodeError as error:
        raise SettingError(f"{root} holds a file whose name is not UTF-8: rename it") from error


def _split_folders(root: Path) -> list[str]:
    return [e.name for e in _visible(root) if e.name.lower() in _SPLIT_OF and e.is_dir()]


def _class_of(path: str, classes: dict[str, set[str]]) -> str:
    """Name of the class folder that a file lies in, "" if in none."""
    home, _, inside = ("", "", path) if "" in classes else path.partition("/")
    name, below, _ = inside.partition("/")
    return name if below and name in classes.get(home, ()) else ""


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
    level = [_Folder(start, frozenset())]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        while level:
            below: list[_Folder] = []
            for images, folders in pool.map(partial(_scan, root), level):
                yield from images
                below += folders
            level = below


def _scan(root: Path, folder: _Folder) -> tuple[list[tuple[str, int]], list[_Folder]]:
    """The images (path, size) and the sub-folders of one folder."""
    place = root / folder.path
    status = place.stat()
    here = (status.st_dev, status.st_ino)
    if here in folder.above:  # a link to a folder above would go round for ever
        return [], []
    prefix = f"{folder.path}/" if folder.path else ""
    images, folders = [], []
    for entry in _visible(place):
        if entry.is_dir():
            folders.append(_Folder(prefix + entry.name, folder.above | {here}))
        elif _is_image(entry):
            images.append((prefix + entry.name, _size(entry)))
    return images, folders


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise MissingError(
            f"the folder {folder} cannot be listed ({error.strerror}): make it readable"
        ) from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a name that is no folder counts; a link to nowhere does, and is found bad later."""
    if Path(entry.name).suffix.lower() not in IMAGE_EXTENSIONS:
        return False
    return entry.is_file() or entry.is_symlink()


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


# Parquet files.


def _parquet_files(root: Path) -> list[str]:
    """The Parquet files of a folder and of its ``data`` folder, relative to it, sorted."""
    folders = {"": root, "data/": root / "data"}
    return sorted(
        prefix + entry.name
        for prefix, folder in folders.items()
        if folder.is_dir()
        for entry in _visible(folder)
        if entry.name.lower().endswith(".parquet") and not entry.is_dir()
    )


def _parquet_split(path: str) -> str | None:
    word = re.match(r"[a-z]*", path.rpartition("/")[2].lower())
    return _SPLIT_OF.get(word[0]) if word else None


def _list_parquet(root: Path, files: list[str], split: Split) -> Plan:
    return plan_of_parquet(root, files, _chosen(root, split, files, _parquet_split), split)


class ImageReader:
    """Encoded bytes of the images of a plan.

    No file stays open, so a reader works in forked processes; pickled, it takes the plan alone
    along.  Parquet images whose sum is within the limit are loaded file by file on first use and
    kept; call `warm` before forking, and all workers share them.  Larger sets are read a row group
    at a time with the last two kept: quick in plan order, slow in random order (a whole row group
    an image), for which an image cache is made.

    Args:
        plan: What to read.
        in_memory_limit: Bytes of encoded images up to which Parquet is kept in memory.
    """

    def __init__(self, plan: Plan, in_memory_limit: int = 2 << 30) -> None:
        self.plan = plan
        self._limit = in_memory_limit
        self._paths = plan.table["path"].combine_chunks()
        self._rows = plan.table["row"].to_numpy()
        self._in_memory = int(plan.sizes[self._rows >= 0].sum()) <= in_memory_limit
        self._parquet = ParquetImages(plan.root, self._in_memory)

    def __len__(self) -> int:
        return len(self.plan)

    def __reduce__(self) -> tuple[type["ImageReader"], tuple[Plan, int]]:
        return ImageReader, (self.plan, self._limit)

    def warm(self) -> None:
        """Load all Parquet images that fit the limit; does nothing for plain files.

        Raises:
            MissingError: A Parquet file is gone.
            DamageError: A Parquet file is damaged.
        """
        if self._in_memory:
            names = pc.unique(self._paths.filter(pa.array(self._rows >= 0)))
            self._parquet.warm(names.to_pylist())

    def read(self, index: int) -> bytes:
        """The encoded image at a position of the plan; empty where Parquet holds null.

        Args:
            index: Position, 0 to ``len(self) - 1``.

        Raises:
            IndexError: There is no such position.
            BadImage: The image's own file cannot be read (code ``unreadable``).
            MissingError: Its Parquet file is gone.
            DamageError: Its Parquet file is damaged, or has fewer rows than when it was listed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a plan of {len(self)} images")
        path, row = self._paths[index].as_py(), int(self._rows[index])
        return self._read_plain(path) if row < 0 else self._parquet.read(path, row)

    def _read_plain(self, path: str) -> bytes:
        try:
            return Path(self.plan.root, path).read_bytes()
        except OSError as error:
            reason = error.strerror or "the file cannot be read"
            raise BadImage("unreadable", reason, type(error).__name__) from error
