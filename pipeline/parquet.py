"""Parquet files of images, as data sets lie on the Hugging Face hub: listed and read.

Column ``image`` is binary or ``struct<bytes: binary, ...>``, column ``label`` (optional) an
integer.  Page checksums are verified wherever a file has them.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DamageError, MissingError, SettingError, UserError
from .plan import Plan, make_plan

_LISTING_THREADS = 8
_ROWS_A_BATCH = 256
_READ_AHEAD_BYTES = 1 << 20
_MOST_CLASSES = 1_000_000
_CACHED_ROW_GROUPS = 2


def plan_of_parquet(root: Path, files: Sequence[str], chosen: Sequence[str], split: str) -> Plan:
    """The plan of the images in some of the Parquet files of a data set.

    Args:
        root: Absolute folder that the paths are relative to.
        files: All files of the data set: their labels make the classes, whatever is chosen.
        chosen: Those whose images are wanted.
        split: What they were chosen for, for messages.

    Returns:
        The plan, with keys ``path#row``.  Class names are the label numbers, or the names of a
        ``classes.txt`` of lines ``wnid<TAB>name`` beside the files, if it has one for each label.

    Raises:
        MissingError: The chosen files hold no rows, or a file cannot be opened.
        SettingError: A column is not as the head of this module says.
        DamageError: A file is damaged.
    """
    others = [path for path in files if path not in chosen]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listed = list(pool.map(lambda path: _sizes_and_labels(root / path), chosen))
        # Labels of the other splits count too: class names must be those of every split.
        labels = [*(part[1] for part in listed), *pool.map(lambda p: _labels(root / p), others)]
    counts = [len(sizes) for sizes, _ in listed]
    if sum(counts) == 0:
        raise MissingError(f"{root} holds no images for split {split}: its Parquet files are empty")
    most = max(int(part.max(initial=-1)) for part in labels)
    return make_plan(
        str(root),
        paths=np.repeat(np.array(chosen, dtype=object), counts),
        rows=np.concatenate([np.arange(count) for count in counts]),
        sizes=np.concatenate([sizes for sizes, _ in listed]),
        labels=np.concatenate([part for _, part in listed]),
        class_names=_named_classes(root, files, most + 1),
    )


def _named_classes(root: Path, files: Sequence[str], count: int) -> list[str]:
    """Names from a ``classes.txt`` beside the files if it names them all, else the numbers."""
    for folder in sorted({(root / path).parent for path in files}):
        if count and (folder / "classes.txt").is_file():
            text = (folder / "classes.txt").read_text(encoding="utf-8", errors="replace")
            names = [line.partition("\t")[2].strip() for line in text.splitlines() if line.strip()]
            if all(names) and len(names) >= count:
                return names
    return [str(label) for label in range(count)]


def _sizes_and_labels(place: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes of each encoded image, and labels, of one file: both int64 of shape (rows,)."""
    with _opened(place) as file:
        sizes = [np.zeros(0, np.int64)]
        for batch in file.iter_batches(_ROWS_A_BATCH, columns=[_image_column(file, place)]):
            lengths = pc.fill_null(pc.binary_length(_encoded(batch["image"])), 0)
            sizes.append(lengths.cast(pa.int64()).to_numpy(zero_copy_only=False))
    return np.concatenate(sizes), _labels(place)


def _labels(place: Path) -> NDArray[np.int64]:
    """Labels of one file, int64 of shape (rows,); -1 where there is none."""
    with _opened(place) as file:
        if "label" not in file.schema_arrow.names:
            return np.full(file.metadata.num_rows, -1, dtype=np.int64)
        column = file.read(columns=["label"], use_threads=False)["label"]
    if not pa.types.is_integer(column.type):
        raise SettingError(f"column label of {place} is {column.type}: expected integers")
    labels = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    if labels.min(initial=-1) < -1 or labels.max(initial=-1) >= _MOST_CLASSES:
        raise SettingError(
            f"column label of {place} runs from {labels.min()} to {labels.max()}: expected class "
            f"numbers from 0, or -1 for none, below {_MOST_CLASSES}"
        )
    return np.asarray(labels)


@contextmanager
def _opened(place: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose page checksums are verified; what goes wrong in it names the file."""
    try:
        with pq.ParquetFile(
            place, pre_buffer=False, buffer_size=_READ_AHEAD_BYTES, page_checksum_verification=True
        ) as file:
            yield file
    except UserError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(
            f"{place} cannot be opened: {error.strerror or 'no such file'}"
        ) from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DamageError(
            f"{place} is not a sound Parquet file: fetch or write it again ({reason})"
        ) from error


def _image_column(file: pq.ParquetFile, place: Path) -> str:
    """What to ask the file for: the encoded bytes alone."""
    schema = file.schema_arrow
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    if _is_binary(kind):
        return "image"
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if "bytes" in fields and _is_binary(fields["bytes"]):
        return "image.bytes"
    raise SettingError(
        f"{place} needs a column image, binary or struct<bytes: binary, path: string>; "
        f"its columns are {', '.join(f'{field.name}: {field.type}' for field in schema)}"
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _encoded(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The encoded bytes of an image column; null where the image or its bytes are."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


class ParquetImages:
    """Encoded images in Parquet files below one folder.

    No file stays open and the caches hold no lock while they load, so a fork finds none taken.

    Args:
        root: Folder that the paths are relative to.
        in_memory: Whether whole files are kept once one of their images is read; else the last two
            row groups are.
    """

    def __init__(self, root: str | Path, in_memory: bool) -> None:
        self._root, self._in_memory = Path(root), in_memory
        self._whole = lru_cache(maxsize=None)(self._load_file)
        self._group_starts = lru_cache(maxsize=None)(self._load_group_starts)
        self._group = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._load_group)

    def warm(self, paths: Iterable[str]) -> None:
        """Load whole files; does nothing unless they are kept in memory.

        Args:
            paths: The files, relative to the root.

        Raises:
            MissingError: A file is gone.
            DamageError: A file is damaged.
        """
        if self._in_memory:
            for path in paths:
                self._whole(path)

    def read(self, path: str, row: int) -> bytes:
        """The encoded image in a row; empty where it is null.

        Args:
            path: The file, relative to the root.
            row: Row of the file, from 0.

        Raises:
            MissingError: The file is gone.
            DamageError: The file is damaged, or has fewer rows.
        """
        column, first = self._column_with(path, row)
        if row - first >= len(column):
            raise DamageError(
                f"{self._root / path} has fewer rows than when it was listed: list the data again"
            )
        data: bytes | None = column[row - first].as_py()
        return data or b""

    def _column_with(self, path: str, row: int) -> tuple[pa.ChunkedArray, int]:
        """Images around a row, and the row that they begin with; none if there is no such row."""
        if self._in_memory:
            return self._whole(path), 0
        starts = self._group_starts(path)
        if row >= starts[-1]:
            return pa.chunked_array([], pa.binary()), 0
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return self._group(path, group), int(starts[group])

    def _load_file(self, path: str) -> pa.ChunkedArray:
        with _opened(self._root / path) as file:
            columns = [_image_column(file, self._root / path)]
            return _encoded(file.read(columns=columns, use_threads=False)["image"])

    def _load_group_starts(self, path: str) -> NDArray[np.int64]:
        """First row of each row group, then the number of rows."""
        with _opened(self._root / path) as file:
            groups = range(file.num_row_groups)
            counts = [file.metadata.row_group(group).num_rows for group in groups]
        return np.cumsum([0, *counts])

    def _load_group(self, path: str, group: int) -> pa.ChunkedArray:
        with _opened(self._root / path) as file:
            columns = [_image_column(file, self._root / path)]
            table = file.read_row_group(group, columns=columns, use_threads=False)
            return _encoded(table["image"])
