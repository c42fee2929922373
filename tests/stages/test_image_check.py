"""Images that changed in place: found by reading them, and never mixed into a shard."""

import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semmae import cli
from semmae.errors import MismatchError
from semmae.pipeline.decoding import BadImage
from semmae.pipeline.image_loading import LoadedImage
from semmae.pipeline.sources import ImageReader
from semmae.stages import image_check
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.image_check import changed_images
from semmae.stages.import_parts import ImportPartsOptions, import_parts
from semmae.stages.store_care import RepairPartsOptions, repair_parts
from semmae.storage import part_writer
from semmae.storage.files import write_json
from semmae.storage.part_store import PartStore
from semmae.storage.store_paths import StorePath
from semmae.tests.world import World, lasting_bytes


@pytest.fixture
def store(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.store, tmp_path / "store"))


@pytest.fixture
def data(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.data, tmp_path / "images"))


@pytest.fixture
def keys(world: World) -> list[str]:
    found: list[str] = PartStore.open(world.store).meta(["key"])["key"].to_pylist()
    return found


def change(place: Path) -> bytes:
    """Give an image other bytes, as many as it has; those it had."""
    before = place.read_bytes()
    place.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def told(store: StorePath, data: Path) -> list[str]:
    return [str(image) for image in changed_images(store, str(data))]


# Reading them all.


@pytest.mark.parametrize("block", [512, 5])
def test_changed_images__names_each_that_is_gone_or_another(
    store: Path, data: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(image_check, "_BLOCK", block)
    assert told(store, data) == []
    change(data / keys[3])
    (data / keys[33]).unlink()
    (data / keys[34]).write_bytes(b"short")
    shutil.copy(data / keys[0], data / "train" / "one-more.png")
    (data / keys[71]).unlink()
    (data / keys[71]).mkdir()
    expected = {
        f"{keys[3]} has the same size and other content",
        f"{keys[33]} is not there",
        f"{keys[34]} has another size",
        f"{keys[71]} is not there",
    }
    assert set(told(store, data)) == expected
    assert len(told(store, data)) == len(expected)


def test_changed_images__passes_over_shards_that_are_damaged_or_not_done(
    store: Path, data: Path, keys: list[str]
) -> None:
    for index in (3, 40, 70):
        change(data / keys[index])
    (store / "commits/00000.json").unlink()
    (store / "meta/part-00001.parquet").write_bytes(b"?")
    assert told(store, data) == [f"{keys[70]} has the same size and other content"]


def test_changed_images__tells_bad_images_by_their_bytes_too(
    world: World, data: Path, keys: list[str], tmp_path: Path
) -> None:
    (data / keys[5]).write_bytes(b"no image")
    options = ExtractPartsOptions(data=str(data), learner=world.learner, output=tmp_path / "bad")
    extract_parts(options)
    assert told(options.output, data) == []
    change(data / keys[5])
    assert told(options.output, data) == [f"{keys[5]} has the same size and other content"]


def test_changed_images__in_a_tar_that_was_packed_anew(
    world: World, keys: list[str], tmp_path: Path
) -> None:
    def pack(names: list[str]) -> Path:
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
            for name in names:
                tar.add(tmp_path / name, arcname=name)
        return tmp_path / "tars"

    names = [f"{number:03d}.png" for number in range(40)]
    for name, key in zip(names, keys, strict=False):
        shutil.copy(Path(world.data) / key, tmp_path / name)
    options = ExtractPartsOptions(
        data=str(pack(names)), learner=world.learner, output=tmp_path / "of-tar"
    )
    extract_parts(options)
    change(tmp_path / names[7])
    packed = pack(names[::-1])
    assert told(options.output, packed) == [
        f"train-0.tar#{names[7]} has the same size and other content"
    ]


def test_changed_images__in_parquet(world: World, keys: list[str], tmp_path: Path) -> None:
    images = [(Path(world.data) / key).read_bytes() for key in keys[:40]]
    place = tmp_path / "some.parquet"

    def write() -> None:
        pq.write_table(pa.table({"image": [{"bytes": data} for data in images]}), place, 7)

    write()
    options = ExtractPartsOptions(
        data=str(place), learner=world.learner, output=tmp_path / "of-parquet"
    )
    extract_parts(options)
    assert told(options.output, place) == []
    images[38] = images[38][:-1] + b"!"
    write()
    assert told(options.output, place) == ["some.parquet#38 has the same size and other content"]


def test_parts_verify__with_data_names_what_changed_and_ends_as_a_mistake(
    store: Path,
    data: Path,
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verify() -> int:
        monkeypatch.setattr(
            sys, "argv", ["semmae", "parts", "verify", str(store), "--data", str(data)]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert verify() == 0
    assert f"to the byte, and its images are those in {data}" in capsys.readouterr().out
    change(data / keys[3])
    assert verify() == 1
    out, err = capsys.readouterr()
    assert out == f"{keys[3]} has the same size and other content\n"
    assert "semmae: 1 images in" in err
    assert f"extract-parts --update {store}" in err


# Never mixed into a shard.


def test_repair_parts__refuses_an_image_that_changed_in_place(
    world: World, store: Path, data: Path, keys: list[str]
) -> None:
    before = change(data / keys[40])
    (store / "parts.zarr/labels/c/1/0/0").unlink()
    repair = RepairPartsOptions(parts=store, data=str(data))
    with pytest.raises(MismatchError, match=rf"1 images .*part-00001\.parquet .* {keys[40]}"):
        repair_parts(repair)
    (data / keys[40]).write_bytes(before)
    repair_parts(repair)
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_repair_parts__takes_the_image_of_now_once_the_rows_of_then_are_removed(
    store: Path, data: Path, keys: list[str]
) -> None:
    change(data / keys[40])
    (store / "parts.zarr/labels/c/1/0/0").unlink()
    repair = RepairPartsOptions(parts=store, data=str(data))
    with pytest.raises(MismatchError, match="or remove that file"):
        repair_parts(repair)
    (store / "meta/part-00001.parquet").unlink()
    repair_parts(repair)
    assert told(store, data) == []


def test_repair_parts__does_an_image_that_can_be_read_again(
    world: World, data: Path, keys: list[str], tmp_path: Path
) -> None:
    options = ExtractPartsOptions(data=str(data), learner=world.learner, output=tmp_path / "out")

    class Denied(ExtractionWorker):
        @staticmethod
        def load(reader: ImageReader, index: int, *args: Any, **told: Any) -> LoadedImage:
            loaded = ExtractionWorker.load(reader, index, *args, **told)
            if reader.plan.key(index) != keys[40]:
                return loaded
            denied = BadImage("unreadable", "Permission denied")
            return loaded._replace(pixels=None, width=None, height=None, crc32=0, bad=denied)

    extract_parts(options, Denied)
    assert told(options.output, data) == [f"{keys[40]} can be read now, and could not be then"]
    (options.output / "parts.zarr/labels/c/1/0/0").unlink()
    repair_parts(RepairPartsOptions(parts=options.output))
    assert lasting_bytes(options.output) == lasting_bytes(world.store)


def test_repair_parts__of_an_image_that_cannot_be_read_now_advises_no_removal(
    world: World, store: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageReader.read

    def denied(reader: ImageReader, index: int) -> bytes:
        if reader.plan.key(index) == keys[40]:
            raise BadImage("unreadable", "Permission denied")
        return read(reader, index)

    monkeypatch.setattr(ImageReader, "read", denied)
    (store / "parts.zarr/labels/c/1/0/0").unlink()
    with pytest.raises(MismatchError, match=rf"such as {keys[40]} \(Permission denied\)") as told:
        repair_parts(RepairPartsOptions(parts=store))
    assert "remove" not in str(told.value)
    monkeypatch.undo()
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == lasting_bytes(world.store)


def test_verify__without_a_sound_plan_names_what_is_damaged(
    store: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "plan.json").write_text("{}")
    arguments = ["semmae", "parts", "verify", str(store), "--data", str(data)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code not in (0, None)
    out, err = capsys.readouterr()
    assert "plan.json" in out
    assert "the images are not compared" in err
    assert "parts repair" in err


def test_extract_parts__broken_off_before_a_commit_refuses_a_changed_image(
    world: World, data: Path, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExtractPartsOptions(data=str(data), learner=world.learner, output=tmp_path / "out")

    def stops(path: Path, record: dict[str, object]) -> None:
        if path.name == "00001.json":
            raise KeyboardInterrupt
        write_json(path, record)

    monkeypatch.setattr(part_writer, "write_json", stops)
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options)
    monkeypatch.undo()
    before = change(data / keys[40])
    with pytest.raises(MismatchError, match=keys[40]):
        extract_parts(options)
    (data / keys[40]).write_bytes(before)
    extract_parts(options)
    assert lasting_bytes(options.output) == lasting_bytes(world.store)


def test_import_parts__of_a_shard_done_again_refuses_a_changed_image(
    world: World, data: Path, keys: list[str], tmp_path: Path
) -> None:
    options = ImportPartsOptions(
        labels=world.labels, data=str(data), output=tmp_path / "true", grid="4"
    )
    import_parts(options)
    change(data / keys[40])
    import_parts(replace(options, output=tmp_path / "fresh"))
    (tmp_path / "true" / "commits" / "00001.json").unlink()
    with pytest.raises(MismatchError, match=keys[40]):
        import_parts(options)
