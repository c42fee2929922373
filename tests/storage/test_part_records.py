import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from semmae.errors import DamageError, MismatchError, MissingError
from semmae.storage import files, part_writer
from semmae.storage.part_records import object_names, read_commit, read_plan
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store

if TYPE_CHECKING:
    from .conftest import Example


def test_read_plan__gives_what_the_set_up_was_given(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "_PLAN_ROWS", 10)
    create_store(tmp_path, example.identity, example.plan, example.names)
    identity, plan, names = read_plan(tmp_path)
    assert identity.to_record() == example.identity.to_record()
    assert (plan.to_pydict(), names) == (example.plan.to_pydict(), example.names)


def test_read_plan__agrees_with_the_reader_of_a_complete_store(finished: Path) -> None:
    identity, plan, names = read_plan(finished)
    store = PartStore.open(finished)
    assert (identity, names) == (store.identity, store.class_names)
    assert plan.equals(store.plan())


def test_read_plan__refuses_what_is_no_sound_store(store: Path) -> None:
    with pytest.raises(MissingError, match=r"no plan\.json"):
        read_plan(store / "meta")
    place = store / "plan/part-00000.parquet"
    sound = place.read_bytes()
    place.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(DamageError, match=r"part-00000\.parquet"):
        read_plan(store)
    record = files.read_json(store / "plan.json")
    files.write_json(store / "plan.json", {**record, "version": 99})
    with pytest.raises(MismatchError, match="format version 99"):
        read_plan(store)


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
