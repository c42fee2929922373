import random
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from semmae.errors import DamageError, MissingError, SettingError, UserError
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.watching import Tell
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.store_care import RepairPartsOptions, repair_parts, verify_parts
from semmae.tests.world import World, lasting_bytes


@pytest.fixture
def store(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.store, tmp_path / "store"))


def commits_written(store: Path) -> dict[str, int]:
    return {place.name: place.stat().st_mtime_ns for place in (store / "commits").iterdir()}


def test_verify_parts__finds_nothing_in_a_sound_store(world: World) -> None:
    assert verify_parts(world.store) == []


def test_repair_parts__does_exactly_the_damaged_shards_again(store: Path, world: World) -> None:
    before = commits_written(store)
    (store / "meta/part-00001.parquet").unlink()
    assert [fault.name for fault in verify_parts(store)] == ["meta/part-00001.parquet"]
    assert [fault.name for fault in repair_parts(RepairPartsOptions(parts=store))] == [
        "meta/part-00001.parquet"
    ]
    assert verify_parts(store) == []
    assert lasting_bytes(store) == lasting_bytes(world.store)
    after = commits_written(store)
    assert {name for name in after if after[name] != before[name]} == {"00001.json"}


def test_repair_parts__mends_a_flip_anywhere(store: Path, world: World) -> None:
    rng = random.Random(1)
    sound = lasting_bytes(world.store)
    for name, data in sound.items():
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (store / name).write_bytes(damaged)
        assert name in [fault.name for fault in verify_parts(store)]
        repair_parts(RepairPartsOptions(parts=store))
        assert lasting_bytes(store) == sound, name


def test_repair_parts__says_what_to_do_with_a_folder_in_the_place_of_an_object(
    store: Path, world: World
) -> None:
    place = store / "meta/part-00001.parquet"
    place.unlink()
    place.mkdir()
    assert [str(fault) for fault in verify_parts(store)] == ["meta/part-00001.parquet is a folder"]
    with pytest.raises(
        UserError, match=r"part-00001\.parquet: Is a directory; move away the folder"
    ):
        repair_parts(RepairPartsOptions(parts=store))
    place.rmdir()
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_repair_parts__mends_a_lost_record_of_the_plan(store: Path, world: World) -> None:
    (store / "plan.json").unlink()
    assert verify_parts(store)[0].name == "plan.json"
    (store / "stray").touch()
    with pytest.raises(DamageError, match=r"1 files that are not its own \(stray\)"):
        repair_parts(RepairPartsOptions(parts=store))
    (store / "stray").unlink()
    assert lasting_bytes(store) == lasting_bytes(world.store)


@pytest.mark.parametrize("harm", ["altered", "deleted"])
def test_verify_parts__checks_the_shards_where_the_plan_is_lost(
    store: Path, world: World, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if harm == "deleted":
        (store / "plan.json").unlink()
    else:
        record = (store / "plan.json").read_bytes()
        (store / "plan.json").write_bytes(record.replace(b'"images": 72', b'"images": 73'))
    assert [fault.name for fault in verify_parts(store)] == ["plan.json"]
    assert "without a sound plan.json, shards are compared" in capsys.readouterr().err
    (store / "meta/part-00000.parquet").unlink()
    labels = store / "parts.zarr/labels/c/1/0/0"
    labels.write_bytes(labels.read_bytes()[:-1] + b"?")
    (store / "commits/00002.json").unlink()
    assert {str(fault) for fault in verify_parts(store)[1:]} == {
        "meta/part-00000.parquet is missing",
        "parts.zarr/labels/c/1/0/0 has a wrong checksum",
        "commits/00002.json is missing: the shard is not committed",
    }
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_verify_parts__without_plan_and_complete_record_checks_what_is_committed(
    store: Path,
) -> None:
    (store / "plan.json").write_bytes(b"?")
    (store / "complete.json").write_bytes(b"?")
    shutil.copy(store / "commits/00000.json", store / "commits/00001.json")
    (store / "parts.zarr/labels/c/2/0/0").unlink()
    (store / "commits/notes.json").touch()
    assert [fault.name for fault in verify_parts(store)] == [
        "plan.json",
        "complete.json",
        "commits/00001.json",
        "parts.zarr/labels/c/2/0/0",
    ]


def test_repair_parts__ends_a_store_that_was_never_complete(world: World, tmp_path: Path) -> None:
    class BrokenOff(ExtractionWorker):
        def __call__(self, shard: int, tell: Tell = lambda images: None) -> Future[Record]:
            if shard:
                raise SettingError("broken off")
            return super().__call__(shard, tell)

    store = tmp_path / "store"
    options = ExtractPartsOptions(data=world.data, learner=world.learner, output=store)
    with pytest.raises(SettingError, match="broken off"):
        extract_parts(options, BrokenOff)
    assert verify_parts(store)
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_repair_parts__of_an_updated_store_takes_the_old_one_where_it_is_now(
    store: Path, world: World, tmp_path: Path
) -> None:
    new = ExtractPartsOptions(
        data=world.data, learner=world.learner, output=tmp_path / "new", update=store
    )
    extract_parts(new)
    sound = lasting_bytes(new.output)
    store.rename(tmp_path / "moved")
    (new.output / "commits/00001.json").unlink()
    repair_parts(RepairPartsOptions(parts=new.output, update=tmp_path / "moved"))
    assert lasting_bytes(new.output) == sound


def test_repair_parts__of_an_updated_store_whose_old_one_is_gone_says_the_ways_out(
    store: Path, world: World, tmp_path: Path
) -> None:
    new = ExtractPartsOptions(
        data=world.data, learner=world.learner, output=tmp_path / "new", update=store
    )
    extract_parts(new)
    shutil.rmtree(store)
    (new.output / "commits/00001.json").write_bytes(b"?")
    before = lasting_bytes(new.output)
    told = rf"{store}, which is gone, .*00001\.json.*by --update where .* --update {new.output}"
    with pytest.raises(MissingError, match=told):
        repair_parts(RepairPartsOptions(parts=new.output))
    assert lasting_bytes(new.output) == before
    # The other way out, as it is told.
    for name in ("complete.json", "commits/00001.json"):
        (new.output / name).unlink()
    again = replace(new, output=tmp_path / "newer", update=new.output)
    extract_parts(again)
    assert not verify_parts(again.output)


def test_repair_parts__of_sound_shards_needs_nothing_but_the_store(
    store: Path, world: World, tmp_path: Path
) -> None:
    new = ExtractPartsOptions(
        data=world.data, learner=world.learner, output=tmp_path / "new", update=store
    )
    extract_parts(new)
    sound = lasting_bytes(new.output)
    shutil.rmtree(store)
    (new.output / "complete.json").unlink()
    repair_parts(RepairPartsOptions(parts=new.output))
    assert lasting_bytes(new.output) == sound


def test_repair_parts__leaves_foreign_files_and_names_them(store: Path) -> None:
    (store / "meta/notes.txt").write_text("mine")
    with pytest.raises(DamageError, match=r"1 files that are not its own \(meta/notes\.txt\)"):
        repair_parts(RepairPartsOptions(parts=store))
    assert (store / "meta/notes.txt").read_text() == "mine"


def test_repair_parts__takes_images_from_where_they_are_now(
    store: Path, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.data, tmp_path / "moved")
    (store / "commits/00000.json").unlink()
    repair_parts(RepairPartsOptions(parts=store, data=str(tmp_path / "moved")))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_repair_parts__what_is_no_setting_of_the_maker_is_refused(store: Path) -> None:
    (store / "commits/00000.json").unlink()
    with pytest.raises(SettingError, match="--labels is no setting"):
        repair_parts(RepairPartsOptions(parts=store, labels=Path("labels")))


def test_repair_parts__without_a_record_of_a_run_says_what_to_do(store: Path) -> None:
    (store / "commits/00000.json").unlink()
    shutil.rmtree(store / "runs")
    with pytest.raises(MissingError, match="run `semmae stage1 extract-parts`"):
        repair_parts(RepairPartsOptions(parts=store))
