import io
import shutil
import zlib
from concurrent.futures import Future
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from semmae.errors import DamageError, MismatchError, SettingError, UserError
from semmae.pipeline import plan_rows
from semmae.pipeline.image_loading import LoadedImage
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.watching import Tell
from semmae.stages import extract_parts as extract_parts_module
from semmae.stages import extraction_identity as module
from semmae.stages import store_filling
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_forecast import forecast_extraction, seconds_together
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.learn_parts import learn_parts
from semmae.stages.pretrain import pretrain, pretraining_data
from semmae.stages.worker_settings import WorkerSettings
from semmae.storage import part_check
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, lasting_bytes, learn_options, pretrain_options


def options_for(world: World, output: Path, **changes: object) -> ExtractPartsOptions:
    plain = ExtractPartsOptions(data=world.data, learner=world.learner, output=output)
    return replace(plain, **changes)  # type: ignore[arg-type]


def with_size(png: bytes, side: int) -> bytes:
    """A PNG whose header says that it is ``side`` x ``side``, with a right checksum."""
    header = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def add_bad_images(data: Path) -> dict[str, str]:
    """Put bad images among the good ones; their keys with the code expected of each."""
    folder = sorted((data / "train").iterdir())[0]
    good = sorted(folder.iterdir())[0].read_bytes()
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 40).convert("RGB").save(jpeg, format="JPEG")
    files = {
        "a-truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "truncated"),
        "b-empty.jpg": (b"", "empty"),
        "c-text.jpg": (b"not an image at all\n", "not-an-image"),
        "d-nothing.png": (with_size(good, 0), "no-pixels"),
        "e-bomb.png": (with_size(good, 60_000), "too-large"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {f"train/{folder.name}/{name}": code for name, (_, code) in files.items()}


@pytest.mark.xdist_group("ray")
def test_extract_parts__ray_workers_write_the_same_bytes_as_none(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extract_parts(options_for(world, tmp_path / "none", cache_images=24))
    capfd.readouterr()
    extract_parts(options_for(world, tmp_path / "ray", cache_images=24, workers=2))
    out, said = capfd.readouterr()
    assert not out
    # On a busy machine one of the workers may have made all of so few shards.
    told = ("1 worker, ", "2 workers, ")
    own = ("extracting parts: ", "checking: ", *told, f"{tmp_path / 'ray'}: begins ")
    assert [line for line in said.splitlines() if not line.startswith(own)] == []  # none of Ray's
    here, there = lasting_bytes(tmp_path / "none"), lasting_bytes(tmp_path / "ray")
    assert {"images/00000.jpeg", "images/00002.jpeg"} <= here.keys()
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_extract_parts__on_one_device_without_ray_finds_the_same_parts(
    device: str, precision: str, world: World, tmp_path: Path
) -> None:
    extract_parts(
        options_for(
            *(world, tmp_path / "store"),
            device=device,
            precision=precision,
            class_attention=True,
            probabilities=True,
        )
    )
    store, known = PartStore.open(tmp_path / "store"), PartStore.open(world.store)
    assert (np.asarray(store.labels()) == np.asarray(known.labels())).mean() >= 0.98
    there = ["key", "status", "crc32"]
    assert store.meta(there).equals(known.meta(there))
    total = np.asarray(store.probabilities()[:], dtype=np.float32).sum(axis=1)
    np.testing.assert_allclose(total, 1.0, atol=0.01)
    attention = np.asarray(store.class_attention()[:], dtype=np.float32)
    assert (attention >= 0).all()
    assert (attention.sum(axis=(2, 3)) <= 1.01).all()


def test_extract_parts__of_a_plan_in_a_file_is_that_of_one_in_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "RUN_ROWS", 20)
    monkeypatch.setattr(plan_rows, "TABLE_ROWS", 8)
    options = options_for(world, tmp_path / "store")
    forecast = forecast_extraction(options)
    assert forecast["images"].startswith("72, ")
    extract_parts(options)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)
    assert forecast_extraction(options)["done already"] == 72
    settings = pretrain_options(world, tmp_path, masking="semantic", parts=world.store)
    fingerprint = pretraining_data(settings).fingerprint
    monkeypatch.undo()
    assert pretraining_data(settings).fingerprint == fingerprint


def test_extract_parts__another_learner_at_the_same_path_writes_nothing(
    world: World, tmp_path: Path
) -> None:
    learner, other = tmp_path / "learner", tmp_path / "other"
    shutil.copytree(world.learner, learner)
    learn_parts(learn_options(world, other, seed=1))

    def swapped(settings: WorkerSettings) -> ExtractionWorker:
        shutil.rmtree(learner)
        other.rename(learner)
        return ExtractionWorker(settings)

    options = options_for(world, tmp_path / "store", learner=learner)
    with pytest.raises(MismatchError, match=r"learner on .* is not the learner that .*store was"):
        extract_parts(options, swapped)
    assert list((tmp_path / "store").glob("commits/*")) == []


def test_extract_parts__a_row_group_of_many_shards_is_read_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sorted(Path(world.data).glob("train/*/*"))
    column = pa.array([{"bytes": image.read_bytes(), "path": image.name} for image in images])
    pq.write_table(pa.table({"image": column}), tmp_path / "some.parquet")
    read = pq.ParquetFile.read_row_group
    groups = []

    def counted(self: pq.ParquetFile, group: int, **how: Any) -> pa.Table:
        groups.append(group)
        return read(self, group, **how)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    extract_parts(options_for(world, tmp_path / "store", data=str(tmp_path / "some.parquet")))
    assert PartStore.open(tmp_path / "store").identity.shards == 3
    assert groups == [0]


def test_extract_parts__other_versions_than_before_are_told(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = options_for(world, tmp_path / "store")
    extract_parts(options)
    (tmp_path / "store/commits/00001.json").unlink()
    extract_parts(options)
    assert "versions are others" not in capsys.readouterr().err
    (tmp_path / "store/commits/00001.json").unlink()
    monkeypatch.setattr(
        "semmae.stages.store_filling.version",
        lambda name: "0.1+cpu" if name == "torch" else version(name),
    )
    extract_parts(options)
    assert "in the run before: torch 0.1 (2." in capsys.readouterr().err


def test_extract_parts__every_patch_of_every_image_has_a_part(world: World) -> None:
    store = PartStore.open(world.store)
    assert store.identity.images == 72
    assert store.labels().shape == (72, 4, 4)
    assert store.ok().all()
    assert int(np.asarray(store.labels()).max()) < store.identity.parts


def test_extract_parts__meta_opens_in_pandas(world: World) -> None:
    meta = pd.read_parquet(world.store / "meta")
    assert len(meta) == 72
    assert meta["key"].is_unique
    assert meta["confidence"].between(0, 1).all()
    areas = np.stack(meta["part_areas"].to_list())
    np.testing.assert_allclose(areas.sum(axis=1), 1, atol=1e-6)


def test_extract_parts__bad_images_are_rows_and_never_reach_pretraining(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    bad = add_bad_images(data)
    record = extract_parts(options_for(world, tmp_path / "store", data=str(data)))
    assert (record["ok"], record["bad"]) == (72, len(bad))
    meta = pd.read_parquet(tmp_path / "store" / "meta").set_index("key")
    for key, code in bad.items():
        row = meta.loc[key]
        assert row["status"] == "bad"
        assert row["error"]
        assert row["error_code"] == code
    found = meta[meta["status"] == "bad"]
    assert set(found.index) == set(bad)
    moved = replace(world, root=world.root)
    options = pretrain_options(moved, tmp_path / "run", data=str(data), masking="semantic")
    options = replace(options, parts=tmp_path / "store")
    assert len(pretraining_data(options)) == 72
    assert pretrain(options).is_file()


def test_extract_parts__bad_images_leave_the_maps_of_others_alone(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    add_bad_images(data)
    extract_parts(options_for(world, tmp_path / "store", data=str(data)))
    here, there = PartStore.open(world.store), PartStore.open(tmp_path / "store")
    place = {key: row for row, key in enumerate(there.meta(["key"])["key"].to_pylist())}
    rows = [place[key] for key in here.meta(["key"])["key"].to_pylist()]
    # Their neighbours in the batch are others now; the network's last bits may follow, no more.
    same = np.asarray(here.labels()) == np.asarray(there.labels())[rows]
    assert same.mean() > 0.999


class Stops(ExtractionWorker):
    """A worker that breaks off at its second shard."""

    def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
        if shard == 1:
            raise KeyboardInterrupt
        return super().__call__(shard, tell)


def test_extract_parts__an_interrupted_run_ends_as_one_that_was_not(
    world: World, tmp_path: Path
) -> None:
    options = options_for(world, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options, Stops)
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(tmp_path / "store")
    extract_parts(options)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)


def test_extract_parts__another_learner_is_refused(world: World, tmp_path: Path) -> None:
    from semmae.stages.learn_parts import learn_parts

    learn_parts(learn_options(world, tmp_path / "other", seed=9))
    before = lasting_bytes(world.store)
    with pytest.raises(MismatchError, match="learner_hash"):
        extract_parts(options_for(world, world.store, learner=tmp_path / "other"))
    assert lasting_bytes(world.store) == before


def test_extract_parts__other_images_are_refused_with_what_differs(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    first, second, *_ = sorted((data / "train").rglob("*.png"))
    first.rename(first.with_name("new.png"))
    second.write_bytes(second.read_bytes() + b"!")
    told = r"1 images were added, such as .*/new\.png; 1 images were removed, such as .*; "
    told += "1 images have another size in bytes, such as .*--update"
    with pytest.raises(MismatchError, match=told):
        extract_parts(options_for(world, world.store, data=str(data)))


def test_extract_parts__more_workers_than_fit_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--workers is 640"):
        extract_parts(options_for(world, tmp_path / "store", workers=640))


def test_extract_parts__a_part_store_of_a_single_parquet_file(world: World, tmp_path: Path) -> None:

    images = sorted(Path(world.data, "train").rglob("*.png"))[:40]
    column = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    table = pa.table({"image": column, "label": pa.array([0] * len(images), pa.int64())})
    pq.write_table(table, tmp_path / "some.parquet")
    record = extract_parts(
        options_for(world, tmp_path / "store", data=str(tmp_path / "some.parquet"))
    )
    assert (record["ok"], record["bad"]) == (40, 0)


# Other precisions and batch sizes.


def test_extract_parts__half_precision_says_how_many_labels_are_as_in_full(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract_parts(options_for(world, tmp_path / "store", precision="bf16"))
    told = next(line for line in capsys.readouterr().err.splitlines() if "labels in bf16" in line)
    here, there = PartStore.open(world.store).labels(), PartStore.open(tmp_path / "store").labels()
    # Batches of this small set are whole shards: all are compared.
    share = float((here == there).mean())
    assert f"{share:.2%} of {72 * 16} patches, from 3 shards, as in fp32" in told
    assert ("consider --precision fp32" in told) == (share < 0.995)


def test_extract_parts__half_precision_is_compared_in_one_batch_of_shards_far_apart(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compared = []

    class Notes(ExtractionWorker):
        def _encode(self, loaded: list[LoadedImage], precision: str = "") -> Any:
            if precision == "fp32":
                compared.append(len(loaded))
            return super()._encode(loaded, precision)

    monkeypatch.setattr(extract_parts_module, "CHECKED_SHARDS", 2)
    options = options_for(world, tmp_path / "store", precision="bf16", batch_size="8")
    extract_parts(options, Notes)
    assert compared == [8, 8]
    assert f"of {2 * 8 * 16} patches, from 2 shards, as in fp32" in capsys.readouterr().err
    assert extract_parts_module._spread([3, 5, 6, 7, 9], 2) == [3, 6]
    assert extract_parts_module._spread([3, 5], 8) == [3, 5]


def test_extract_parts__half_precision_that_is_not_compared_is_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract_parts(options_for(world, tmp_path / "old", precision="bf16"))
    capsys.readouterr()
    extract_parts(options_for(world, tmp_path / "new", precision="bf16", update=tmp_path / "old"))
    told = "labels in bf16 were not compared with those in fp32: of the 3 shards"
    assert told in capsys.readouterr().err


def test_extract_parts__an_automatic_batch_size_is_kept_by_the_store(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(learner: Path, device: str, precision: str, sharing: int) -> int:
        measured.append(learner)
        return 12

    monkeypatch.setattr(module, "fastest_batch_size", measure)
    options = options_for(world, tmp_path / "store", batch_size="auto")
    extract_parts(options)
    (tmp_path / "store/commits/00001.json").unlink()
    extract_parts(options)
    assert PartStore.open(tmp_path / "store").identity.batch_size == 12
    assert len(measured) == 1


def test_fastest_batch_size__is_one_that_the_network_takes(world: World) -> None:
    size = module.fastest_batch_size(world.learner, "cpu", "fp32")
    assert size in {8 << power for power in range(8)}


@pytest.mark.parametrize("told", ["DefaultCPUAllocator: can't allocate memory", "full"])
def test_fastest_batch_size__ends_where_memory_does(
    world: World, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    calls = []

    def seconds(*about: object) -> float:
        calls.append(about)
        if len(calls) == 3:
            raise RuntimeError(told)
        return 1.0

    monkeypatch.setattr(module, "_seconds", seconds)
    if told == "full":  # which says nothing of memory
        with pytest.raises(RuntimeError, match="full"):
            module.fastest_batch_size(world.learner, "cpu", "fp32")
    else:
        assert module.fastest_batch_size(world.learner, "cpu", "fp32") == 16


@pytest.mark.parametrize("size", ["0", "-3", "many", "1.5"])
def test_extract_parts__no_batch_size_is_refused(world: World, tmp_path: Path, size: str) -> None:
    with pytest.raises(SettingError, match=r"--batch-size is .*: expected auto, or a number"):
        options_for(world, tmp_path / "store", batch_size=size)


# What a run would do.


def test_forecast__says_what_there_is_and_writes_nothing(world: World, tmp_path: Path) -> None:
    told = forecast_extraction(options_for(world, tmp_path / "store", workers=2))
    assert told["images"].startswith("72, ")
    assert told["shards"] == "3 of 32 images"
    assert told["workers"] == "2 on cpu"
    assert not (tmp_path / "store").exists()
    assert forecast_extraction(options_for(world, world.store))["done already"] == 72


def test_seconds_together__workers_take_whole_shards() -> None:
    assert [seconds_together(70, 7, workers) for workers in (1, 2, 6, 7, 256)] == [
        70,
        40,
        20,
        10,
        10,
    ]
    assert seconds_together(0, 0, 2) == 0


def test_forecast__its_store_is_about_as_large_as_the_real_one(world: World) -> None:
    told = forecast_extraction(options_for(world, world.store))["store"]
    size = sum(map(len, lasting_bytes(world.store).values()))
    assert float(told.split()[-4]) * 72 == pytest.approx(size, rel=0.2)


def test_forecast__another_learner_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="dtype"):
        forecast_extraction(options_for(world, world.store, precision="bf16"))


# What must not end up in a store.


class Overflows(ExtractionWorker):
    """A worker whose network gives no numbers."""

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        made = super()._encode(loaded, precision)
        made["confidence"][1] = float("nan")
        return made


def test_extract_parts__maps_that_are_no_numbers_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the part map of train/.*\.png holds values that are no"):
        extract_parts(options_for(world, tmp_path / "store"), Overflows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_timeout": -1.0}, "--decode-timeout is -1.0: expected 0 or more"),
        ({"decode_timeout": float("nan")}, "--decode-timeout is nan: expected finite"),
        ({"device": "gpu"}, "expected auto, cpu"),
        ({"device": "cuda:1", "workers": 1}, "of its own"),
    ],
)
def test_extract_parts__options_that_cannot_be_are_refused(
    world: World, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        options_for(world, tmp_path / "store", **changes)


def test_extract_parts__leaves_what_another_writer_commits_meanwhile(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(world, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options, Stops)
    look = part_check.damaged_shards

    def while_another_writes(*given: Any) -> set[int]:
        found = look(*given)
        monkeypatch.setattr(store_filling, "damaged_shards", look)
        extract_parts(options)
        return found

    monkeypatch.setattr(store_filling, "damaged_shards", while_another_writes)
    extract_parts(options, lambda settings: 1 / 0)  # type: ignore[arg-type,return-value]
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)
