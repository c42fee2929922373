"""The frozen plan: which images there are, in which order.

Everything that counts images (shards of the part store, the global permutation of an epoch, the
masks) counts positions in a plan, so a plan is sorted, checked and has a fingerprint.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..storage.table_streams import PLAN_FILE_ROWS
from .plan_rows import PLAN_SCHEMA, FiledRows, first_disorder

__all__ = ["PLAN_SCHEMA", "Plan", "plan_of_rows"]

# Part of what is hashed: a change of the layout below must change every fingerprint.
_FINGERPRINT_LAYOUT = b"semmae plan 1"


@dataclass(frozen=True)
class Plan:
    """The images of a data set in their one order: by path (bytewise), then by row.

    Args:
        root: Folder or URL that the paths are relative to; not part of the fingerprint.
        rows: The rows, of `PLAN_SCHEMA`, ``index`` counting from 0; in a file where they are many
            (`plan_rows.sorted_rows`).
        class_names: Name of each label, in label order; empty where there are no labels.

    Raises:
        ValueError: The rows have another schema, are out of order, hold an image twice, or a label
            has no name.
    """

    root: str
    rows: pa.Table | FiledRows
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows.schema.equals(PLAN_SCHEMA):
            raise ValueError(
                f"a plan's table needs the schema\n{PLAN_SCHEMA}\nbut has\n{self.rows.schema}"
            )
        before = PLAN_SCHEMA.empty_table()
        start = 0
        for table in self.tables():
            self._check(table, before, start)
            before = table.slice(table.num_rows - 1)
            start += table.num_rows

    def _check(self, table: pa.Table, before: pa.Table, start: int) -> None:
        """Refuse rows that cannot follow the one before, or begin a plan where that is none."""
        if not np.array_equal(table["index"], np.arange(start, start + table.num_rows)):
            raise ValueError("a plan's index must count its rows from 0 in order")
        joined = pa.concat_tables([before, table])
        position = first_disorder(joined)
        if position is not None:
            raise ValueError(
                "a plan must be in ascending order of path and row: "
                f"{joined['key'][position].as_py()!r} stands before "
                f"{joined['key'][position + 1].as_py()!r}"
            )
        labels = table["label"].to_numpy()
        wrong = (labels < -1) | (labels >= len(self.class_names))
        if wrong.any():
            position = int(wrong.argmax())
            raise ValueError(
                f"label {labels[position]} of {table['key'][position].as_py()!r} is not within -1 "
                f"(none) to {len(self.class_names) - 1}, the last of {len(self.class_names)} class "
                "names"
            )

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @cached_property
    def table(self) -> pa.Table:
        """All rows in memory, about 120 bytes an image."""
        return self.rows if isinstance(self.rows, pa.Table) else pa.concat_tables(self.rows)

    def tables(self, columns: Sequence[str] | None = None) -> Sequence[pa.Table]:
        """The rows in order, as tables of a limited length, in the memory of one of them.

        Args:
            columns: Those wanted; None for all.
        """
        rows = self.rows if columns is None else self.rows.select(columns)
        if isinstance(rows, FiledRows):
            return rows
        starts = range(0, len(self), PLAN_FILE_ROWS)
        return [rows.slice(start, PLAN_FILE_ROWS) for start in starts]

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Some rows of the plan, ascending int64."""
        if isinstance(self.rows, FiledRows):
            return self.rows.take(rows)
        return self.rows.take(pa.array(rows))

    def key(self, row: int) -> str:
        """Key of one image."""
        key: str = self.take(np.array([row]))["key"][0].as_py()
        return key

    @property
    def keys(self) -> NDArray[np.object_]:
        """Key of each image: its path, in Parquet ``path#row``, in a tar ``path#member``.

        Str objects of shape (N,).
        """
        keys: NDArray[np.object_] = self.rows.column("key").to_numpy()
        return keys

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, -1 where there is none; int64 of shape (N,)."""
        return self._numbers("label")

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each encoded image; int64 of shape (N,)."""
        return self._numbers("bytes")

    @property
    def total_bytes(self) -> int:
        """Bytes of all encoded images."""
        return sum(int(table["bytes"].to_numpy().sum()) for table in self.tables(["bytes"]))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over key, bytes and label of all rows in order.

        It does not depend on where the root lies, on offsets, nor on how the rows are kept.
        """
        digest = hashlib.sha256(_FINGERPRINT_LAYOUT)
        digest.update(_hashed(len(self)))
        for column, content in (
            ("key", lambda keys: _hashed(pc.binary_length(keys))),
            ("bytes", _hashed),
            ("label", _hashed),
            ("key", _characters),
        ):
            for table in self.tables([column]):
                digest.update(content(table[column].combine_chunks()))
        return digest.hexdigest()

    def _numbers(self, column: str) -> NDArray[np.int64]:
        numbers: NDArray[np.int64] = self.rows.column(column).to_numpy()
        return numbers


def _hashed(numbers: Any) -> NDArray[np.int64]:
    """Integers as they are hashed: 64 bits each, little-endian."""
    return np.ascontiguousarray(numbers, dtype="<i8")


def _characters(strings: pa.Array) -> memoryview:
    """The bytes of strings, one after another."""
    _, ends, characters = strings.buffers()
    first, last = np.frombuffer(ends, "<i4")[[strings.offset, strings.offset + len(strings)]]
    return memoryview(characters)[first:last] if last > first else memoryview(b"")


def plan_of_rows(root: str, table: pa.Table, class_names: Sequence[str]) -> Plan:
    """A plan of some rows of another, in its order, numbered from 0.

    Args:
        root: Folder that the paths are relative to.
        table: The rows, of `PLAN_SCHEMA`, in order.
        class_names: Name of each class.
    """
    numbers = pa.array(np.arange(table.num_rows, dtype=np.int64))
    return Plan(root, table.set_column(0, PLAN_SCHEMA.field("index"), numbers), tuple(class_names))
