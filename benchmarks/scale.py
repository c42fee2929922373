"""What a made-up data set of N images costs before the first image is read.

Run: ``python -m semmae.benchmarks.scale [--images 100_000_000] [--folder work/scale]``.

A listing in scattered order (folders of 1000 images with names as ImageNet has them, seeded sizes)
is planned and set up as a part store, as extraction does; what a dry run and a resumed run look at
is looked at; commit records are made up, whose objects are links to those of a few shards, and
checked as at the end of an extraction; and a first batch of pretraining, with semantic masks, takes
its part maps from a sparse file of N x 14 x 14 bytes.  Each line is of one step: wall time, CPU
time, and the peak memory of the process so far.  The folder is removed at the end.
"""

import argparse
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semmae.pipeline import plan_rows
from semmae.pipeline.crops import Pixels
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.loaders import PretrainingData
from semmae.pipeline.mask_policies import MaskSchedule
from semmae.pipeline.part_maps import PartMaps
from semmae.pipeline.plan import Plan
from semmae.pipeline.schedule import Schedule
from semmae.stages.extraction_forecast import choose_samples, images_left
from semmae.storage.files import write_json
from semmae.storage.part_check import committed_shards, complete_store, damaged_shards
from semmae.storage.part_identity import META_SCHEMA, StoreIdentity, shard_size_for
from semmae.storage.part_records import commit_path, object_names, read_commit
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard

T = TypeVar("T")

A_FOLDER, CLASSES, PARTS, BATCH = 1000, 1000, 7, 256
_LINKS = 30_000
"""Names of one file, at most: file systems allow 32,000 to 65,000."""


def listing(images: int) -> Iterator[pa.Table]:
    """A made-up walk over folders, in scattered order, as file systems give names."""
    rng = np.random.default_rng(0)
    for folder in rng.permutation(-(-images // A_FOLDER)).tolist():
        count = min(A_FOLDER, images - folder * A_FOLDER)
        wnid = f"n{folder:08d}"
        numbers = pa.array(rng.permutation(count)).cast(pa.string())
        names = pc.binary_join_element_wise(f"train/{wnid}/{wnid}_", numbers, ".JPEG", "")
        sizes = rng.integers(10_000, 200_000, count)
        labels = np.full(count, folder % CLASSES)
        yield plan_rows.listed_rows(names, np.full(count, -1), sizes, labels)


def identity_of(plan: Plan) -> StoreIdentity:
    return StoreIdentity(
        images=len(plan),
        shard_size=shard_size_for(len(plan)),
        grid=(14, 14),
        parts=PARTS,
        background=None,
        image_size=(224, 224),
        batch_size=32,
        dtype="fp32",
        device_type="cuda",
        plan_fingerprint=plan.fingerprint,
        learner_hash="made up",
        preprocessing={},
    )


def made_up_commits(store: Path, identity: StoreIdentity) -> None:
    """Commit every shard; after the first, the objects of shards are links to another's."""
    rng = np.random.default_rng(0)
    source = -1
    for shard in range(identity.shards):
        start, stop = identity.shard_range(shard)
        count = stop - start
        if shard % _LINKS == 0 or count < identity.shard_size:
            # Smooth maps, so that they are compressed as parts are.
            coarse = rng.integers(0, PARTS, (count, 4, 4), dtype=np.uint8)
            write_shard(
                store, shard, coarse.repeat(4, 1).repeat(4, 2)[:, :14, :14], meta(start, stop)
            )
            source = shard
            commit = read_commit(store, identity, shard)
            continue
        described = {}
        names = object_names(identity, shard), object_names(identity, source)
        for name, held in zip(*names, strict=True):
            described[name] = commit["objects"][held]
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(store / held, store / name)
        record = {**commit, "shard": shard, "start": start, "stop": stop, "objects": described}
        write_json(commit_path(store, shard), record)


def meta(start: int, stop: int) -> pa.Table:
    count = stop - start
    rng = np.random.default_rng(start)
    columns: dict[str, object] = dict.fromkeys(META_SCHEMA.names, pa.nulls(count))
    columns |= {
        "index": range(start, stop),
        "key": [
            f"train/n{i // 1000:08d}/n{i // 1000:08d}_{i % 1000}.JPEG" for i in range(start, stop)
        ],
        "label": np.zeros(count, np.int64),
        "width": np.full(count, 500, np.int32),
        "height": np.full(count, 375, np.int32),
        "crc32": rng.integers(0, 1 << 32, count),
        "status": ["ok"] * count,
        "confidence": rng.random(count, np.float32),
        "part_areas": list(rng.integers(0, 50, (count, PARTS)).astype(np.float32) / 196),
    }
    return pa.table(columns, schema=META_SCHEMA)


class OnePicture:
    """Gives the same picture for each image: what is measured here is all but decoding."""

    fingerprint = "made up"

    def __init__(self, images: int) -> None:
        self._images = images
        self._pixels: Pixels = np.zeros((256, 341, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self._images

    def decoded_or_next(self, position: int) -> tuple[int, Pixels]:
        """The picture; none is bad."""
        return position, self._pixels


def sparse_map(place: Path, images: int) -> np.ndarray:
    """Part maps uint8 (N, 14, 14) in a file that takes no room, mapped."""
    shape = (images, 14, 14)
    with place.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape, dtype=np.int64)))
    return np.load(place, mmap_mode="r")  # type: ignore[no-any-return]


def first_batch(maps: np.ndarray) -> str:
    """The first batch of a run over all images: order of the epoch, part maps, masks."""
    images = len(maps)
    schedule = Schedule(images=images, batch_size=BATCH, epochs=800, warmup_epochs=40, peak=1e-3)
    masks = MaskSchedule(policy="semantic", mask_ratio=0.75, gamma=2.0, start=0.0, end=1.0)
    data = PretrainingData(
        cast(ImageSource, OnePicture(images)),
        PartMaps(maps, np.arange(images)),
        PARTS,
        image_size=(224, 224),
        patch_size=16,
        masks=masks,
        seed=0,
    )
    batch = data.__getitems__(schedule.draws(0, schedule.permutation(0, 0)))
    masked = batch["mask"].sum(1)
    return f"{len(masked)} masks of {masked.min()} to {masked.max()} of {batch['mask'].shape[1]}"


def peak() -> float:
    """Most memory that this process, or one that it waited for, has had, bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024.0 * max(resource.getrusage(one).ru_maxrss for one in who)


def cpu() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


def step(name: str, run: Callable[[], T]) -> T:
    began, spent = time.perf_counter(), cpu()
    found = run()
    wall, spent = time.perf_counter() - began, cpu() - spent
    print(f"{name:44} {wall:8.1f} s {spent:8.1f} s CPU {peak() / 1e9:7.2f} GB", flush=True)
    return found


def told_size(place: Path) -> str:
    """Size and number of files; a link counts as the file that it stands for."""
    sizes = [file.stat().st_size for file in place.rglob("*") if file.is_file()]
    return f"{sum(sizes) / 1e6:.1f} MB in {len(sizes)} files"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where there is room; the system's by default")
    parser.add_argument("--run-rows", type=int, help="rows sorted at once")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(given.folder)
    plan_rows.RUN_ROWS = given.run_rows or plan_rows.RUN_ROWS
    print(
        f"{given.images:,} images; {platform.processor() or platform.machine()}, {os.cpu_count()} "
        f"processors, Python {platform.python_version()}, pyarrow {pa.__version__}; "
        f"{peak() / 1e9:.2f} GB to begin with"
    )
    folder = Path(tempfile.mkdtemp(prefix="semmae-scale-"))
    try:
        measure(given.images, folder)
    finally:
        shutil.rmtree(folder)


def measure(images: int, folder: Path) -> None:
    store, names = folder / "store", [f"class {number}" for number in range(CLASSES)]
    rows = step("list and sort", lambda: plan_rows.sorted_rows(listing(images)))
    plan = step("check the order", lambda: Plan("/data", rows, tuple(names)))
    identity = step("fingerprint", lambda: identity_of(plan))
    where = "memory" if isinstance(rows, pa.Table) else "a temporary file"
    print(f"    plan: {rows.nbytes / 1e6:.1f} MB in {where}; {plan.fingerprint[:12]}")
    step("set up the store", lambda: create_store(store, identity, plan.tables(), names))
    print(f"    plan files of the store: {told_size(store)}")

    def dry_run() -> str:
        left = images_left(store, identity, plan)
        sample = choose_samples(identity, plan, left).encoded
        return (
            f"{len(plan):,} images, {plan.total_bytes / 1e12:.2f} TB encoded, {identity.shards} "
            f"shards of {identity.shard_size}, {np.count_nonzero(left):,} images left, "
            f"{len(sample)} of them to try"
        )

    print(f"    {step('dry run, up to its first image', dry_run)}")
    step(
        "set up again, as a resumed run does",
        lambda: create_store(store, identity, plan.tables(), names),
    )
    step("(make up commits)", lambda: made_up_commits(store, identity))
    size = commit_path(store, 0).stat().st_size
    print(f"    a record: {size} bytes; the store: {told_size(store)}")
    step("committed shards", lambda: committed_shards(store))
    step("check all shards, at the start of a run", lambda: damaged_shards(store))
    step("check all shards, at its end", lambda: complete_store(store))
    step("open, which images are good", lambda: PartStore.open(store).ok())
    maps = step("map the part maps", lambda: sparse_map(folder / "labels.npy", images))
    print(f"    {maps.nbytes / 1e9:.2f} GB, none of it on disk")
    print(f"    {step('first batch of pretraining', lambda: first_batch(maps))}")


if __name__ == "__main__":
    main()
