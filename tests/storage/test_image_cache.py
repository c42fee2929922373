import pickle
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from semmae.errors import DamageError, MismatchError, MissingError, SettingError, UserError
from semmae.storage import image_cache
from semmae.storage.image_cache import CachedImage, write_image_cache
from semmae.storage.part_check import check_shards, complete_store, damaged_shards
from semmae.storage.part_identity import StoreIdentity
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard
from semmae.tests.world import lasting_bytes

if TYPE_CHECKING:
    from .conftest import Example


def with_cache(example: "Example", form: str) -> StoreIdentity:
    plain = replace(example.identity, attention_heads=0, probabilities=False)
    return replace(plain, image_cache=form, image_cache_side=8, image_cache_recipe="words")


def image_of(index: int, form: str) -> CachedImage:
    """An image of its own size and content; for a JPEG any bytes do here."""
    rng = np.random.default_rng(index)
    height, width = 8 + index % 3, 8 + index % 2
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    payload = pixels if form == "raw" else pixels.tobytes()[: 50 + index]
    return CachedImage(payload, height, width)


def images_of(example: "Example", shard: int, form: str) -> Iterator[CachedImage | None]:
    for index in range(*example.identity.shard_range(shard)):
        yield None if index in example.bad else image_of(index, form)


def fill(path: Path, example: "Example", form: str) -> Path:
    identity = with_cache(example, form)
    create_store(path, identity, example.plan)
    for shard in range(identity.shards):
        with write_image_cache(path, identity, shard) as cache:
            assert cache is not None
            cache.extend(images_of(example, shard, form))
        labels, meta, *_ = example.content(shard, identity)
        write_shard(path, shard, labels, meta, image_cache=cache.description)
    complete_store(path)
    return path


@pytest.fixture(params=["jpeg", "raw"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def flip_byte(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_image_cache__gives_back_what_was_written(
    example: "Example", form: str, tmp_path: Path
) -> None:
    cache = PartStore.open(fill(tmp_path, example, form)).image_cache()
    for index in set(range(43)) - example.bad:
        found, written = cache.read(index), image_of(index, form)
        assert found.dtype == np.uint8
        assert not found.flags.writeable
        if form == "raw":
            assert np.array_equal(found, written.payload)
        else:
            assert found.tobytes() == written.payload


@pytest.mark.parametrize("same", [True, False])
def test_write_image_cache__is_content_where_another_run_completes_the_store(
    example: "Example", form: str, tmp_path: Path, same: bool
) -> None:
    """It sweeps the temporary file of what stands; other bytes than those are an error."""
    path = fill(tmp_path, example, form)
    expected = lasting_bytes(path)

    def again(shard: int) -> None:
        with write_image_cache(path, with_cache(example, form), 0) as cache:
            assert cache is not None
            cache.extend(images_of(example, shard, form))
            complete_store(path)

    if same:
        again(0)
    else:
        with pytest.raises(UserError, match="cannot write"):
            again(1)
    assert lasting_bytes(path) == expected


def test_image_cache__holds_nothing_of_bad_images(
    example: "Example", form: str, tmp_path: Path
) -> None:
    cache = PartStore.open(fill(tmp_path, example, form)).image_cache()
    for index in example.bad:
        with pytest.raises(MissingError, match=f"image {index} .* was bad"):
            cache.read(index)
    for index in (-1, 43):
        with pytest.raises(IndexError):
            cache.read(index)


def test_image_cache__bytes_are_a_function_of_the_content(
    example: "Example", form: str, tmp_path: Path
) -> None:
    one, two = fill(tmp_path / "one", example, form), fill(tmp_path / "two", example, form)
    files = sorted(file.name for file in (one / "images").iterdir())
    assert files == [f"{shard:05d}.{form}" for shard in range(6)]
    assert example.digests(one) == example.digests(two)


def test_image_cache__the_commit_record_vouches_for_every_byte(
    example: "Example", form: str, tmp_path: Path
) -> None:
    file = fill(tmp_path, example, form) / f"images/00005.{form}"
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        flip_byte(file, place)
        (check,) = check_shards(tmp_path, [5])
        assert [str(fault) for fault in check.faults] == [
            f"images/00005.{form} has a wrong checksum"
        ]
        file.write_bytes(whole)
    assert damaged_shards(tmp_path) == set()
    file.unlink()
    assert damaged_shards(tmp_path) == {5}


def test_image_cache__no_damaged_byte_reaches_a_reader(
    example: "Example", form: str, tmp_path: Path
) -> None:
    store = PartStore.open(fill(tmp_path, example, form))
    file = tmp_path / f"images/00005.{form}"
    whole = file.read_bytes()
    images = [image_of(index, form) for index in (41, 42)]
    for place in range(0, len(whole), 3):
        flip_byte(file, place)
        cache, damage = store.image_cache(), []
        for index, image in zip((41, 42), images, strict=True):
            try:
                found = cache.read(index).tobytes()
            except DamageError as error:
                damage.append(str(error))
            else:
                assert found == memoryview(image.payload).tobytes()
        assert damage
        assert all("image cache" in text and "extract-parts" in text for text in damage)
        file.write_bytes(whole)


@pytest.mark.parametrize("left", [0, 1, 10, -1])
def test_image_cache__a_cut_file_is_damage(example: "Example", left: int, tmp_path: Path) -> None:
    store = PartStore.open(fill(tmp_path, example, "jpeg"))
    file = tmp_path / "images/00005.jpeg"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(DamageError, match=r"00005\.jpeg is missing or cut"):
        store.image_cache().warm()
    file.unlink()
    with pytest.raises(DamageError, match=r"00005\.jpeg is missing or cut"):
        store.image_cache().read(41)


def test_image_cache__a_footer_of_another_shard_is_damage(
    example: "Example", tmp_path: Path
) -> None:
    """A file as long as the right one, and right in itself, but of fewer images."""
    store = PartStore.open(fill(tmp_path, example, "raw"))
    identity, file = store.identity, tmp_path / "images/00005.raw"
    size = file.stat().st_size
    with write_image_cache(tmp_path, replace(identity, images=42), 5) as cache:
        assert cache is not None
        filling = np.zeros((1, size - 20 - 24 * 2, 1), dtype=np.uint8)
        cache.extend([CachedImage(filling, 1, 1), None])
    assert file.stat().st_size == size
    with pytest.raises(DamageError, match="footer"):
        store.image_cache().read(41)


def test_image_cache__many_shards_need_few_open_files(
    example: "Example", form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "_OPEN_FILES", 2)
    cache = PartStore.open(fill(tmp_path, example, form)).image_cache()
    cache.warm()
    for _ in range(2):
        for index in (0, 42, 8, 17, 1, 25):
            wanted = memoryview(image_of(index, form).payload).tobytes()
            assert cache.read(index).tobytes() == wanted
    assert len(cache._maps) <= 2


def test_image_cache__survives_pickling(example: "Example", form: str, tmp_path: Path) -> None:
    cache = PartStore.open(fill(tmp_path, example, form)).image_cache()
    first = cache.read(0)
    again = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(again.read(0), first)


def test_write_image_cache__holds_one_image_at_a_time(example: "Example", tmp_path: Path) -> None:
    identity = replace(with_cache(example, "raw"), images=64, shard_size=64)
    size = 256 * 256 * 3

    def images() -> Iterator[CachedImage]:
        for value in range(64):
            yield CachedImage(np.full((256, 256, 3), value, dtype=np.uint8), 256, 256)

    tracemalloc.start()
    with write_image_cache(tmp_path, identity, 0) as cache:
        assert cache is not None
        cache.extend(images())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "images/00000.raw").stat().st_size > 64 * size
    assert peak < 4 * size


def test_write_image_cache__describes_the_file_it_wrote(
    example: "Example", form: str, tmp_path: Path
) -> None:
    with write_image_cache(tmp_path, with_cache(example, form), 0) as cache:
        assert cache is not None
        cache.extend(images_of(example, 0, form))
    data = (tmp_path / f"images/00000.{form}").read_bytes()
    assert cache.description == {"size": len(data), "crc32": zlib.crc32(data)}


def test_write_image_cache__leaves_nothing_when_it_breaks_off(
    example: "Example", tmp_path: Path
) -> None:
    identity = with_cache(example, "jpeg")

    def write(images: int) -> None:
        with write_image_cache(tmp_path, identity, 0) as cache:
            assert cache is not None
            cache.extend([None] * images)
            if images == 5:
                raise KeyboardInterrupt

    for images in (0, 7, 9):
        with pytest.raises(MismatchError, match=f"8 images was given {images} "):
            write(images)
    with pytest.raises(KeyboardInterrupt):
        write(5)
    assert list((tmp_path / "images").iterdir()) == []


def test_write_shard__must_be_given_the_cache_that_the_store_keeps(
    example: "Example", tmp_path: Path
) -> None:
    identity = with_cache(example, "jpeg")
    create_store(tmp_path / "with", identity, example.plan)
    labels, meta, *_ = example.content(0, identity)
    with pytest.raises(MismatchError, match="set up with an image cache"):
        write_shard(tmp_path / "with", 0, labels, meta)
    plain = replace(identity, image_cache="", image_cache_side=0, image_cache_recipe="")
    create_store(tmp_path / "without", plain, example.plan)
    given = {"size": 1, "crc32": 1}
    with pytest.raises(MismatchError, match="set up without an image cache"):
        write_shard(tmp_path / "without", 0, labels, meta, image_cache=given)


def test_part_store__without_a_cache_says_how_to_get_one(store: Path) -> None:
    with pytest.raises(MissingError, match="--cache-images 256"):
        PartStore.open(store).image_cache()


def test_store_identity__without_a_cache_is_recorded_as_before(example: "Example") -> None:
    record = example.identity.to_record()
    assert not [name for name in record if "cache" in name]
    assert StoreIdentity.from_record(record).image_cache == ""
    identity = with_cache(example, "raw")
    assert StoreIdentity.from_record(identity.to_record()).image_cache_side == 8


def test_create_store__another_cache_is_another_store(example: "Example", tmp_path: Path) -> None:
    identity = with_cache(example, "raw")
    create_store(tmp_path, identity, example.plan)
    with pytest.raises(MismatchError, match="image_cache: the store has 'raw', this run wants 'j"):
        create_store(tmp_path, with_cache(example, "jpeg"), example.plan)
    with pytest.raises(MismatchError, match="image_cache_side: the store has 8, this run wants 9"):
        create_store(tmp_path, replace(identity, image_cache_side=9), example.plan)


@pytest.mark.parametrize(("form", "side"), [("jpeg", 0), ("", 256), ("webp", 256), ("raw", -1)])
def test_store_identity__refuses_half_a_cache(example: "Example", form: str, side: int) -> None:
    with pytest.raises(SettingError, match="image_cache"):
        replace(example.identity, image_cache=form, image_cache_side=side)
