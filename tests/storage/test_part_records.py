import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from semmae.errors import DamageError, MismatchError, MissingError
from semmae.storage import files, part_writer
from semmae.storage.part_records import object_names, plan_table, read_commit, read_set_up
from semmae.storage.part_writer import create_store

if TYPE_CHECKING:
    from .conftest import Example


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 43), (8, 16), (10, 30), (40, 43)])
def test_plan_table__gives_the_rows_asked_for(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int
) -> None:
    monkeypatch.setattr(part_writer, "PLAN_FILE_ROWS", 10)
    create_store(tmp_path, example.identity, example.plan, example.names)
    plan, identity = read_set_up(tmp_path)
    assert identity.to_record() == example.identity.to_record()
    assert tuple(plan["class_names"]) == example.names
    rows = plan_table(tmp_path, plan, start, stop)
    assert rows.to_pylist() == example.plan.to_pylist()[start:stop]


def test_plan_table__reads_only_the_files_that_hold_the_rows(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "PLAN_FILE_ROWS", 8)
    create_store(tmp_path, example.identity, example.plan, example.names)
    for number in (0, 1, 3, 4, 5):
        (tmp_path / f"plan/part-{number:05d}.parquet").unlink()
    plan, _ = read_set_up(tmp_path)
    assert plan_table(tmp_path, plan, 16, 24)["index"].to_pylist() == list(range(16, 24))
    with pytest.raises(DamageError, match=r"part-00001\.parquet is missing"):
        plan_table(tmp_path, plan, 15, 24)


def test_read_set_up__refuses_what_is_no_sound_store(store: Path) -> None:
    with pytest.raises(MissingError, match=r"no plan\.json"):
        read_set_up(store / "meta")
    place = store / "plan/part-00000.parquet"
    sound = place.read_bytes()
    place.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(DamageError, match=r"part-00000\.parquet"):
        plan_table(store, read_set_up(store)[0])
    record = files.read_json(store / "plan.json")
    files.write_json(store / "plan.json", {**record, "version": 99})
    with pytest.raises(MismatchError, match="format version 99"):
        read_set_up(store)


def test_object_names__are_the_files_of_all_shards(example: "Example", finished: Path) -> None:
    identity = example.identity
    names = [name for shard in range(identity.shards) for name in object_names(identity, shard)]
    arrays = [*(finished / "parts.zarr").glob("*/c/**/*"), *(finished / "meta").iterdir()]
    assert sorted(names) == sorted(
        place.relative_to(finished).as_posix() for place in arrays if place.is_file()
    )


def test_read_commit__refuses_the_record_of_another_shard(example: "Example", store: Path) -> None:
    shutil.copy(store / "commits/00002.json", store / "commits/00001.json")
    assert read_commit(store, example.identity, 2)["shard"] == 2
    with pytest.raises(DamageError, match="not that of shard 1"):
        read_commit(store, example.identity, 1)
    (store / "commits/00001.json").unlink()
    with pytest.raises(MissingError):
        read_commit(store, example.identity, 1)
