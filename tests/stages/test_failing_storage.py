"""Stores on disks and mounts that fail, for a while or for good."""

import errno
import os
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semmae.errors import DamageError, MismatchError, MissingError, UnreadableError, UserError
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.watching import Tell
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.store_care import RepairPartsOptions, repair_parts, verify_parts
from semmae.storage import files, part_check
from semmae.storage.part_check import complete_store
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, lasting_bytes

KINDS = (
    "parts.zarr/labels/c/1/0/0",
    "parts.zarr/labels/zarr.json",
    "meta/part-00001.parquet",
    "commits/00001.json",
    "plan/part-00000.parquet",
    "plan.json",
    "complete.json",
)
"""One object of each kind that a store has."""


@pytest.fixture
def store(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.store, tmp_path / "store"))


def options_for(world: World, output: Path) -> ExtractPartsOptions:
    return ExtractPartsOptions(data=world.data, learner=world.learner, output=output)


def lose(store: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse to read a file, until there is another one in its place."""
    plain, lost = Path.open, store.with_name(name.replace("/", "-"))
    lost.hardlink_to(store / name)  # so that its inode is given to no other file

    def open_(self: Path, *rest: Any, **options: Any) -> Any:
        if self == store / name and self.exists() and self.samefile(lost):
            raise OSError(number, os.strerror(number), str(self))
        return plain(self, *rest, **options)

    monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", KINDS)
def test_extract_parts__storage_that_fails_for_a_while_costs_nothing(
    world: World, store: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(store, name, number, monkeypatch)
    with pytest.raises(UnreadableError, match=f"{name} cannot be read .*run again"):
        extract_parts(options_for(world, store))
    with pytest.raises(UnreadableError, match=f"{name} cannot be read .*run again"):
        complete_store(store)
    monkeypatch.undo()
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_extract_parts__rows_of_earlier_that_cannot_be_read_are_not_passed_over(
    world: World, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "commits/00001.json").unlink()
    lose(store, "meta/part-00001.parquet", errno.EIO, monkeypatch)
    with pytest.raises(UnreadableError, match=r"meta/part-00001\.parquet cannot be read now"):
        extract_parts(options_for(world, store))
    assert not (store / "commits/00001.json").exists()


def test_extract_parts__a_mount_that_is_away_for_a_moment_costs_nothing(
    world: World, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = files.damage_of, list[Path]()

    def damage_of(path: Path, description: Any) -> str | None:
        asked.append(path)
        return "is missing" if len(asked) < 4 else plain(path, description)

    monkeypatch.setattr(part_check, "damage_of", damage_of)
    extract_parts(options_for(world, store), lambda settings: 1 / 0)  # type: ignore[arg-type,return-value]
    assert len(asked) > 4
    assert lasting_bytes(store) == lasting_bytes(world.store)


def unmount(store: Path) -> None:
    """Leave what a lost mount leaves: an empty folder."""
    store.rename(store.with_name("elsewhere"))
    store.mkdir()


def test_extract_parts__a_mount_that_is_lost_while_it_is_checked_is_told(
    world: World, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = files.damage_of

    def damage_of(path: Path, description: Any) -> str | None:
        if any(store.iterdir()):
            unmount(store)
        return plain(path, description)

    monkeypatch.setattr(part_check, "damage_of", damage_of)
    with pytest.raises(MissingError, match=r"is gone: .*still mounted"):
        extract_parts(options_for(world, store))
    assert not list(store.iterdir())
    assert lasting_bytes(store.with_name("elsewhere")) == lasting_bytes(world.store)


def test_extract_parts__a_mount_that_is_lost_between_shards_is_told_and_not_written_to(
    world: World, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    class Loses(ExtractionWorker):
        def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
            if shard == 1:
                self._writer.wait()
                unmount(store)
            return super().__call__(shard, tell)

    with pytest.raises(MissingError, match=r"is gone: .*still mounted"):
        extract_parts(options_for(world, store), Loses)
    assert not list(store.iterdir())
    assert (tmp_path / "elsewhere/commits/00000.json").exists()


def test_extract_parts__says_whether_the_store_is_a_new_one(
    world: World, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "commits/00001.json").unlink()
    extract_parts(options_for(world, store))
    assert f"{store}: goes on, 2 of 3 shards\n" in capsys.readouterr().err
    unmount(store)
    extract_parts(options_for(world, store))
    assert f"{store}: begins a new store of 3 shards\n" in capsys.readouterr().err


def test_extract_parts__tells_progress_while_it_reads_the_store(
    world: World, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "commits/00001.json").unlink()
    extract_parts(options_for(world, store))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("checking: ")]
    assert [line.split()[1] for line in told] == ["2/2", "3/3"]


# For good.


def test_extract_parts__goes_on_past_an_image_that_its_disk_has_lost_and_takes_it_in_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    key = (
        "train/"
        + sorted(
            file.relative_to(Path(world.data, "train")).as_posix()
            for file in Path(world.data, "train").rglob("*.png")
        )[40]
    )
    for number, name in ((errno.EIO, "store"), (errno.EUCLEAN, "again")):
        with monkeypatch.context() as patch:
            lose(Path(world.data), key, number, patch)
            assert extract_parts(options_for(world, tmp_path / name))["bad"] == 1
            (Path(world.data).with_name(key.replace("/", "-"))).unlink()
    store = tmp_path / "store"
    assert lasting_bytes(store) == lasting_bytes(tmp_path / "again")
    row = PartStore.open(store).meta().to_pylist()[40]
    told = [row[name] for name in ("key", "error_code", "error_kind", "error", "crc32")]
    assert told == [key, "unreadable", "OSError", "its disk has lost it", 0]
    (store / "parts.zarr/labels/c/1/0/0").unlink()
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_extract_parts__counts_lost_images_over_all_shards_of_a_worker(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    data = shutil.copytree(world.data, tmp_path / "images")
    keys = [image.relative_to(data).as_posix() for image in sorted(data.rglob("train/*/*.png"))]
    for key in keys[::8]:
        lose(data, key, errno.EIO, monkeypatch)
    assert len(keys[::8]) == 9
    told = rf"has lost 9 images \(.*{keys[64]}\), too many .*move those"
    with pytest.raises(UserError, match=told):
        extract_parts(replace(options_for(world, tmp_path / "store"), data=str(data)))
    assert len(list((tmp_path / "store/commits").iterdir())) == 2


def test_extract_parts__an_image_lost_after_its_meta_rows_were_written_can_be_done_without(
    world: World, store: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    image = sorted(Path(world.data, "train").rglob("*.png"))[40]
    (store / "commits/00001.json").unlink()
    lose(Path(world.data), image.relative_to(world.data).as_posix(), errno.EIO, monkeypatch)
    with pytest.raises(MismatchError, match=r"1 images cannot be read now .*or remove that file"):
        extract_parts(options_for(world, store))
    (store / "meta/part-00001.parquet").unlink()
    assert extract_parts(options_for(world, store))["bad"] == 1


def test_extract_parts__a_lost_disk_ends_the_run_and_leaves_no_bad_rows(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    plain = Path.open

    def open_(self: Path, *rest: Any, **options: Any) -> Any:
        if self.is_relative_to(world.data) and self.suffix == ".png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return plain(self, *rest, **options)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(UserError, match="does not answer: 5 tries"):
        extract_parts(options_for(world, tmp_path / "store"))
    assert not list((tmp_path / "store").glob("meta/*"))


@pytest.mark.parametrize("name", KINDS)
def test_repair_parts__makes_anew_what_a_disk_has_lost(
    world: World, store: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(store, name, errno.EIO, monkeypatch)
    assert f"{name} cannot be read (Input/output error)" in map(str, verify_parts(store))
    with pytest.raises(UserError):
        extract_parts(options_for(world, store))
    repair_parts(RepairPartsOptions(parts=store))
    assert verify_parts(store) == []
    assert lasting_bytes(store) == lasting_bytes(world.store)


@pytest.mark.parametrize(
    ("names", "number"),
    [
        (["meta/part-00001.parquet"], errno.ESTALE),
        (["plan.json", "complete.json"], errno.EIO),
    ],
)
def test_repair_parts__removes_nothing_where_the_storage_fails(
    world: World,
    store: Path,
    names: list[str],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in names:
        lose(store, name, number, monkeypatch)
    with pytest.raises(UnreadableError, match="cannot be read now"):
        repair_parts(RepairPartsOptions(parts=store))
    monkeypatch.undo()
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_part_store__what_cannot_be_read_is_not_called_damaged(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(store, "parts.zarr/labels/c/1/0/0", errno.EIO, monkeypatch)
    with pytest.raises(UnreadableError) as caught:
        PartStore.open(store).shard("labels", 1)
    assert not isinstance(caught.value, DamageError)
