"""Where images come from: folders of files, Parquet as on the Hugging Face hub, WebDataset tars.

`list_images` makes the frozen plan of a data set once; `ImageReader` gives the encoded bytes of
any of its images in any process.  Data lie on this machine or behind a URL.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import MismatchError, SettingError, UserError
from ..storage.connections import is_url, whole_place
from ..storage.remote_path import RemotePath
from ..storage.retries import LOST_NUMBERS
from ..storage.store_paths import StorePath
from .archives import archives_in, plan_of_archives
from .data_root import DataRoot
from .decoding import BadImage
from .image_folders import IMAGE_EXTENSIONS, holds_images, plan_of_folder
from .kept_indices import kept
from .parquet import ParquetImages, index_of_parquet, labels_of_parquet
from .plan import Plan
from .plan_matching import with_known_sizes
from .remote import locate, open_root
from .splits import Split, split_named
from .tars import (
    COMPRESSED_ENDINGS,
    TAR_ENDINGS,
    index_of_tar,
    is_compressed_tar,
    read_from_tar,
    refuse_compressed,
)

__all__ = ["IMAGE_EXTENSIONS", "LOST", "ImageReader", "Split", "list_images", "refuse_among_images"]

LOST = "its disk has lost it"
"""Why an image is a bad one that the system says it cannot read, where it can read others."""

_PARQUET_ENDINGS = frozenset((".parquet",))
_ARCHIVE_ENDINGS = _PARQUET_ENDINGS | TAR_ENDINGS | COMPRESSED_ENDINGS


def list_images(
    data: str | Path, split: Split = "all", known: Iterable[pa.Table] | None = None
) -> Plan:
    """List the images of a data set.

    **Folders.**  Images are the files below ``data`` with one of `IMAGE_EXTENSIONS`, whatever they
    hold; links are followed, names that start with a dot are skipped.  Sub-folders ``train`` (or
    ``training``), ``val`` (``validation``, ``valid``) and ``test`` are splits; the rest of ``data``
    is listed by "all" only, without labels.  Splits inside ``images`` alone (as ADE20K lies, beside
    ``annotations``) make ``data/images`` the root.

    Where all images of a split (or of ``data``, if it has none) lie in sub-folders, those are the
    classes; labels count the sorted union of the class folders of all splits, so that they agree
    between splits.  A split with images directly in it has no labels.

    **Parquet.**  ``data`` is one file, or a folder with files in it, in its ``data`` folder or in
    its split folders; names like ``train-*.parquet`` tell the split.  Column ``image`` is binary or
    ``struct<bytes: binary, ...>``, column ``label`` (optional) an integer.  The image column is
    read once, in pieces, for the sizes.  Class names are the label numbers, or the names of a
    ``classes.txt`` of lines ``wnid<TAB>name`` beside the files, if it has one for each label.

    **Tars.**  As Parquet, with samples as WebDataset has them (`tars`): ``a.jpg``, its class in
    ``a.cls`` or under ``label`` in ``a.json``.  Headers are read, images are not.

    Both are gone through once, for as long as they stay as they are (`kept_indices`).

    Args:
        data: A folder or file, local or a URL that fsspec knows: ``s3://``, ``gs://``.
        split: "val" takes a test split where there is no validation split; without any splits
            "train" and "all" list everything.
        known: Tables in order of a part store's plan, from which sizes are taken that would cost a
            look at every file of a local folder, or all bytes of Parquet: -1 of images that it
            lacks.  `ImageReader` then finds out which images have another size.

    Returns:
        The plan; its root is the absolute folder or the URL, its keys are paths relative to it
        (``train/a.jpg`` whatever the split), with ``#row`` in Parquet and ``#member`` in tars.

    Raises:
        MissingError: ``data`` or the split is not there, holds no images, or cannot be read.
        SettingError: ``data`` is an unknown kind of file or URL, or holds both images and Parquet
            or tars; ``split`` is unknown; or Parquet columns or labels are not as above.
        DamageError: A Parquet file or tar is damaged.
        UserError: The storage does not answer.
    """
    if split not in get_args(Split):
        raise SettingError(f"split is train, val or all, not {split!r}")
    plan = _plan_of(data, split, sizes=known is None)
    return plan if known is None else with_known_sizes(plan, known)


def refuse_among_images(output: StorePath, data: str, split: Split) -> None:
    """Refuse an output folder that later commands would look for images in.

    Args:
        output: Where a run or a store is to go.
        data: The data set.
        split: Which part of it.

    Raises:
        SettingError: It lies in the folder of the images, and in none that is passed over: a hidden
            one, or one beside the folders of splits.
    """
    if isinstance(output, RemotePath) or is_url(whole_place(data)):
        return
    folder, place = Path(whole_place(data)).resolve(), output.expanduser().resolve()
    if folder not in place.parents:
        return
    below = place.relative_to(folder).parts
    if any(part.startswith(".") for part in below):
        return
    if split != "all" and split_named(below[0]) is None:
        with os.scandir(folder) as entries:
            if any(entry.is_dir() and split_named(entry.name) for entry in entries):
                return
    raise SettingError(
        f"--output {output} lies in {data}, among the images, where its own pictures and tables "
        "would be taken for some: name a folder outside"
    )


def _plan_of(data: str | Path, split: Split, sizes: bool) -> Plan:
    """The plan of a data set; without sizes where they cost more than the rest, if not wanted."""
    root, name = locate(data)
    if name is not None:
        if not _is_parquet(name) and not _is_tar(name):
            raise SettingError(
                f"{root.place(name)} is one file: give a folder of images, a .parquet file or a "
                ".tar file"
            )
        return _plan_of_files(root, [name], split, sizes)
    files = archives_in(root, _ARCHIVE_ENDINGS)
    parquet, tars = list(filter(_is_parquet, files)), list(filter(_is_tar, files))
    if not parquet and not tars:
        return plan_of_folder(root, split, sizes)
    images, plain_tars = holds_images(root), [path for path in tars if not is_compressed_tar(path)]
    kinds = {"image": images, "Parquet": bool(parquet), "tar": bool(plain_tars)}
    found = [f"{kind} files" for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise SettingError(
            f"{root.root} holds both {' and '.join(found)}: give the folder of one of them, or "
            "move the others away"
        )
    if images:
        return plan_of_folder(root, split, sizes)
    return _plan_of_files(root, parquet or tars, split, sizes)


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(tuple(_PARQUET_ENDINGS))


def _is_tar(path: str) -> bool:
    return path.lower().endswith(tuple(TAR_ENDINGS)) or is_compressed_tar(path)


def _plan_of_files(root: DataRoot, files: list[str], split: Split, sizes: bool) -> Plan:
    """The plan of Parquet files, or of tars, whose headers tell the sizes anyway."""
    if _is_parquet(files[0]):
        whole, names = kept(index_of_parquet, "parquet"), partial(index_of_parquet, sizes=False)
        return plan_of_archives(root, files, split, whole if sizes else names, labels_of_parquet)
    if compressed := next(filter(is_compressed_tar, files), None):
        refuse_compressed(root.place(compressed))
    index = kept(index_of_tar, "tar")
    return plan_of_archives(root, files, split, index, lambda *tar: index(*tar).labels)


class ImageReader:
    """Encoded bytes of the images of a plan.

    No file stays open and each process has its own connections, so a reader works in forked
    processes; pickled, it takes the plan alone along.  Reads that fail are tried again (`retries`):
    what is told of an image is of the image, never of the weather.
    Parquet images whose sum is within the limit are loaded file by file on first use and
    kept; call `warm` before forking, and all workers share them.  Larger sets are read a row group
    at a time with the last two kept: quick in plan order, slow in random order (a whole row group
    an image), for which an image cache is made.

    Args:
        plan: What to read.
        in_memory_limit: Bytes of encoded images up to which Parquet is kept in memory.
        parquet: What reads Parquet below the plan's root, with what it keeps, and that root, which
            counts the files that its disk has lost; None for new ones.
    """

    def __init__(
        self, plan: Plan, in_memory_limit: int = 2 << 30, parquet: ParquetImages | None = None
    ) -> None:
        self.plan = plan
        self._limit = in_memory_limit
        # Only what reading needs: a long plan stays in its file.
        self._paths = plan.rows.column("path")
        self._rows = plan.rows.column("row").to_numpy()
        self._offsets = plan.rows.column("offset").to_numpy()
        self._keys = plan.rows.column("key") if (self._offsets >= 0).any() else None
        self._sizes = plan.sizes
        self._in_parquet = (self._rows >= 0) & (self._offsets < 0)
        self._in_memory = int(self._sizes[self._in_parquet].sum()) <= in_memory_limit
        self._parquet = parquet or ParquetImages(open_root(plan.root), self._in_memory)
        self._root = self._parquet.root

    def __len__(self) -> int:
        return len(self.plan)

    def __reduce__(self) -> tuple[type["ImageReader"], tuple[Plan, int]]:
        return ImageReader, (self.plan, self._limit)

    def warm(self) -> None:
        """Load all Parquet images that fit the limit; does nothing for plain files and tars.

        Raises:
            MissingError: A Parquet file is gone.
            DamageError: A Parquet file is damaged.
            UserError: The storage does not answer.
        """
        if self._in_memory:
            names = pc.unique(self._paths.filter(pa.array(self._in_parquet)))
            self._parquet.warm(names.to_pylist())

    @property
    def by_row_groups(self) -> bool:
        """Whether an image in random order costs a whole row group of Parquet."""
        return bool(self._in_parquet.any()) and not self._in_memory

    def read(self, index: int) -> bytes:
        """The encoded image at a position of the plan; empty where Parquet holds null.

        Args:
            index: Position, 0 to ``len(self) - 1``.

        Raises:
            IndexError: There is no such position.
            BadImage: The image's own file cannot be read (code ``unreadable``).
            MissingError: Its Parquet file or tar is gone, or the whole root is.
            MismatchError: It has another size than the plan says.
            DamageError: Its Parquet file or tar is damaged, or not the one that was listed.
            UserError: The storage does not answer.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a plan of {len(self)} images")
        path, row = self._paths[index].as_py(), int(self._rows[index])
        size = int(self._sizes[index])
        if self._in_parquet[index]:
            return self._of_size(size, self._parquet.read(path, row), f"{path}#{row}")
        if self._keys is None or row < 0:
            return self._of_size(size, self._read_plain(path), path)
        key, offset = self._keys[index].as_py(), int(self._offsets[index])
        return read_from_tar(self._root, key, path, offset, size)

    def _read_plain(self, path: str) -> bytes:
        try:
            return self._root.read_one_of_many(path)
        except UserError:
            raise
        except OSError as error:
            reason = error.strerror or "the file cannot be read"
            if error.errno in LOST_NUMBERS:
                # Disks, and the same one at another time, say so in several ways.
                reason = LOST
            raise BadImage("unreadable", reason, type(error).__name__) from error

    def _of_size(self, size: int, data: bytes, key: str) -> bytes:
        if size > 0 and len(data) != size:
            raise MismatchError(
                f"{self._root.place(key)} has {len(data)} bytes, and had {size} when it was listed "
                "for this run or its part store: leave the images as they are, and run the command "
                "again; where they were meant to change, run extract-parts into a new store first"
            )
        return data
