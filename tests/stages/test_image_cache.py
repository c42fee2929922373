"""Extraction with an image cache, and pretraining from it."""

import io
import json
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from semmae.errors import MismatchError, MissingError, SettingError
from semmae.pipeline.image_loading import LoadedImage
from semmae.pipeline.schedule import Draw
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.watching import Tell
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.import_parts import ImportPartsOptions, import_parts
from semmae.stages.pretrain import pretrain, pretraining_data
from semmae.stages.show import parts_info
from semmae.stages.store_care import RepairPartsOptions, repair_parts, verify_parts
from semmae.storage.part_check import complete_store, damaged_shards
from semmae.storage.part_identity import CacheFormat
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, lasting_bytes, pretrain_options

SIDE = 24


def options_for(world: World, output: Path, **changes: object) -> ExtractPartsOptions:
    plain = ExtractPartsOptions(
        data=world.data, learner=world.learner, output=output, cache_images=SIDE
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def jpeg_store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("jpeg") / "store"
    extract_parts(options_for(world, store, batch_size="16"))
    return store


@pytest.fixture(scope="module")
def raw_store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("raw") / "store"
    extract_parts(options_for(world, store, cache_format="raw"))
    return store


class Stops(ExtractionWorker):
    """A worker that breaks off in the middle of its second shard."""

    def __call__(self, shard: int, tell: Tell = lambda images: None) -> Future[Record]:
        self._batches = 1 if shard == 1 else 100
        return super().__call__(shard, tell)

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        if self._batches == 0:
            raise KeyboardInterrupt
        self._batches -= 1
        return super()._encode(loaded, precision)


def test_extract_parts__a_cache_is_the_same_after_an_interruption(
    world: World, jpeg_store: Path, tmp_path: Path
) -> None:
    options = options_for(world, tmp_path / "store", batch_size="16")
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options, Stops)
    left = [file.name for file in (tmp_path / "store/images").glob("[0-9]*")]
    assert left == ["00000.jpeg"]
    extract_parts(options)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(jpeg_store)


def test_extract_parts__a_cache_leaves_the_rest_of_the_store_alone(
    world: World, raw_store: Path
) -> None:
    plain, cached = lasting_bytes(world.store), lasting_bytes(raw_store)
    lasting = [name for name in plain if name.split("/")[0] in ("parts.zarr", "meta", "plan")]
    assert {name: cached[name] for name in lasting} == {name: plain[name] for name in lasting}


def test_extract_parts__keeps_each_image_small_and_none_of_a_bad_one(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    folder = sorted((data / "train").iterdir())[0]
    (folder / "a-text.jpg").write_bytes(b"not an image at all\n")
    wide = Image.effect_noise((90, 60), 40).convert("RGB")
    wide.save(folder / "b-wide.png")
    small = io.BytesIO()
    wide.resize((20, 30)).save(small, format="JPEG")
    (folder / "c-small.jpg").write_bytes(small.getvalue())
    for form in ("jpeg", "raw"):
        options = options_for(world, tmp_path / form, data=str(data), cache_format=form)
        extract_parts(options)
        store = PartStore.open(tmp_path / form)
        cache, keys = store.image_cache(), store.plan()["key"].to_pylist()
        rows = {Path(key).name: row for row, key in enumerate(keys)}
        with pytest.raises(MissingError, match="was bad"):
            cache.read(rows["a-text.jpg"])
        if form == "raw":
            wanted = np.asarray(wide.resize((36, 24), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(cache.read(rows["b-wide.png"]) - wanted).max() <= 3
        else:
            assert cache.read(rows["c-small.jpg"]).tobytes() == small.getvalue()
        pretraining = pretrain_options(world, tmp_path / f"run-{form}", data=str(data))
        pretraining = replace(pretraining, parts=tmp_path / form, images="cache")
        assert len(pretraining_data(pretraining)) == len(keys) - 1
        assert pretrain(pretraining).is_file()


def test_extract_parts__a_damaged_cache_is_found_and_mended(
    world: World, jpeg_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(jpeg_store, store)
    file = store / "images/00000.jpeg"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert damaged_shards(store) == {0}
    (store / "complete.json").unlink()
    extract_parts(options_for(world, store, batch_size="16"))
    assert lasting_bytes(store) == lasting_bytes(jpeg_store)


def test_extract_parts__another_cache_is_another_store(world: World, jpeg_store: Path) -> None:
    before = lasting_bytes(jpeg_store)
    options = options_for(world, jpeg_store, batch_size="16")
    for other in (
        replace(options, cache_images=0),
        replace(options, cache_images=25),
        replace(options, cache_format="raw"),
    ):
        with pytest.raises(MismatchError, match="image_cache"):
            extract_parts(other)
    assert lasting_bytes(jpeg_store) == before


def test_extract_parts__a_cache_is_made_of_rows_that_are_taken_over(
    world: World, raw_store: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    (sorted((data / "train").iterdir())[0] / "a-text.jpg").write_bytes(b"not an image at all\n")
    options = options_for(world, tmp_path / "old", data=str(data), cache_images=0)
    extract_parts(options)
    Image.new("RGB", (50, 40), (9, 99, 9)).save(data / "train" / "new.png")
    kept = replace(options, cache_images=SIDE, cache_format="raw")
    extract_parts(replace(kept, output=tmp_path / "fresh"))
    extract_parts(replace(kept, output=tmp_path / "updated", update=tmp_path / "old"))
    fresh, updated = lasting_bytes(tmp_path / "fresh"), lasting_bytes(tmp_path / "updated")
    images = {name for name in fresh if name.startswith("images/")}
    assert len(images) == 3
    assert all(fresh[name] == updated[name] for name in images)
    meta = PartStore.open(tmp_path / "updated").meta(["status"])["status"].to_pylist()
    assert meta.count("bad") == 1


def test_extract_parts__refuses_a_negative_side(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--cache-images is -1"):
        options_for(world, tmp_path, cache_images=-1)


def test_parts_info__says_what_is_kept(jpeg_store: Path, world: World) -> None:
    assert parts_info(jpeg_store)["image cache"] == f"jpeg, short side {SIDE}"
    assert parts_info(world.store)["image cache"] == "none"


def test_pretrain__from_a_raw_cache_sees_the_images_made_small(
    world: World, raw_store: Path, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, parts=raw_store, masking="semantic")
    draws = [Draw(index, 0, 0.5) for index in range(16)]
    cached = pretraining_data(replace(options, images="cache")).__getitems__(draws)
    data = pretraining_data(options).__getitems__(draws)
    # Boxes are rounded to the pixels of each; what is in a crop, and its parts, hardly move.
    off = (cached["images"].float() - data["images"].float()).abs().mean()
    shuffled = (cached["images"].float() - data["images"].roll(1, 0).float()).abs().mean()
    assert 0 < off < shuffled / 2
    assert (cached["mask"] == data["mask"]).float().mean() > 0.8


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_import_parts__keeps_the_images_as_an_extraction_does(
    world: World, jpeg_store: Path, raw_store: Path, tmp_path: Path, form: str
) -> None:
    extracted = lasting_bytes({"jpeg": jpeg_store, "raw": raw_store}[form])
    options = ImportPartsOptions(
        labels=world.labels, data=world.data, output=tmp_path / "true", grid="4", decode_threads=3
    )
    import_parts(options)
    kept = replace(
        options, output=tmp_path / "kept", cache_images=SIDE, cache_format=cast(CacheFormat, form)
    )
    import_parts(kept)
    plain, cached = lasting_bytes(tmp_path / "true"), lasting_bytes(tmp_path / "kept")
    images = {name for name in cached if name.startswith("images/")}
    assert len(images) == 3
    assert all(cached[name] == extracted[name] for name in images)
    others = {name for name in plain if name.split("/")[0] in ("parts.zarr", "meta", "plan")}
    assert all(cached[name] == plain[name] for name in others)
    with pytest.raises(MismatchError, match="image_cache"):
        import_parts(replace(kept, output=tmp_path / "true"))
    settings = pretrain_options(world, tmp_path / "run", parts=tmp_path / "kept", images="cache")
    assert pretrain(replace(settings, masking="semantic")).is_file()


def test_repair_parts__of_an_imported_store_mends_its_cache(world: World, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    first = min((data / "train").rglob("*.png"))
    first.write_bytes(b"not an image at all\n")
    options = ImportPartsOptions(
        labels=world.labels, data=str(data), output=tmp_path / "true", grid="4", cache_images=SIDE
    )
    import_parts(options)
    sound = lasting_bytes(tmp_path / "true")
    cache, store = PartStore.open(tmp_path / "true").image_cache(), tmp_path / "true"
    with pytest.raises(MissingError, match="was bad"):
        cache.read(0)
    assert cache.read(1).size
    (store / "images/00000.jpeg").write_bytes(sound["images/00000.jpeg"][:-9])
    (store / "images/00002.jpeg").unlink()
    named = {fault.name for fault in verify_parts(store)}
    assert named == {"images/00000.jpeg", "images/00002.jpeg"}
    repair_parts(RepairPartsOptions(parts=store))
    assert lasting_bytes(store) == sound


def test_pretrain__from_a_cache_needs_no_data_to_be_readable(
    world: World, jpeg_store: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    for image in data.rglob("*.png"):
        image.write_bytes(bytes(image.stat().st_size))
    options = pretrain_options(world, tmp_path / "run", parts=jpeg_store, masking="semantic")
    options = replace(options, data=str(data), images="cache", loader_workers=2)
    pretrain(options)
    pretrain(replace(options, data=world.data, output=tmp_path / "other", loader_workers=0))
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("run", "other")]
    one, other = (json.loads(log)["loss"] for log in logs)
    assert one == other


def test_pretrain__does_not_go_on_from_the_other_images(
    world: World, jpeg_store: Path, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, parts=jpeg_store, masking="semantic")
    pretrain(options)
    with pytest.raises(MismatchError, match="--images was data, is cache"):
        pretrain(replace(options, images="cache", epochs=2))


def test_pretrain__a_store_without_a_cache_is_refused(world: World, tmp_path: Path) -> None:
    options = pretrain_options(world, tmp_path / "run", images="cache")
    with pytest.raises(SettingError, match="--images cache needs --parts"):
        pretrain(options)
    with pytest.raises(MissingError, match=r"keeps no images; .* --cache-images 256"):
        pretrain(replace(options, parts=world.store))
    assert not (tmp_path / "run").exists()


def test_complete_store__covers_the_cache(jpeg_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(jpeg_store, store)
    (store / "images/00001.jpeg").unlink()
    with pytest.raises(OSError, match=r"images/00001\.jpeg is missing"):
        complete_store(store)
