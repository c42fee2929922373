import pickle
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from semmae.errors import UserError
from semmae.pipeline import plan, plan_rows
from semmae.pipeline.plan import Plan
from semmae.pipeline.plan_matching import MATCHED, matches_of
from semmae.pipeline.plan_rows import FiledRows, listed_rows, sorted_rows

NAMES = ("cat", "dog")


def pieces(images: int, seed: int = 0) -> Iterator[pa.Table]:
    """Plain files, and two tars whose images lie scattered over the listing."""
    rng = random.Random(seed)
    numbers = list(range(images))
    rng.shuffle(numbers)
    for start in range(0, images, 7):
        some = numbers[start : start + 7]
        tar = [["", "b.tar", "n03.tar"][number % 3] for number in some]
        names = [f"ü{number % 5}/{number:03d}.jpg" for number in some]
        yield listed_rows(
            [held or name for held, name in zip(tar, names, strict=True)],
            rows=[number if held else -1 for held, number in zip(tar, some, strict=True)],
            sizes=[10 + number for number in some],
            labels=[number % 2 for number in some],
            members=names,
            offsets=[512 * number if held else -1 for held, number in zip(tar, some, strict=True)],
        )


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs of 16 rows, tables of 8, and a folder of temporary files of their own."""
    monkeypatch.setattr(plan_rows, "RUN_ROWS", 16)
    monkeypatch.setattr(plan_rows, "TABLE_ROWS", 8)
    monkeypatch.setattr(plan, "PLAN_FILE_ROWS", 8)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("images", [17, 32, 33, 150])
def test_plan__is_the_same_in_memory_and_in_a_file(images: int, short_runs: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_rows, "RUN_ROWS", 1000)
        short = Plan("/data", sorted_rows(pieces(images)), NAMES)
    long = Plan("/data", sorted_rows(pieces(images)), NAMES)
    assert isinstance(long.rows, FiledRows)
    assert isinstance(short.rows, pa.Table)
    assert list(short_runs.iterdir()) == []
    assert (len(long), long.fingerprint) == (images, short.fingerprint)
    assert long.table.equals(short.table)
    assert long.keys.tolist() == short.keys.tolist()
    assert long.labels.tolist() == short.labels.tolist()
    assert long.sizes.tolist() == short.sizes.tolist()
    assert long.total_bytes == short.total_bytes == sum(range(10, 10 + images))
    assert pa.concat_tables(long.tables(["label", "key"])).equals(
        short.table.select(["label", "key"])
    )
    rows = np.unique(np.linspace(0, images - 1, 5).astype(int))
    assert long.take(rows).equals(short.take(rows))
    assert long.key(9) == short.keys[9]
    assert pickle.loads(pickle.dumps(long)).table.equals(short.table)


def test_sorted_rows__keys_of_plain_files_are_their_paths_and_held_once() -> None:
    files = listed_rows(["b", "c", "a"], [-1] * 3, [1] * 3, [-1] * 3)
    rows = sorted_rows([files.slice(0, 1), files.slice(1)])
    assert isinstance(rows, pa.Table)
    assert rows["key"].to_pylist() == rows["path"].to_pylist() == ["a", "b", "c"]
    key, path = (rows[name].chunk(0).buffers()[2].address for name in ("key", "path"))
    assert key == path


def test_sorted_rows__has_no_named_file_that_a_kill_would_leave(short_runs: Path) -> None:
    def watched() -> Iterator[pa.Table]:
        for piece in pieces(150):
            assert list(short_runs.iterdir()) == []
            yield piece

    assert sorted_rows(watched()).num_rows == 150


def test_plan__in_a_file_refuses_an_image_twice_and_labels_without_a_name(short_runs: Path) -> None:
    twice = [*pieces(40), listed_rows(["b.tar"], [1], [3], [0], ["again.jpg"], [0])]
    with pytest.raises(ValueError, match=r"again.jpg' stands before|stands before '.*again.jpg"):
        Plan("/data", sorted_rows(twice), NAMES)
    with pytest.raises(ValueError, match="label 1 of"):
        Plan("/data", sorted_rows(pieces(40)), NAMES[:1])


def test_sorted_rows__sorts_only_what_is_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a-b/0.jpg", "a/1.jpg", "a/2.jpg", "b/0.jpg"]

    def rows_of(order: list[str]) -> pa.Table:
        count = len(order)
        listed = [listed_rows([name], [-1], [5], [-1]) for name in order]
        rows = sorted_rows(listed)
        assert isinstance(rows, pa.Table)
        assert rows["index"].to_pylist() == list(range(count))
        return rows

    scattered = rows_of([names[2], names[0], names[3], names[1]])
    assert scattered["path"].to_pylist() == scattered["key"].to_pylist() == names
    monkeypatch.setattr(plan_rows, "_ORDER", [("no such column", "ascending")])
    with pytest.raises(pa.ArrowInvalid):
        rows_of(names[::-1])
    assert rows_of(names).equals(scattered)


def test_sorted_rows__says_where_there_is_no_room(
    short_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_runs / "gone"))
    assert len(sorted_rows(pieces(16))) == 16
    with pytest.raises(UserError, match=r"gone, which cannot be written to .*TMPDIR") as raised:
        sorted_rows(pieces(17))
    assert "\n" not in str(raised.value)


def test_matches_of__are_those_of_a_plain_search(short_runs: Path) -> None:
    wanted = Plan("/data", sorted_rows(pieces(60)), NAMES)
    kept = [key for key in wanted.keys if int(key[-7:-4]) % 4]
    mask = pa.array([key in kept for key in wanted.keys])
    held = plan.plan_of_rows("/data", wanted.table.filter(mask), NAMES)
    rows, sizes = matches_of(wanted.tables(MATCHED), held.tables(MATCHED), 60)
    found = {key: row for row, key in enumerate(held.keys)}
    assert rows.tolist() == [found.get(key, -1) for key in wanted.keys]
    assert sizes.tolist() == [
        size if key in found else -1
        for key, size in zip(wanted.keys, wanted.sizes.tolist(), strict=True)
    ]
    assert 0 < (rows < 0).sum() < 60
