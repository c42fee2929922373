import errno
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr

from semmae.errors import DamageError, MissingError, SettingError
from semmae.storage import mapped_arrays, part_store
from semmae.storage.part_check import complete_store
from semmae.storage.part_identity import META_SCHEMA, UNLABELLED
from semmae.storage.part_shards import round_mantissa
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard

if TYPE_CHECKING:
    from .conftest import Example


def test_part_store__gives_back_what_was_written(example: "Example", finished: Path) -> None:
    store = PartStore.open(finished)
    labels, ok, meta = store.labels(), store.ok(), store.meta()
    attention, soft = store.class_attention(), store.probabilities()
    assert store.identity.to_record() == example.identity.to_record()
    assert (store.class_names, store.plan().to_pydict()) == (
        example.names,
        example.plan.to_pydict(),
    )
    assert (labels.shape, attention.shape) == ((43, 3, 4), (43, 2, 3, 4))
    assert labels.dtype == np.uint8
    assert set(np.flatnonzero(~ok)) == example.bad
    assert meta.schema.equals(META_SCHEMA)
    for shard in range(6):
        start, stop = example.identity.shard_range(shard)
        want_labels, want_meta, want_attention, want_soft = example.content(shard)
        good = ok[start:stop]
        assert np.array_equal(labels[start:stop][good], want_labels[good])
        assert meta.slice(start, stop - start).to_pylist() == want_meta.to_pylist()
        for have, want in ((attention, want_attention), (soft, want_soft)):
            part = np.asarray(have[start:stop])
            assert np.array_equal(part[good], round_mantissa(want)[good])
            assert np.isnan(part[~good]).all()
        assert (labels[start:stop][~good] == UNLABELLED).all()


def test_part_store__meta_columns_are_as_asked(finished: Path) -> None:
    store = PartStore.open(finished)
    assert store.meta(["label", "key"]).column_names == ["label", "key"]
    with pytest.raises(SettingError, match="colour"):
        store.meta(["colour"])


def test_part_store__fill_value_is_only_where_an_image_is_bad(
    example: "Example", finished: Path
) -> None:
    store = PartStore.open(finished)
    labels = store.labels()
    assert labels[store.ok()].max() < example.identity.parts
    assert set(np.flatnonzero((labels == UNLABELLED).any(axis=(1, 2)))) == example.bad


def test_part_store__any_zarr_reader_opens_it(finished: Path) -> None:
    group = zarr.open_group(finished / "parts.zarr", mode="r")
    assert sorted(group) == ["class_attention", "labels", "probabilities"]
    labels: Any = group["labels"]
    assert labels.metadata.dimension_names == ("image", "row", "column")
    assert np.array_equal(np.asarray(labels[:]), PartStore.open(finished).labels())


def test_part_store__damage_after_completion_never_reaches_a_reader(store: Path) -> None:
    rng = random.Random(0)
    for number in range(60):
        name = ("parts.zarr/labels/c/*/*/*", "meta/*", "commits/*")[number % 3]
        place = rng.choice(sorted(store.glob(name)))
        sound = place.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        place.write_bytes(damaged)
        reader = PartStore.open(store)
        with pytest.raises(DamageError):
            (reader.labels() if number % 3 == 0 else reader.meta())
        place.write_bytes(sound)


@pytest.mark.parametrize("name", ["labels", "class_attention"])
def test_part_store__shard_that_is_gone_is_an_error_not_fill(store: Path, name: str) -> None:
    shutil.rmtree(store / "parts.zarr" / name / "c" / "1")
    with pytest.raises(DamageError, match="missing"):
        getattr(PartStore.open(store), name)()


def test_part_store__commit_of_later_is_refused(example: "Example", store: Path) -> None:
    labels, *rest = example.content(1)
    write_shard(store, 1, (labels + 1) % example.identity.parts, *rest)
    with pytest.raises(DamageError, match="after the store was complete"):
        PartStore.open(store).labels()
    before = PartStore.open(store).fingerprint
    complete_store(store)
    assert PartStore.open(store).fingerprint != before


def test_meta__pandas_reads_the_folder(example: "Example", store: Path) -> None:
    # The first file has no bad image when image 3 is mended: its error columns are all null.
    write_shard(store, 0, *example.content(0, bad=set()))
    (store / "meta/.part-00001.parquet.0f.tmp").write_bytes(b"PAR1 half")
    frame = pd.read_parquet(store / "meta")
    assert frame["index"].tolist() == list(range(43))
    assert frame.loc[40, "error"] == "file is cut"
    assert frame["error"].notna().sum() == 1
    assert frame["part_areas"].iloc[0].tolist() == [np.float32(0.2)] * 5


def test_part_store__open_says_what_is_missing(example: "Example", tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"plan\.json"):
        PartStore.open(tmp_path / "absent")
    create_store(tmp_path, replace(example.identity, attention_heads=0), example.plan)
    with pytest.raises(DamageError, match="extract-parts"):
        PartStore.open(tmp_path)


def test_part_store__array_that_is_not_kept_is_missing(example: "Example", tmp_path: Path) -> None:
    identity = replace(example.identity, images=3, attention_heads=0, probabilities=False)
    create_store(tmp_path, identity, example.plan.slice(0, 3))
    write_shard(tmp_path, 0, *example.content(0, identity, set())[:2])
    complete_store(tmp_path)
    store = PartStore.open(tmp_path)
    for read, flag in (
        (store.class_attention, "--class-attention"),
        (store.mean_attention, "--class-attention"),
        (store.probabilities, "--probabilities"),
    ):
        with pytest.raises(MissingError, match=f"has no .*; extract the parts anew with {flag} "):
            read()


def test_mean_attention__is_that_of_the_heads_and_mapped(example: "Example", store: Path) -> None:
    opened = PartStore.open(store)
    mean = opened.mean_attention()
    assert isinstance(mean, np.memmap)
    assert (mean.dtype, mean.shape) == (np.float16, (43, 3, 4))
    assert (store / "cache" / f"attention-{opened.fingerprint}.npy").is_file()
    ok = opened.ok()
    assert np.isnan(mean[~ok]).all()
    for row in np.flatnonzero(ok).tolist():
        heads = np.asarray(opened.class_attention()[row]).astype(float).tolist()
        for found, one, other in zip(
            mean[row].ravel(), np.ravel(heads[0]), np.ravel(heads[1]), strict=True
        ):
            assert found == np.float16((one + other) / 2)
    assert np.array_equal(opened.labels()[ok], PartStore.open(store).labels()[ok])


def test_mean_attention__damage_is_an_error(store: Path) -> None:
    place = store / "parts.zarr" / "class_attention" / "c" / "2" / "0" / "0" / "0"
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    with pytest.raises(DamageError):
        PartStore.open(store).mean_attention()
    assert not list(store.glob("cache/*"))


def test_labels__cache_is_kept_and_mended(store: Path) -> None:
    first = PartStore.open(store)
    want = np.array(first.labels())
    place = store / "cache" / f"labels-{first.fingerprint}.npy"
    made = place.stat().st_mtime_ns
    assert np.array_equal(PartStore.open(store).labels(), want)
    assert place.stat().st_mtime_ns == made
    assert isinstance(first.labels(), np.memmap)
    assert not first.labels().flags.writeable
    place.write_bytes(place.read_bytes()[:200])
    assert np.array_equal(PartStore.open(store).labels(), want)


@pytest.mark.parametrize("checked", [True, False])
def test_labels__cache_that_was_altered_is_made_anew(
    store: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """Unless it is so large that each start would wait for it."""
    if not checked:
        monkeypatch.setattr(mapped_arrays, "CHECKED_BYTES", 100)
    expected = np.array(PartStore.open(store).labels())
    (kept,) = (store / "cache").glob("labels-*.npy")
    assert np.array_equal(np.load(kept), expected)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert np.array_equal(PartStore.open(store).labels(), expected) == checked


def test_labels__cache_of_a_rebuilt_store_is_not_read(example: "Example", store: Path) -> None:
    stale = np.array(PartStore.open(store).labels())
    labels, *rest = example.content(1)
    write_shard(store, 1, (labels + 1) % example.identity.parts, *rest)
    complete_store(store)
    fresh = PartStore.open(store).labels()
    assert np.array_equal(fresh[8:16], (labels + 1) % example.identity.parts)
    assert np.array_equal(np.delete(fresh, range(8, 16), 0), np.delete(stale, range(8, 16), 0))


def test_labels__read_only_store_uses_a_private_cache(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop root, so the refusal is played.
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if store in self.parents:
            raise OSError(errno.EROFS, "read-only", str(self))
        make(self, *args, **kwargs)

    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(private))
    monkeypatch.setattr(Path, "mkdir", refuse)
    labels = PartStore.open(store).labels()
    (kept,) = private.rglob("*.npy")
    assert kept.parent.stat().st_mode & 0o077 == 0
    assert not (store / "cache").exists()
    monkeypatch.setattr(part_store, "ShardCodec", None)  # the second time nothing is decoded
    assert np.array_equal(PartStore.open(store).labels(), labels)


@pytest.mark.parametrize("images", [1, 7, 512, 1000, 1024, 1025])
def test_part_store__sizes_around_chunk_and_shard(
    example: "Example", tmp_path: Path, images: int
) -> None:
    identity = replace(
        example.identity, images=images, shard_size=1024, attention_heads=0, probabilities=False
    )
    create_store(tmp_path, identity, pa.table({"index": range(images)}))
    for shard in range(identity.shards):
        write_shard(tmp_path, shard, *example.content(shard, identity, set())[:2])
    complete_store(tmp_path)
    labels = PartStore.open(tmp_path).labels()
    want = [example.content(shard, identity, set())[0] for shard in range(identity.shards)]
    assert np.array_equal(labels, np.concatenate(want))
