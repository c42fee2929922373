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
from numpy.typing import ArrayLike, NDArray

#: One row an image. ``path`` is relative to the root, with ``/``; ``row`` is the row in a Parquet
#: file, -1 for a plain file; ``bytes`` the size of the encoded image; ``label`` -1 where none is.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
    ]
)

# Part of what is hashed: a change of the layout below must change every fingerprint.
_FINGERPRINT_LAYOUT = b"semmae plan 1"


@dataclass(frozen=True)
class Plan:
    """The images of a data set in their one order: by path (bytewise), then by row.

    Args:
        root: Folder that the paths are relative to; not part of the fingerprint.
        table: The rows, of `PLAN_SCHEMA`, ``index`` counting from 0.
        class_names: Name of each label, in label order; empty where there are no labels.

    Raises:
        ValueError: The table has another schema, is out of order, holds an image twice, or a label
            has no name.
    """

    root: str
    table: pa.Table
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.table.schema.equals(PLAN_SCHEMA):
            raise ValueError(
                f"a plan's table needs the schema\n{PLAN_SCHEMA}\nbut has\n{self.table.schema}"
            )
        if not np.array_equal(self._numbers("index"), np.arange(len(self))):
            raise ValueError("a plan's index must count its rows from 0 in order")
        position = _first_disorder(self.table)
        if position is not None:
            raise ValueError(
                f"a plan must be in ascending order of path and row: {self.keys[position]!r} "
                f"stands before {self.keys[position + 1]!r}"
            )
        wrong = (self.labels < -1) | (self.labels >= len(self.class_names))
        if wrong.any():
            position = int(wrong.argmax())
            raise ValueError(
                f"label {self.labels[position]} of {self.keys[position]!r} is not within -1 (none) "
                f"to {len(self.class_names) - 1}, the last of {len(self.class_names)} class names"
            )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> NDArray[np.object_]:
        """Key of each image: its path, in Parquet ``path#row``; str objects of shape (N,)."""
        keys: NDArray[np.object_] = self.table["key"].to_numpy()
        return keys

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, -1 where there is none; int64 of shape (N,)."""
        return self._numbers("label")

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each encoded image; int64 of shape (N,)."""
        return self._numbers("bytes")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over key, bytes and label of all rows in order.

        It does not depend on where the root lies nor on how the table is chunked.
        """
        digest = hashlib.sha256(_FINGERPRINT_LAYOUT)
        keys = self.table["key"].combine_chunks().cast(pa.large_binary())
        ends = np.frombuffer(keys.buffers()[1], dtype="<i8")[keys.offset :][: len(keys) + 1]
        lengths = np.diff(ends)
        for numbers in (np.array([len(self)]), lengths, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8"))
        if lengths.sum() > 0:
            digest.update(memoryview(keys.buffers()[2])[ends[0] : ends[-1]])
        return digest.hexdigest()

    def _numbers(self, column: str) -> NDArray[np.int64]:
        numbers: NDArray[np.int64] = self.table[column].to_numpy()
        return numbers


def make_plan(
    root: str,
    *,
    paths: Sequence[str] | NDArray[np.object_],
    rows: ArrayLike,
    sizes: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str] = (),
) -> Plan:
    """Sort and number images into a plan.

    Args:
        root: Folder that the paths are relative to.
        paths: File of each image, relative to ``root``, with ``/``; N of them in any order.
        rows: Row in its Parquet file of each image, -1 for a plain file; integers of shape (N,).
        sizes: Bytes of each encoded image; integers of shape (N,).
        labels: Class of each image, -1 for none; integers of shape (N,).
        class_names: Name of each label.

    Returns:
        The plan, in bytewise order of paths, then of rows.

    Raises:
        UnicodeEncodeError: A path is not text that UTF-8 can hold.
        ValueError: An image is there twice, or a label has no name.
    """
    columns: dict[str, Any] = {
        "path": pa.array(paths, pa.string()),
        "row": np.asarray(rows, dtype=np.int64),
        "bytes": np.asarray(sizes, dtype=np.int64),
        "label": np.asarray(labels, dtype=np.int64),
    }
    table = pa.table(columns)
    table = table.sort_by([("path", "ascending"), ("row", "ascending")]).combine_chunks()
    in_file = pc.binary_join_element_wise(table["path"], table["row"].cast(pa.string()), "#")
    columns = {name: table[name] for name in table.column_names}
    columns["index"] = np.arange(table.num_rows, dtype=np.int64)
    columns["key"] = pc.if_else(pc.less(table["row"], 0), table["path"], in_file)
    ordered = [columns[name] for name in PLAN_SCHEMA.names]
    return Plan(root, pa.table(ordered, schema=PLAN_SCHEMA), tuple(class_names))


def plan_of_rows(root: str, table: pa.Table, class_names: Sequence[str]) -> Plan:
    """A plan of some neighbouring rows of another, numbered from 0.

    Args:
        root: Folder that the paths are relative to.
        table: The rows, of `PLAN_SCHEMA`, in order.
        class_names: Name of each label.
    """
    numbers = pa.array(np.arange(table.num_rows, dtype=np.int64))
    return Plan(root, table.set_column(0, PLAN_SCHEMA.field("index"), numbers), tuple(class_names))


def _first_disorder(table: pa.Table) -> int | None:
    """Position of the first row that does not come before the next one, None if all do."""
    before, after = table.slice(0, max(len(table) - 1, 0)), table.slice(1)
    same_file = pc.equal(before["path"], after["path"])
    ascending = pc.or_(
        pc.less(before["path"], after["path"]),
        pc.and_(same_file, pc.less(before["row"], after["row"])),
    )
    position = pc.index(ascending, False).as_py()
    return None if position < 0 else int(position)
