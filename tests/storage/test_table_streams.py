from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.storage.table_streams import in_lengths, in_step

lengths = st.lists(st.integers(0, 7), max_size=8)
streams = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdefgh"), max_size=20), st.integers(1, 9)),
    min_size=1,
    max_size=4,
)


def tables_of(paths: list[str], rows: int) -> list[pa.Table]:
    """Sorted paths as tables, of which at least one."""
    whole = pa.table({"path": pa.array(sorted(paths), pa.string())})
    return [whole.slice(start, rows) for start in range(0, max(len(paths), 1), rows)]


@settings(deadline=None)
@given(lengths, st.integers(1, 9))
def test_in_lengths__keeps_rows_and_order(given_lengths: list[int], rows: int) -> None:
    whole = pa.table({"number": range(sum(given_lengths))})
    ends = [sum(given_lengths[:place]) for place in range(len(given_lengths))]
    pieces = [whole.slice(end, size) for end, size in zip(ends, given_lengths, strict=True)]
    found = list(in_lengths(pieces, rows))
    assert [number for table in found for number in table["number"].to_pylist()] == list(
        range(sum(given_lengths))
    )
    assert all(table.num_rows == rows for table in found[:-1])
    assert all(0 < table.num_rows <= rows for table in found)


@settings(deadline=None)
@given(streams)
def test_in_step__gives_each_path_of_all_streams_at_once(
    given: list[tuple[list[str], int]],
) -> None:
    seen: list[set[str]] = []
    found: list[list[str]] = [[] for _ in given]
    for tables in in_step([tables_of(*stream) for stream in given]):
        step = [table["path"].to_pylist() for table in tables]
        seen.append({path for paths in step for path in paths})
        for kept, paths in zip(found, step, strict=True):
            kept += paths
    assert found == [sorted(paths) for paths, _ in given]
    in_order = [path for step in seen for path in sorted(step)]
    assert in_order == sorted(set(in_order))


@pytest.mark.parametrize("other", [["a"], ["z"], [f"{number:04d}" for number in range(900)]])
def test_in_step__reads_no_further_than_it_must(other: list[str]) -> None:
    paths = [f"{number:04d}" for number in range(1000)]
    read = 0

    def counted() -> Iterator[pa.Table]:
        nonlocal read
        for table in tables_of(paths, 10):
            read += table.num_rows
            yield table

    given = 0
    for mine, _ in in_step([counted(), tables_of(other, 10)]):
        given += mine.num_rows
        assert read - given <= 20
    assert given == 1000
