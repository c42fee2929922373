import errno
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from semmae.errors import (
    DamageError,
    MismatchError,
    MissingError,
    SettingError,
    UserError,
)
from semmae.storage import files, part_store
from semmae.storage.part_store import (
    META_SCHEMA,
    UNLABELLED,
    PartStore,
    StoreIdentity,
    committed_shards,
    complete_store,
    create_store,
    damaged_shards,
    round_mantissa,
    shard_size_for,
    uncommit,
    write_shard,
)

IDENTITY = StoreIdentity(
    images=43,  # five shards of 8 and a partial one of 3
    shard_size=8,
    grid=(3, 4),
    parts=5,
    background=4,
    image_size=(48, 64),
    batch_size=8,
    dtype="float32",
    device_type="cpu",
    plan_fingerprint="f" * 8,
    learner_hash="a" * 64,
    preprocessing={"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"},
    attention_heads=2,
    probabilities=True,
)
PLAN = pa.table({"index": range(43), "key": [f"{i:03d}.jpg" for i in range(43)]})
NAMES = ("cat", "dog")
BAD = {3, 40}

Shard = tuple[NDArray[np.uint8], pa.Table, NDArray[np.float16], NDArray[np.float16]]


def content(shard: int, identity: StoreIdentity = IDENTITY, bad: set[int] = BAD) -> Shard:
    """What a worker would hand over for a shard, a function of its number."""
    rng = np.random.default_rng(shard)
    start, stop = identity.shard_range(shard)
    n, (rows, columns), parts = stop - start, identity.grid, identity.parts
    meta = pa.table(
        {
            "index": list(range(start, stop)),
            "key": [f"{i:03d}.jpg" for i in range(start, stop)],
            "label": [i % 2 for i in range(start, stop)],
            "width": [None if i in bad else 100 for i in range(start, stop)],
            "height": [None if i in bad else 80 for i in range(start, stop)],
            "crc32": list(range(start, stop)),
            "status": ["bad" if i in bad else "ok" for i in range(start, stop)],
            "error_code": ["truncated" if i in bad else None for i in range(start, stop)],
            "error_kind": ["OSError" if i in bad else None for i in range(start, stop)],
            "error": ["file is cut" if i in bad else None for i in range(start, stop)],
            "confidence": [None if i in bad else 0.5 for i in range(start, stop)],
            "part_areas": [None if i in bad else [0.2] * parts for i in range(start, stop)],
        },
        schema=META_SCHEMA,
    )
    labels = rng.integers(0, parts, (n, rows, columns), dtype=np.uint8)
    attention = rng.random((n, identity.attention_heads, rows, columns)).astype(np.float16)
    return labels, meta, attention, rng.random((n, parts, rows, columns)).astype(np.float16)


def fill(path: Path, shards: Sequence[int] = range(6)) -> None:
    create_store(path, IDENTITY, PLAN, NAMES)
    for shard in shards:
        write_shard(path, shard, *content(shard))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "store"
    fill(path)
    complete_store(path)
    return path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A finished store of a test's own, without cached labels."""
    ignored = shutil.ignore_patterns("cache")
    return Path(shutil.copytree(finished, tmp_path / "store", ignore=ignored))


def digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and "cache" not in file.relative_to(path).parts
    }


def test_part_store__gives_back_what_was_written(finished: Path) -> None:
    store = PartStore.open(finished)
    labels, ok, meta = store.labels(), store.ok(), store.meta()
    attention, soft = store.class_attention(), store.probabilities()
    assert store.identity.to_record() == IDENTITY.to_record()
    assert (store.class_names, store.plan().to_pydict()) == (NAMES, PLAN.to_pydict())
    assert (labels.shape, attention.shape) == ((43, 3, 4), (43, 2, 3, 4))
    assert labels.dtype == np.uint8
    assert set(np.flatnonzero(~ok)) == BAD
    assert meta.schema.equals(META_SCHEMA)
    for shard in range(6):
        start, stop = IDENTITY.shard_range(shard)
        want_labels, want_meta, want_attention, want_soft = content(shard)
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


def test_part_store__fill_value_is_only_where_an_image_is_bad(finished: Path) -> None:
    store = PartStore.open(finished)
    labels = store.labels()
    assert labels[store.ok()].max() < IDENTITY.parts
    assert set(np.flatnonzero((labels == UNLABELLED).any(axis=(1, 2)))) == BAD


def test_part_store__any_zarr_reader_opens_it(finished: Path) -> None:
    group = zarr.open_group(finished / "parts.zarr", mode="r")
    assert sorted(group) == ["class_attention", "labels", "probabilities"]
    labels: Any = group["labels"]
    assert labels.metadata.dimension_names == ("image", "row", "column")
    assert np.array_equal(np.asarray(labels[:]), PartStore.open(finished).labels())


def test_create_store__metadata_has_checksums_and_only_standard_codecs(finished: Path) -> None:
    for name in ("labels", "class_attention", "probabilities"):
        metadata = json.loads((finished / "parts.zarr" / name / "zarr.json").read_bytes())
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "zstd"]
        assert inner["codecs"][1]["configuration"]["checksum"] is True
        assert inner["index_codecs"][-1]["name"] == "crc32c"


def test_write_shard__chunks_of_nothing_but_fill_are_written(tmp_path: Path) -> None:
    identity = replace(IDENTITY, images=8, attention_heads=0, probabilities=False)
    create_store(tmp_path, identity, PLAN.slice(0, 8))
    labels, meta, *_ = content(0, identity, bad=set(range(8)))
    write_shard(tmp_path, 0, labels, meta)
    complete_store(tmp_path)
    assert (tmp_path / "parts.zarr/labels/c/0/0/0").stat().st_size > 0
    assert (PartStore.open(tmp_path).labels() == UNLABELLED).all()


def test_write_shard__order_and_repetition_change_no_byte(finished: Path, tmp_path: Path) -> None:
    order = [*range(6), *range(6)]
    random.Random(1).shuffle(order)
    fill(tmp_path / "other", order)
    complete_store(tmp_path / "other")
    assert digests(tmp_path / "other") == digests(finished)


def test_write_shard__padding_of_bad_rows_and_chunking_leave_no_trace(
    finished: Path, store: Path
) -> None:
    labels, meta, attention, soft = content(0)
    labels[3], attention[3], soft[3] = 7, np.nan, np.inf
    meta = pa.concat_tables([meta.slice(0, 5), meta.slice(5)])
    write_shard(store, 0, labels, meta, attention, soft)
    assert digests(store) == digests(finished)


def test_write_shard__mends_a_damaged_shard(finished: Path, store: Path) -> None:
    place = store / "parts.zarr/labels/c/5/0/0"
    place.write_bytes(place.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DamageError, match=r"shard 5 parts\.zarr/labels"):
        complete_store(store)
    write_shard(store, 5, *content(5))
    complete_store(store)
    assert digests(store) == digests(finished)


@pytest.mark.parametrize("survived", range(5))
def test_write_shard__kill_between_objects_leaves_it_uncommitted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    # Objects of a shard: labels, class attention, probabilities, meta; then the commit.
    path = tmp_path / "store"
    fill(path, [0, 1, 3, 4, 5])
    written = 0

    def killed(place: Path, data: bytes) -> None:
        nonlocal written
        if written == survived:
            place.parent.mkdir(parents=True, exist_ok=True)
            (place.parent / ".half.tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        written += 1
        files.write_atomically(place, data)

    with monkeypatch.context() as patch:
        patch.setattr(part_store, "write_atomically", killed)
        patch.setattr(part_store, "write_json", lambda p, r: killed(p, files._sealed(r)))
        with pytest.raises(KeyboardInterrupt):
            write_shard(path, 2, *content(2))
    assert committed_shards(path) == {0, 1, 3, 4, 5}
    assert damaged_shards(path) == {2: "is not committed"}
    with pytest.raises(DamageError, match="shard 2 is not committed"):
        complete_store(path)
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(path)
    # A new run finds the store, writes what is missing, and all is as if nothing had happened.
    fill(path, [2])
    complete_store(path)
    for stray in path.rglob(".half.tmp"):
        stray.unlink()
    assert digests(path) == digests(finished)


def test_complete_store__finds_a_flip_of_any_byte(store: Path) -> None:
    (store / "complete.json").unlink()
    rng = random.Random(0)
    kinds = ("parts.zarr/labels/c/*/*/*", "parts.zarr/class_attention/c/*/*/*/*", "meta/*",
             "commits/*", "plan/*", "parts.zarr/labels/zarr.json")  # fmt: skip
    for number in range(120):
        place = rng.choice(sorted(store.glob(kinds[number % len(kinds)])))
        sound = place.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        place.write_bytes(damaged)
        with pytest.raises(DamageError):
            complete_store(store)
        assert not (store / "complete.json").exists()
        place.write_bytes(sound)
    complete_store(store)


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


def test_part_store__commit_of_later_is_refused(store: Path) -> None:
    labels, *rest = content(1)
    write_shard(store, 1, (labels + 1) % IDENTITY.parts, *rest)
    with pytest.raises(DamageError, match="after the store was complete"):
        PartStore.open(store).labels()
    before = PartStore.open(store).fingerprint
    complete_store(store)
    assert PartStore.open(store).fingerprint != before


def test_complete_store__takes_the_mark_back_when_damage_is_found(store: Path) -> None:
    (store / "meta/part-00001.parquet").unlink()
    with pytest.raises(DamageError, match=r"shard 1 meta/part-00001\.parquet is missing"):
        complete_store(store)
    with pytest.raises(DamageError, match="extract-parts"):
        PartStore.open(store)


def test_complete_store__totals_and_second_pass(store: Path) -> None:
    before = (store / "complete.json").stat().st_mtime_ns
    record = complete_store(store)
    assert (record["images"], record["ok"], record["bad"]) == (43, 41, 2)
    assert record["commits"].keys() == {f"{shard:05d}" for shard in range(6)}
    assert (store / "complete.json").stat().st_mtime_ns == before


def test_uncommit__makes_the_next_run_write_the_shard(finished: Path, store: Path) -> None:
    uncommit(store, [1, 4])
    assert committed_shards(store) == {0, 2, 3, 5}
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(store)
    fill(store, [1, 4])
    complete_store(store)
    assert digests(store) == digests(finished)


def test_committed_shards__damaged_or_foreign_record_does_not_count(store: Path) -> None:
    first, second = store / "commits/00000.json", store / "commits/00001.json"
    first.write_bytes(first.read_bytes().replace(b'"ok": 7', b'"ok": 8'))
    shutil.copy(store / "commits/00002.json", second)
    assert committed_shards(store) == {2, 3, 4, 5}


def test_create_store__again_is_a_resume(store: Path) -> None:
    before = digests(store)
    create_store(store, IDENTITY, PLAN, NAMES)
    assert digests(store) == before


def test_create_store__another_identity_names_each_field(store: Path) -> None:
    other = replace(IDENTITY, batch_size=16, preprocessing={"mean": (0.5, 0.5, 0.4)})
    with pytest.raises(MismatchError) as caught:
        create_store(store, other, PLAN, ("cat", "cow"))
    message = str(caught.value)
    for part in (
        "batch_size: the store has 8, this run wants 16",
        "preprocessing.mean: the store has [0.5, 0.5, 0.5], this run wants [0.5, 0.5, 0.4]",
        "preprocessing.interpolation: the store has 'bicubic', this run wants None",
        "class_names",
        "another --output",
    ):
        assert part in message
    assert "dtype" not in message


def test_create_store__redoes_an_interrupted_set_up(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(part_store, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            create_store(path, IDENTITY, PLAN, NAMES)
    (path / "plan/part-00009.parquet").write_bytes(b"of an earlier, longer plan")
    fill(path)
    complete_store(path)
    assert digests(path) == digests(finished)


@pytest.mark.parametrize("name", ["photo.jpg", "plan/notes.txt", "commits/00000.json"])
def test_create_store__leaves_a_foreign_folder_alone(tmp_path: Path, name: str) -> None:
    files.write_atomically(tmp_path / name, b"mine")
    with pytest.raises(SettingError, match=name.split("/")[0]):
        create_store(tmp_path, IDENTITY, PLAN, NAMES)
    assert digests(tmp_path).keys() == {name}


def test_create_store__long_plan_is_cut_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_store, "_PLAN_ROWS", 10)
    fill(tmp_path)
    complete_store(tmp_path)
    assert len(list((tmp_path / "plan").iterdir())) == 5
    assert PartStore.open(tmp_path).plan().to_pydict() == PLAN.to_pydict()


def test_meta__pandas_reads_the_folder(store: Path) -> None:
    # The first file has no bad image when image 3 is mended: its error columns are all null.
    write_shard(store, 0, *content(0, bad=set()))
    (store / "meta/.part-00001.parquet.0f.tmp").write_bytes(b"PAR1 half")
    frame = pd.read_parquet(store / "meta")
    assert frame["index"].tolist() == list(range(43))
    assert frame.loc[40, "error"] == "file is cut"
    assert frame["error"].notna().sum() == 1
    assert frame["part_areas"].iloc[0].tolist() == [np.float32(0.2)] * 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.zeros((8, 4, 3), np.uint8)}, "labels"),
        ({"labels": np.zeros((8, 3, 4), np.int64)}, "int64"),
        ({"labels": np.full((8, 3, 4), 5, np.uint8)}, "not below 5"),
        ({"class_attention": None}, "class_attention"),
        ({"class_attention": np.full((8, 2, 3, 4), np.nan, np.float16)}, "class_attention"),
        ({"meta": content(1)[1]}, "indices 0 to 8"),
        ({"meta": content(0)[1].drop_columns(["error"])}, "error"),
    ],
)
def test_write_shard__refuses_what_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    create_store(tmp_path, IDENTITY, PLAN)
    given = dict(
        zip(("labels", "meta", "class_attention", "probabilities"), content(0), strict=True)
    )
    with pytest.raises(MismatchError, match=words):
        write_shard(tmp_path, 0, **{**given, **changes})
    assert committed_shards(tmp_path) == set()


def test_write_shard__refuses_an_array_the_store_has_not(tmp_path: Path) -> None:
    create_store(tmp_path, replace(IDENTITY, probabilities=False), PLAN)
    with pytest.raises(MismatchError, match="without probabilities"):
        write_shard(tmp_path, 0, *content(0))
    with pytest.raises(IndexError):
        write_shard(tmp_path, 6, *content(0))


def test_part_store__open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"plan\.json"):
        PartStore.open(tmp_path / "absent")
    create_store(tmp_path, replace(IDENTITY, attention_heads=0), PLAN)
    with pytest.raises(DamageError, match="extract-parts"):
        PartStore.open(tmp_path)


def test_part_store__array_that_is_not_kept_is_missing(tmp_path: Path) -> None:
    identity = replace(IDENTITY, images=3, attention_heads=0, probabilities=False)
    create_store(tmp_path, identity, PLAN.slice(0, 3))
    write_shard(tmp_path, 0, *content(0, identity, set())[:2])
    complete_store(tmp_path)
    store = PartStore.open(tmp_path)
    for read in (store.class_attention, store.probabilities):
        with pytest.raises(MissingError, match="has no"):
            read()


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


def test_labels__cache_of_a_rebuilt_store_is_not_read(store: Path) -> None:
    stale = np.array(PartStore.open(store).labels())
    labels, *rest = content(1)
    write_shard(store, 1, (labels + 1) % IDENTITY.parts, *rest)
    complete_store(store)
    fresh = PartStore.open(store).labels()
    assert np.array_equal(fresh[8:16], (labels + 1) % IDENTITY.parts)
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
    monkeypatch.setattr(part_store, "_Codec", None)  # the second time nothing is decoded
    assert np.array_equal(PartStore.open(store).labels(), labels)


def test_write_shard__full_disk_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_store(tmp_path, IDENTITY, PLAN)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="free some space"):
        write_shard(tmp_path, 0, *content(0))
    assert committed_shards(tmp_path) == set()


@pytest.mark.parametrize("images", [1, 7, 512, 1000, 1024, 1025])
def test_part_store__sizes_around_chunk_and_shard(tmp_path: Path, images: int) -> None:
    identity = replace(
        IDENTITY, images=images, shard_size=1024, attention_heads=0, probabilities=False
    )
    create_store(tmp_path, identity, pa.table({"index": range(images)}))
    for shard in range(identity.shards):
        write_shard(tmp_path, shard, *content(shard, identity, set())[:2])
    complete_store(tmp_path)
    labels = PartStore.open(tmp_path).labels()
    want = [content(shard, identity, set())[0] for shard in range(identity.shards)]
    assert np.array_equal(labels, np.concatenate(want))


@given(images=st.integers(1, 10_000_000))
@settings(max_examples=200, deadline=None)
def test_shard_size_for__is_the_nearest_power_of_two(images: int) -> None:
    size = shard_size_for(images)
    assert size in {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}
    for other in (size // 2, size * 2):
        if 32 <= other <= 8192:
            assert abs(size - images / 160) <= abs(other - images / 160)


def test_shard_size_for__known_sizes() -> None:
    assert [shard_size_for(n) for n in (1, 5_000, 100_000, 1_281_167)] == [32, 32, 512, 8192]


@given(images=st.integers(1, 5000), size=st.sampled_from([1, 32, 512, 1024]))
@settings(max_examples=50, deadline=None)
def test_shard_range__ranges_partition_the_images(images: int, size: int) -> None:
    identity = replace(IDENTITY, images=images, shard_size=size)
    ranges = [identity.shard_range(shard) for shard in range(identity.shards)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(images))
    for outside in (-1, identity.shards):
        with pytest.raises(IndexError):
            identity.shard_range(outside)


@pytest.mark.parametrize(
    "changes",
    [{"images": 0}, {"shard_size": 700}, {"grid": (0, 4)}, {"parts": 256}, {"background": 5},
     {"attention_heads": -1}, {"batch_size": 0}],
)  # fmt: skip
def test_store_identity__refuses_what_no_store_can_hold(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        replace(IDENTITY, **changes)


def test_store_identity__record_round_trip() -> None:
    again = StoreIdentity.from_record(IDENTITY.to_record())
    assert again.to_record() == IDENTITY.to_record()
    assert (again.grid, again.image_size) == (IDENTITY.grid, IDENTITY.image_size)


def slow_round(value: float, kept: int) -> float:
    """The nearest number with ``kept`` mantissa bits, half to even, in plain arithmetic."""
    if value == 0:
        return value
    exponent = max(int(np.floor(np.log2(abs(value)))), -14)
    step = 2.0 ** (exponent - kept)
    return round(value / step) * step


@pytest.mark.parametrize("kept", [3, 6, 9])
def test_round_mantissa__equals_the_slow_reference(kept: int) -> None:
    every = np.arange(0x7BFF, dtype=np.uint16)[::7].view(np.float16)
    values = np.concatenate([every, -every])
    values = values[np.abs(values) < 32768]  # above, rounding up may overflow
    want = np.array([slow_round(float(v), kept) for v in values], dtype=np.float16)
    assert np.array_equal(round_mantissa(values, kept), want)
