import hashlib
import pickle
import struct
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.pipeline.plan import PLAN_SCHEMA, Plan
from semmae.pipeline.plan_rows import listed_rows, sorted_rows

Row = tuple[str, int, int, int]  # path, row, bytes, label

names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=6)
images = st.tuples(names, st.integers(-1, 200), st.integers(0, 1 << 40), st.integers(-1, 4))
data_sets = st.lists(images, max_size=30, unique_by=lambda row: row[:2])


def plan_of(rows: list[Row], root: str = "/data", classes: int = 5) -> Plan:
    paths, in_file, sizes, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    listed = listed_rows(list(paths), in_file, sizes, labels)
    return Plan(root, sorted_rows([listed]), tuple(f"class {label}" for label in range(classes)))


SMALL: list[Row] = [("b.jpg", -1, 7, 1), ("a.parquet", 10, 5, 0), ("a.parquet", 9, 6, -1)]


@settings(deadline=None)
@given(data_sets)
def test_sorted_rows__go_by_bytes_of_the_path_then_by_row(rows: list[Row]) -> None:
    plan = plan_of(rows)
    expected = sorted(rows, key=lambda row: (row[0].encode(), row[1]))
    columns = plan.table.to_pydict()
    assert columns["index"] == list(range(len(rows))) == list(range(len(plan)))
    found = zip(columns["path"], columns["row"], columns["bytes"], columns["label"], strict=True)
    assert list(found) == expected
    keys = [path if row < 0 else f"{path}#{row}" for path, row, _, _ in expected]
    assert columns["key"] == keys == plan.keys.tolist()
    assert plan.labels.tolist() == columns["label"]
    assert plan.sizes.tolist() == columns["bytes"]
    assert plan.table.schema.equals(PLAN_SCHEMA)


@settings(deadline=None)
@given(data_sets)
def test_fingerprint__is_the_hash_of_a_plain_loop(rows: list[Row]) -> None:
    plan = plan_of(rows)
    keys = [key.encode() for key in plan.keys]
    digest = hashlib.sha256(b"semmae plan 1" + struct.pack("<q", len(rows)))
    for key in keys:
        digest.update(struct.pack("<q", len(key)))
    for number in [*plan.sizes.tolist(), *plan.labels.tolist()]:
        digest.update(struct.pack("<q", number))
    for key in keys:
        digest.update(key)
    assert plan.fingerprint == digest.hexdigest()


@settings(deadline=None)
@given(data_sets, st.randoms())
def test_fingerprint__does_not_depend_on_order_root_or_chunks(rows: list[Row], random: Any) -> None:
    plan = plan_of(rows)
    random.shuffle(rows)
    moved = plan_of(rows, root="/elsewhere")
    half = len(rows) // 2
    pieces = pa.concat_tables([plan.table.slice(0, half), plan.table.slice(half)])
    assert moved.fingerprint == plan.fingerprint
    assert Plan("/data", pieces, plan.class_names).fingerprint == plan.fingerprint
    assert pickle.loads(pickle.dumps(plan)).fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        [("c.jpg", -1, 7, 1), *SMALL[1:]],
        [("b.jpg", -1, 8, 1), *SMALL[1:]],
        [("b.jpg", -1, 7, 2), *SMALL[1:]],
        [*SMALL[:2], ("a.parquet", 8, 6, -1)],
        SMALL[1:],
    ],
)
def test_fingerprint__changes_with_key_bytes_label_and_count(other: list[Row]) -> None:
    assert plan_of(other).fingerprint != plan_of(SMALL).fingerprint


def test_fingerprint__tells_where_one_key_ends() -> None:
    assert (
        plan_of([("ab", -1, 1, 0), ("c", -1, 1, 0)]).fingerprint
        != plan_of([("a", -1, 1, 0), ("bc", -1, 1, 0)]).fingerprint
    )


def test_fingerprint__of_a_slice_is_that_of_its_rows() -> None:
    rows: list[Row] = [(f"{i}.jpg", -1, i, 0) for i in range(5)]
    whole = plan_of(rows).table.slice(2)
    sliced = whole.set_column(0, PLAN_SCHEMA.field("index"), pa.array(range(3), pa.int64()))
    assert Plan("/data", sliced, ("class 0",)).fingerprint == plan_of(rows[2:]).fingerprint


def test_plan__refuses_an_image_twice() -> None:
    with pytest.raises(ValueError, match=r"'b.jpg' stands before 'b.jpg'"):
        plan_of([*SMALL, ("b.jpg", -1, 3, 0)])


@pytest.mark.parametrize("label", [-2, 5])
def test_plan__refuses_labels_without_a_name(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} of 'a.jpg' is not within -1"):
        plan_of([("a.jpg", -1, 1, label)])


def test_plan__refuses_tables_that_are_not_a_plan() -> None:
    plan = plan_of(SMALL)
    index = PLAN_SCHEMA.get_field_index("index")
    backwards = plan.table.take([2, 1, 0])
    renumbered = backwards.set_column(index, PLAN_SCHEMA.field(index), plan.table["index"])
    with pytest.raises(ValueError, match="index must count"):
        replace(plan, rows=backwards)
    with pytest.raises(ValueError, match="ascending order"):
        replace(plan, rows=renumbered)
    with pytest.raises(ValueError, match="needs the schema"):
        replace(plan, rows=plan.table.drop_columns(["label"]))
