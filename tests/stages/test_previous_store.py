"""`extract-parts --update`: rows of an earlier store that stayed the same."""

import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.watching import Tell
from semmae.stages import extraction_forecast
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_forecast import forecast_extraction
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.previous_store import PreviousStore
from semmae.stages.worker_settings import WorkerSettings
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import uncommit
from semmae.tests.world import World, lasting_bytes


class Counts(ExtractionWorker):
    """A worker that says which images the network saw."""

    seen: list[int]

    def _batch(self, loaded):  # type: ignore[no-untyped-def]
        Counts.seen.append(sum(image.pixels is not None for image in loaded))
        return super()._batch(loaded)


@pytest.fixture(autouse=True)
def forget() -> None:
    Counts.seen = []


@pytest.fixture
def changed(world: World, tmp_path: Path) -> Path:
    """The images of the world: one is new, one is gone, one is another."""
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    files = sorted((data / "train").rglob("*.png"))
    shutil.copy(files[3], files[0].with_name("0-new.png"))
    files[10].unlink()
    files[30].write_bytes(files[20].read_bytes())
    return data


def options_for(world: World, data: Path, output: Path, **changes: object) -> ExtractPartsOptions:
    options = ExtractPartsOptions(
        data=str(data), learner=world.learner, output=output, class_attention=True
    )
    return replace(options, **changes)  # type: ignore[arg-type]


@pytest.fixture
def old(world: World, tmp_path: Path) -> Path:
    extract_parts(options_for(world, Path(world.data), tmp_path / "old"))
    return tmp_path / "old"


def test_update__encodes_only_what_changed(
    world: World, changed: Path, old: Path, tmp_path: Path
) -> None:
    new, fresh = tmp_path / "new", tmp_path / "fresh"
    extract_parts(options_for(world, changed, new, update=old), Counts)
    assert sum(Counts.seen) == 2
    extract_parts(options_for(world, changed, fresh))
    updated, whole = PartStore.open(new), PartStore.open(fresh)
    assert (
        updated.meta()
        .drop(["confidence", "part_areas"])
        .equals(whole.meta().drop(["confidence", "part_areas"]))
    )
    # Neighbours in a batch are others; the network's last bits may follow, no more.
    assert (np.asarray(updated.labels()) == np.asarray(whole.labels())).mean() > 0.999
    one, other = (np.asarray(store.class_attention()[:]) for store in (updated, whole))
    np.testing.assert_allclose(one, other, rtol=2e-2, atol=1e-4)


def test_update__bytes_of_equal_size_are_told_apart(
    world: World, old: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    place = sorted((data / "train").rglob("*.png"))[5]
    content = bytearray(place.read_bytes())
    content[-1] ^= 1  # in the checksum of the end chunk, which decoders pass over
    place.write_bytes(content)
    extract_parts(options_for(world, data, tmp_path / "new", update=old), Counts)
    assert sum(Counts.seen) == 1


class Stops(Counts):
    """A worker that breaks off at its second shard."""

    def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
        if shard == 1:
            raise KeyboardInterrupt
        return super().__call__(shard, tell)


def test_update__interrupted_ends_as_one_that_was_not(
    world: World, changed: Path, old: Path, tmp_path: Path
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options_for(world, changed, broken, update=old), Stops)
    extract_parts(options_for(world, changed, broken, update=old))
    extract_parts(options_for(world, changed, whole, update=old))
    assert lasting_bytes(broken) == lasting_bytes(whole)


def test_update__takes_nothing_over_that_is_not_checked(
    world: World, old: Path, tmp_path: Path
) -> None:
    PartStore.open(old).labels()
    (cached,) = (old / "cache").glob("labels-*.npy")
    content = bytearray(cached.read_bytes())
    content[-5] ^= 1
    cached.write_bytes(content)
    extract_parts(options_for(world, Path(world.data), tmp_path / "new", update=old), Counts)
    assert (PartStore.open(tmp_path / "new").labels() == PartStore.open(world.store).labels()).all()
    place = old / "parts.zarr/class_attention/c/1/0/0/0"
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    with pytest.raises(DamageError, match="class_attention"):
        extract_parts(options_for(world, Path(world.data), tmp_path / "other", update=old))


def test_update__bad_images_are_taken_over_too(world: World, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    sorted((data / "train").rglob("*.png"))[7].write_bytes(b"no image")
    extract_parts(options_for(world, data, tmp_path / "old"))
    extract_parts(options_for(world, data, tmp_path / "new", update=tmp_path / "old"), Counts)
    assert sum(Counts.seen) == 0
    before, after = PartStore.open(tmp_path / "old"), PartStore.open(tmp_path / "new")
    assert before.meta().equals(after.meta())
    assert (before.labels() == after.labels()).all()


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"class_attention": False}])
def test_update__from_a_store_of_other_parts_is_refused(
    world: World, old: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(MismatchError, match="its parts are others"):
        extract_parts(options_for(world, Path(world.data), tmp_path / "new", update=old, **change))
    assert not (tmp_path / "new").exists()


def test_update__of_a_store_from_itself_is_refused(world: World, old: Path) -> None:
    with pytest.raises(SettingError, match="--update and --output are both"):
        options_for(world, Path(world.data), old, update=old)


# What an update would do.


def test_forecast__of_an_update_tells_what_is_taken_over_at_most(
    world: World, changed: Path, old: Path, tmp_path: Path
) -> None:
    options = options_for(world, changed, tmp_path / "new", update=old)
    told = forecast_extraction(options)
    # One image is new; the one with another's content has another size, too.
    assert told["taken over"] == f"at most 70, whose names and sizes are those of {old}"
    assert told["encoded"] == "at least 2"
    assert "on 2 images; " in told["rate of a worker"]
    assert told["rate of a worker"].endswith(" images/s that are taken over, on 16")
    assert not (tmp_path / "new").exists()
    extract_parts(options, Counts)
    assert sum(Counts.seen) == 2


def test_forecast__of_an_update_that_is_half_done_counts_what_is_left(
    world: World, changed: Path, old: Path, tmp_path: Path
) -> None:
    options = options_for(world, changed, tmp_path / "new", update=old)
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options, Stops)
    told = forecast_extraction(options)
    # Both images that are new lie in the first shard.
    assert (told["done already"], told["encoded"]) == (32, "at least 0")
    assert told["taken over"].startswith("at most 40, ")


def test_forecast__of_an_update_with_nothing_new_still_gives_time_and_size(
    world: World, old: Path, tmp_path: Path
) -> None:
    told = forecast_extraction(options_for(world, Path(world.data), tmp_path / "new", update=old))
    assert told["encoded"] == "at least 0"
    fresh = forecast_extraction(options_for(world, Path(world.data), tmp_path / "new"))
    assert "taken over" not in fresh
    # Maps that are taken over take the same space as those that are made; the store says whence.
    bytes_an_image = [float(of["store"].split()[-4]) for of in (told, fresh)]
    assert bytes_an_image[0] == pytest.approx(bytes_an_image[1], rel=0.01)


def test_forecast__measures_what_is_taken_over_with_the_earlier_store(
    world: World, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(Counts):
        def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
            written = super().__call__(shard, tell)
            seen.append((self._settings.update, written.result()["ok"], sum(Counts.seen)))
            Counts.seen = []
            return written

    monkeypatch.setattr(extraction_forecast, "ExtractionWorker", Watched)
    forecast_extraction(options_for(world, Path(world.data), tmp_path / "new", update=old))
    assert seen == [*[(None, 8, 8)] * 2, *[(None, 16, 16)] * 2, *[(old, 16, 0)] * 2]


# From a store that is not complete.


@pytest.fixture
def unfinished(old: Path) -> Path:
    """The earlier store without its middle shard."""
    uncommit(old, [1])
    return old


def test_update__takes_over_what_an_unfinished_store_has_committed(
    world: World, changed: Path, unfinished: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=f"--update {unfinished}` takes over what stayed"):
        extract_parts(options_for(world, changed, unfinished))
    new, fresh = tmp_path / "new", tmp_path / "fresh"
    told = forecast_extraction(options_for(world, changed, new, update=unfinished))
    assert told["taken over"].startswith("at most 38, ")
    assert told["encoded"] == "at least 34"
    extract_parts(options_for(world, changed, new, update=unfinished), Counts)
    # Of the 40 images that are committed one is gone and one is another.
    assert sum(Counts.seen) == 72 - 38
    extract_parts(options_for(world, changed, fresh))
    updated, whole = PartStore.open(new), PartStore.open(fresh)
    assert updated.meta(["key", "crc32"]).equals(whole.meta(["key", "crc32"]))
    assert (np.asarray(updated.labels()) == np.asarray(whole.labels())).mean() > 0.999


def test_update__from_an_unfinished_store_interrupted_ends_as_one_that_was_not(
    world: World, changed: Path, unfinished: Path, tmp_path: Path
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options_for(world, changed, broken, update=unfinished), Stops)
    extract_parts(options_for(world, changed, broken, update=unfinished))
    extract_parts(options_for(world, changed, whole, update=unfinished))
    assert lasting_bytes(broken) == lasting_bytes(whole)


def test_update__does_not_go_on_from_a_store_that_has_grown(
    world: World, changed: Path, unfinished: Path, tmp_path: Path
) -> None:
    options = options_for(world, changed, tmp_path / "new", update=unfinished)
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options, Stops)
    before = lasting_bytes(tmp_path / "new")
    extract_parts(options_for(world, Path(world.data), unfinished))
    with pytest.raises(MismatchError, match=r"--update names .* has changed or grown.*another"):
        extract_parts(options)
    assert lasting_bytes(tmp_path / "new") == before


def test_update__from_a_store_that_grows_meanwhile_is_refused(
    world: World, changed: Path, unfinished: Path, tmp_path: Path
) -> None:
    class Grows(Counts):
        def __init__(self, settings: WorkerSettings) -> None:
            extract_parts(options_for(world, Path(world.data), unfinished))
            super().__init__(settings)

    with pytest.raises(MismatchError, match=r"old, which has changed or grown since this run"):
        extract_parts(options_for(world, changed, tmp_path / "new", update=unfinished), Grows)


def test_update__encodes_anew_what_no_sound_record_vouches_for(
    world: World, old: Path, unfinished: Path, tmp_path: Path
) -> None:
    place = unfinished / "commits/00002.json"
    place.write_bytes(place.read_bytes()[:-3])
    extract_parts(options_for(world, Path(world.data), tmp_path / "new", update=old), Counts)
    assert sum(Counts.seen) == 40
    uncommit(unfinished, [0, 2])
    with pytest.raises(MissingError, match="not one shard is done"):
        extract_parts(options_for(world, Path(world.data), tmp_path / "newer", update=old))


@pytest.mark.parametrize("name", ["meta/part-00000.parquet", "parts.zarr/labels/c/0/0/0"])
def test_update__a_damaged_shard_of_the_earlier_store_can_be_done_without(
    world: World, unfinished: Path, tmp_path: Path, name: str
) -> None:
    (unfinished / name).write_bytes(b"?")
    told = rf"{name} has 1 bytes .*parts repair.*remove complete\.json and commits/00000\.json"
    with pytest.raises(DamageError, match=told):
        extract_parts(options_for(world, Path(world.data), tmp_path / "a", update=unfinished))
    (unfinished / "commits/00000.json").unlink()
    options = options_for(world, Path(world.data), tmp_path / "b", update=unfinished)
    extract_parts(options, Counts)
    assert sum(Counts.seen[-3:]) == 64


def test_update__a_damaged_record_that_the_earlier_store_is_complete_can_be_done_without(
    world: World, old: Path, tmp_path: Path
) -> None:
    (old / "complete.json").write_bytes(b"?")
    options = options_for(world, Path(world.data), tmp_path / "new", update=old)
    with pytest.raises(DamageError, match=rf"parts repair {old}`, or remove that file"):
        extract_parts(options)
    (old / "complete.json").unlink()
    extract_parts(options, Counts)
    assert sum(Counts.seen) == 0


@pytest.mark.parametrize("content", [b"?", None])
def test_update__names_the_record_that_is_damaged_before_anything_is_done(
    world: World, old: Path, tmp_path: Path, content: bytes | None
) -> None:
    place = old / "commits/00002.json"
    place.unlink() if content is None else place.write_bytes(content)
    told = r"00002.*parts repair.*remove complete\.json and commits/00002\.json"
    with pytest.raises(DamageError, match=told) as raised:
        extract_parts(options_for(world, Path(world.data), tmp_path / "new", update=old), Counts)
    assert str(raised.value).count("parts repair") == 1
    assert not (tmp_path / "new").exists()


def test_previous_store__knows_a_complete_store_as_before_and_an_unfinished_one_by_its_shards(
    old: Path, unfinished: Path, world: World
) -> None:
    prints = [PreviousStore.open(unfinished).fingerprint]
    with pytest.raises(DamageError, match=r"not complete"):
        PartStore.open(unfinished)
    extract_parts(options_for(world, Path(world.data), old))
    prints.append(PreviousStore.open(old).fingerprint)
    assert prints[1] == PartStore.open(old).fingerprint
    uncommit(old, [1])
    prints.append(PreviousStore.open(old).fingerprint)
    uncommit(old, [2])
    prints.append(PreviousStore.open(old).fingerprint)
    assert (prints[0], len(set(prints))) == (prints[2], 3)
