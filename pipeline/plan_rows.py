"""The rows of a plan: listed in any order, sorted in memory, or in a file where they are many.

A listing is sorted in runs of `RUN_ROWS` rows.  One run is the plan as it is; several are
kept in temporary files and merged, so that memory does not grow with the number of images.
"""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from ..storage.table_streams import in_lengths, in_step

#: One row an image.  ``path`` is relative to the root, with ``/``; ``row`` is the row in a Parquet
#: file or the position among the images of a tar, -1 for a plain file; ``offset`` is where the
#: encoded image begins in its tar, -1 elsewhere; ``bytes`` the size of the encoded image; ``label``
#: -1 where none is.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
    ]
)
_LISTED_SCHEMA = PLAN_SCHEMA.remove(PLAN_SCHEMA.get_field_index("index"))
_ORDER = [("path", "ascending"), ("row", "ascending")]

RUN_ROWS = 1 << 21
"""Rows that are sorted at once, and the most that a plan keeps in memory.

Of 1.3 million images, a run's start takes 3.1 s in one run and 4.7 s in runs of 2^18, which would
save 0.25 GB.  10 million rows took 3.6 GB in one run, 1.2 GB in five."""

TABLE_ROWS = 1 << 14
"""Rows of a plan that are read at once."""


def listed_rows(
    paths: Any,
    rows: ArrayLike,
    sizes: ArrayLike,
    labels: ArrayLike,
    members: Any = None,
    offsets: ArrayLike | None = None,
) -> pa.Table:
    """Some images of a data set, in any order.

    Args:
        paths: File of each image, relative to the root of the data, with ``/``; n strings, as a
            sequence or of Arrow.
        rows: Row in its Parquet file, or position in its tar, of each image, -1 for a plain file;
            integers of shape (n,).
        sizes: Bytes of each encoded image; integers of shape (n,).
        labels: Class of each image, -1 for none; integers of shape (n,).
        members: Name of each image in its tar, as ``paths``; None where there are no tars.
        offsets: Where each image begins in its tar, integers of shape (n,); with ``members``.

    Returns:
        The columns of `PLAN_SCHEMA` but ``index``.

    Raises:
        UnicodeEncodeError: A path is not text that UTF-8 can hold.
    """
    path, row = _strings(paths), pa.array(np.asarray(rows, dtype=np.int64))
    columns = {
        "key": path if pc.all(pc.less(row, 0)).as_py() else _keys(path, row, members),
        "path": path,
        "row": row,
        "offset": np.asarray(np.full(len(row), -1) if offsets is None else offsets, np.int64),
        "bytes": np.asarray(sizes, dtype=np.int64),
        "label": np.asarray(labels, dtype=np.int64),
    }
    return pa.table(columns, schema=_LISTED_SCHEMA)


def _keys(path: Any, row: pa.Array, members: Any) -> Any:
    inside = row.cast(pa.string()) if members is None else _strings(members)
    return pc.if_else(pc.less(row, 0), path, pc.binary_join_element_wise(path, inside, "#"))


def _strings(values: Any) -> pa.Array | pa.ChunkedArray:
    arrow = isinstance(values, pa.Array | pa.ChunkedArray)
    return values if arrow else pa.array(values, pa.string())


class FiledRows(Sequence[pa.Table]):
    """Rows of a plan in a file, as tables of `TABLE_ROWS` rows that are read when asked for.

    The file needs no name while it is open; pickled, the rows go into memory.

    Args:
        file: Where `_write` put them.
        columns: Those that are read; all by default.
    """

    def __init__(self, file: pa.NativeFile, columns: Sequence[str] | None = None) -> None:
        self._file = file
        schema = pa.ipc.open_file(file).schema
        self._columns = schema.names if columns is None else list(columns)
        fields = [schema.get_field_index(name) for name in self._columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        self._reader = pa.ipc.open_file(file, options=options)
        self.schema = pa.schema([schema.field(name) for name in self._columns])

    def __len__(self) -> int:
        return int(self._reader.num_record_batches)

    @overload
    def __getitem__(self, number: int) -> pa.Table: ...
    @overload
    def __getitem__(self, number: slice) -> list[pa.Table]: ...
    def __getitem__(self, number: int | slice) -> pa.Table | list[pa.Table]:
        numbers = range(len(self))[number]
        if isinstance(numbers, range):
            return [self[one] for one in numbers]
        return pa.Table.from_batches([self._reader.get_batch(numbers)]).select(self._columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return pa.concat_tables, (list(self),)

    @cached_property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return (len(self) - 1) * TABLE_ROWS + int(self[-1].num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return int(self._file.size())

    def select(self, columns: Sequence[str]) -> "FiledRows":
        """The same rows with some of the columns; the others are not read."""
        return FiledRows(self._file, columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as a whole."""
        return pa.concat_tables(self.select([name]))[name]

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Some rows, ascending; only the tables that hold them are read."""
        numbers = rows // TABLE_ROWS
        return pa.concat_tables(
            self[int(number)].take(pa.array(rows[numbers == number] % TABLE_ROWS))
            for number in np.unique(numbers)
        )


def sorted_rows(pieces: Iterable[pa.Table]) -> pa.Table | FiledRows:
    """Sort and number the images of a listing.

    Args:
        pieces: Tables of `listed_rows`; they are taken as they come, and not kept.

    Returns:
        The rows of `PLAN_SCHEMA` in bytewise order of paths, then of rows: in memory up to
        `RUN_ROWS`, else in a file without a name in the system's folder of temporary files.

    Raises:
        UserError: That folder cannot be written to.
    """
    runs = _runs(pieces)
    begun = deque(islice(runs, 2))
    if len(begun) < 2:
        return _numbered(begun[0] if begun else _LISTED_SCHEMA.empty_table(), 0)
    with _room_for_files():
        kept: list[FiledRows] = []
        while begun:
            kept.append(_written([begun.popleft()]))
            begun.extend(islice(runs, 1))
        return _written(_merged(kept))


def with_sizes(rows: pa.Table | FiledRows, sizes: NDArray[np.int64]) -> pa.Table | FiledRows:
    """The same rows with other sizes, kept as they were kept.

    Args:
        rows: Of `PLAN_SCHEMA`.
        sizes: Bytes of each encoded image, (N,).

    Raises:
        UserError: The folder of temporary files cannot be written to.
    """
    place = PLAN_SCHEMA.get_field_index("bytes")

    def sized(table: pa.Table, start: int) -> pa.Table:
        these = pa.array(sizes[start : start + table.num_rows])
        return table.set_column(place, PLAN_SCHEMA.field(place), these)

    if isinstance(rows, pa.Table):
        return sized(rows, 0)
    with _room_for_files():
        return _written(sized(table, number * TABLE_ROWS) for number, table in enumerate(rows))


@contextmanager
def _room_for_files() -> Iterator[None]:
    """Says what to do where files of long plans cannot be written.

    Raises:
        UserError: They cannot.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"the images are more than {RUN_ROWS}, so they are sorted in {tempfile.gettempdir()}, "
            f"which cannot be written to ({error.strerror or error}): free some space there, 50 "
            "bytes an image as a rule, or name another folder in the environment variable TMPDIR"
        ) from error


def _in_order(run: pa.Table) -> pa.Table:
    # Keys of plain files are their paths: held once, they are a quarter of the plan less.
    of_files = pc.all(pc.less(run["row"], 0)).as_py()
    whole = (run.drop_columns("key") if of_files else run).combine_chunks()
    # A listing as a rule comes in order, which is seen in a tenth of the time that sorting takes.
    ordered = whole if first_disorder(whole) is None else whole.sort_by(_ORDER)
    return (
        ordered.add_column(0, _LISTED_SCHEMA.field("key"), ordered["path"]) if of_files else ordered
    )


def first_disorder(table: pa.Table) -> int | None:
    """Position of the first row of a listing that is not before the next one, None if all are."""
    before, after = table.slice(0, max(len(table) - 1, 0)), table.slice(1)
    same_file = pc.equal(before["path"], after["path"])
    ascending = pc.or_(
        pc.less(before["path"], after["path"]),
        pc.and_(same_file, pc.less(before["row"], after["row"])),
    )
    position = pc.index(ascending, False).as_py()
    return None if position < 0 else int(position)


def _runs(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of a listing in sorted runs."""
    return map(_in_order, in_lengths(pieces, RUN_ROWS))


def _merged(runs: Sequence[FiledRows]) -> Iterator[pa.Table]:
    """The rows of sorted runs in one order, numbered."""
    together = (pa.concat_tables(tables).sort_by(_ORDER) for tables in in_step(runs))
    start = 0
    for table in in_lengths(together, TABLE_ROWS):
        yield _numbered(table, start)
        start += table.num_rows


def _numbered(table: pa.Table, start: int) -> pa.Table:
    index = pa.array(np.arange(start, start + table.num_rows, dtype=np.int64))
    return pa.table([index, *table.columns], schema=PLAN_SCHEMA)


def _written(tables: Iterable[pa.Table]) -> FiledRows:
    """Tables put into a file without a name, to be read again; a kill leaves nothing of it."""
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with tempfile.TemporaryFile() as file:
        place = f"/dev/fd/{file.fileno()}"
        with pa.OSFile(place, "wb") as sink:
            writer = None
            for table in tables:
                writer = writer or pa.ipc.new_file(sink, table.schema, options=options)
                writer.write_table(table.combine_chunks(), TABLE_ROWS)
            if writer is not None:
                writer.close()
        return FiledRows(pa.OSFile(place))
