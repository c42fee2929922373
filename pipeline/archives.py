"""Data sets whose files hold many images each: Parquet files, or WebDataset tars."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import MissingError, SettingError
from ..storage.lookahead import done_ahead
from .data_root import DataRoot
from .plan import Plan
from .plan_rows import listed_rows, sorted_rows
from .splits import Split, chosen_of, split_in, split_named

_LISTING_THREADS = 8
_MOST_CLASSES = 1_000_000


class ArchiveIndex(NamedTuple):
    """The images of one file, in its order."""

    sizes: NDArray[np.int64]
    """Bytes of each encoded image, (n,)."""
    labels: NDArray[np.int64]
    """Class of each image, -1 for none, (n,)."""
    members: pa.Array | None = None
    """Name of each image in a tar, strings (n,); None in Parquet, where rows have no names."""
    offsets: NDArray[np.int64] | None = None
    """Where each image begins in a tar, (n,)."""


Index = Callable[[DataRoot, str], ArchiveIndex]
Labels = Callable[[DataRoot, str], NDArray[np.int64]]


def archives_in(root: DataRoot, endings: Collection[str]) -> list[str]:
    """Files of a folder, of its ``data`` folder and of its split folders, sorted.

    Args:
        root: The folder.
        endings: Of the files wanted, such as ``.tar``.

    Returns:
        Paths relative to the root.
    """
    top = root.scan("", endings, sizes=False)
    inner = [name for name in top.folders if name == "data" or split_named(name)]
    listings = [top, *(root.scan(name, endings, sizes=False) for name in inner)]
    return sorted(path for listing in listings for path in listing.files.to_pylist())


def plan_of_archives(
    root: DataRoot, files: Sequence[str], split: Split, index: Index, labels_of: Labels
) -> Plan:
    """The plan of the images in Parquet files or tars.

    Args:
        root: Folder that the paths are relative to.
        files: All files of the data set: their labels make the classes, whatever is chosen.
        split: The images wanted.
        index: Finds the images of a file.
        labels_of: Finds their labels alone, int64 (n,).

    Returns:
        The plan, with keys ``path#row`` or ``path#member``.  Class names are the label numbers, or
        the names of a ``classes.txt`` of lines ``wnid<TAB>name`` beside the files, if it has one
        for each label.

    Raises:
        MissingError: The split is not there or holds no images, or a file cannot be opened.
        SettingError: A file is not as `index` expects.
        DamageError: A file is damaged.
        UserError: The storage does not answer.
    """
    chosen = chosen_of(root.root, split, list(files), split_in)
    others = sorted({*files} - {*chosen})
    most = -1

    def pieces() -> Iterator[pa.Table]:
        nonlocal most
        indices = done_ahead(partial(index, root), chosen, _LISTING_THREADS)
        for path, found in zip(chosen, indices, strict=True):
            most = max(most, int(found.labels.max(initial=-1)))
            count = len(found.sizes)
            paths = pa.repeat(pa.scalar(path, pa.string()), count)
            numbers = np.arange(count)
            yield listed_rows(
                paths, numbers, found.sizes, found.labels, found.members, found.offsets
            )

    rows = sorted_rows(pieces())
    # Labels of the other splits count too: class names must be those of every split.
    for labels in done_ahead(partial(labels_of, root), others, _LISTING_THREADS):
        most = max(most, int(labels.max(initial=-1)))
    if not rows.num_rows:
        raise MissingError(
            f"{root.root} holds no images for split {split}: its {len(chosen)} files "
            f"({chosen[0]} first) are empty"
        )
    return Plan(root.root, rows, tuple(_named_classes(root, files, most + 1)))


def require_classes(labels: NDArray[np.int64], what: str) -> None:
    """Refuse labels that are no class numbers.

    Args:
        labels: int64 (n,).
        what: What they are, for the message.

    Raises:
        SettingError: One is below -1 or too large to be one.
    """
    if labels.min(initial=-1) < -1 or labels.max(initial=-1) >= _MOST_CLASSES:
        raise SettingError(
            f"{what} runs from {labels.min()} to {labels.max()}: expected class numbers from 0, or "
            f"-1 for none, below {_MOST_CLASSES}"
        )


def _named_classes(root: DataRoot, files: Sequence[str], count: int) -> list[str]:
    """Names from a ``classes.txt`` beside the files if it names them all, else the numbers."""
    for folder in sorted({path.rpartition("/")[0] for path in files}):
        place = f"{folder}/classes.txt" if folder else "classes.txt"
        if count and (status := root.status(place)) is not None and status.kind == "file":
            text = root.read(place).decode(errors="replace")
            names = [line.partition("\t")[2].strip() for line in text.splitlines() if line.strip()]
            if all(names) and len(names) >= count:
                return names
    return [str(label) for label in range(count)]
