"""Parquet files of images, as data sets lie on the Hugging Face hub: listed and read.

Column ``image`` is binary or ``struct<bytes: binary, ...>``, column ``label`` (optional) an
integer.  Page checksums are verified wherever a file has them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DamageError, MissingError, SettingError, UserError, first_line
from .archives import ArchiveIndex, require_classes
from .data_root import DataRoot
from .single_flight import SingleFlight

_ROWS_A_BATCH = 256
_CACHED_ROW_GROUPS = 2


def index_of_parquet(root: DataRoot, path: str, sizes: bool = True) -> ArchiveIndex:
    """The images of a Parquet file; its image column is read once, in pieces, for the sizes.

    Args:
        root: Folder that the path is relative to.
        path: The file.
        sizes: Whether sizes are wanted; else they are -1, and the image column is not read.

    Raises:
        MissingError: It cannot be opened.
        SettingError: A column is not as the head of this module says.
        DamageError: It is damaged.
        UserError: The storage does not answer.
    """
    with _opened(root, path) as file:
        column = _image_column(file, root.place(path))
        found = [np.full(0 if sizes else file.metadata.num_rows, -1, dtype=np.int64)]
        for batch in file.iter_batches(_ROWS_A_BATCH, columns=[column]) if sizes else ():
            lengths = pc.fill_null(pc.binary_length(_encoded(batch["image"])), 0)
            found.append(lengths.cast(pa.int64()).to_numpy(zero_copy_only=False))
    return ArchiveIndex(np.concatenate(found), labels_of_parquet(root, path))


def labels_of_parquet(root: DataRoot, path: str) -> NDArray[np.int64]:
    """Labels of one file, int64 of shape (rows,); -1 where there is none.

    Args:
        root: Folder that the path is relative to.
        path: The file.

    Raises:
        MissingError: It cannot be opened.
        SettingError: The label column is no class numbers.
        DamageError: It is damaged.
        UserError: The storage does not answer.
    """
    place = root.place(path)
    with _opened(root, path) as file:
        if "label" not in file.schema_arrow.names:
            return np.full(file.metadata.num_rows, -1, dtype=np.int64)
        column = file.read(columns=["label"], use_threads=False)["label"]
    if not pa.types.is_integer(column.type):
        raise SettingError(f"column label of {place} is {column.type}: expected integers")
    labels = np.asarray(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())
    require_classes(labels, f"column label of {place}")
    return labels


@contextmanager
def _opened(root: DataRoot, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose page checksums are verified; what goes wrong in it names the file."""
    place = root.place(path)
    try:
        with (
            root.open(path) as stream,
            pq.ParquetFile(
                stream,
                pre_buffer=False,
                buffer_size=root.read_ahead,
                page_checksum_verification=True,
            ) as file,
        ):
            yield file
    except UserError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(
            f"{place} cannot be opened: {error.strerror or 'no such file'}"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DamageError(
            f"{place} is not a sound Parquet file: fetch or write it again ({first_line(error)})"
        ) from error


def _image_column(file: pq.ParquetFile, place: str) -> str:
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

    No file stays open, and the caches are made for forks.  Threads that want the same row group at
    once share one read of it.

    Args:
        root: Folder that the paths are relative to; kept as an attribute.
        in_memory: Whether whole files are kept once one of their images is read; else the last two
            row groups are.
    """

    def __init__(self, root: DataRoot, in_memory: bool) -> None:
        self.root, self._in_memory = root, in_memory
        self._whole = SingleFlight(self._load_file)
        self._group_starts = SingleFlight(self._load_group_starts)
        self._group = SingleFlight(self._load_group, _CACHED_ROW_GROUPS)

    def warm(self, paths: Iterable[str]) -> None:
        """Load whole files; does nothing unless they are kept in memory.

        Args:
            paths: The files, relative to the root.

        Raises:
            MissingError: A file is gone.
            DamageError: A file is damaged.
            UserError: The storage does not answer.
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
            UserError: The storage does not answer.
        """
        column, first = self._column_with(path, row)
        if row - first >= len(column):
            raise DamageError(
                f"{self.root.place(path)} has fewer rows than when it was listed: list the data "
                "again"
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
        with _opened(self.root, path) as file:
            columns = [_image_column(file, self.root.place(path))]
            return _encoded(file.read(columns=columns, use_threads=False)["image"])

    def _load_group_starts(self, path: str) -> NDArray[np.int64]:
        """First row of each row group, then the number of rows."""
        with _opened(self.root, path) as file:
            groups = range(file.num_row_groups)
            counts = [file.metadata.row_group(group).num_rows for group in groups]
        return np.cumsum([0, *counts])

    def _load_group(self, path: str, group: int) -> pa.ChunkedArray:
        with _opened(self.root, path) as file:
            columns = [_image_column(file, self.root.place(path))]
            table = file.read_row_group(group, columns=columns, use_threads=False)
            return _encoded(table["image"])
