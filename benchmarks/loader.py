"""What the loader of pretraining costs beside the official recipe; how soon and small it starts.

Run: ``python -m semmae.benchmarks.loader [speed | start | all] [--images FOLDER] [--count 200]
[--rounds 15] [--started 1281167]``.

FOLDER holds photographs at full resolution, as ``--data`` takes them; without one, JPEGs of the
size and bytes of ImageNet's are made of generated creatures.

**speed**: batches of stage 2 at 224 pixels (read, decode, crop, flip, semantic mask) from the
images themselves, and from a part store's cache of JPEGs and of raw pixels at short side 256.  The
official recipe beside them is torchvision's ImageFolder (PIL, converted to RGB) with
RandomResizedCrop (bicubic) and flip; ratios are to the recipe up to here, and then with ToTensor,
Normalize and collation, too.  A round takes the CPU time of each subject in turn, on one thread,
files in the system's page cache; a ratio is to the recipe of the same round.  Pixels are compared
in the same boxes, the recipe's turned upright as EXIF says.  What maps and masks cost is timed
inside the batches.

**start**: a part store of made-up parts, and a folder of as many images, links to the few; a
process makes the data and the loader of a run with two workers and takes batches.  A worker's own
memory is its private pages, less those of a loader worker of a process that imported torch alone.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from semmae.benchmarks.extraction import ONE_THREAD, linked
from semmae.benchmarks.intervals import interval
from semmae.pipeline.cached_images import QUALITY, RECIPES, CachedImages, kept_image
from semmae.pipeline.creatures import draw_creature
from semmae.pipeline.decoding import decode_image
from semmae.pipeline.feeding import batches_of
from semmae.pipeline.image_source import ImageSource, spread
from semmae.pipeline.loaders import PretrainingData, _cropped
from semmae.pipeline.mask_policies import MaskSchedule
from semmae.pipeline.part_maps import PartMaps
from semmae.pipeline.plan import Plan
from semmae.pipeline.schedule import BatchSampler, Draw, Schedule
from semmae.pipeline.sources import ImageReader, list_images
from semmae.stages.pretrain import PretrainOptions, pretraining_data
from semmae.storage.image_cache import write_image_cache
from semmae.storage.part_check import complete_store
from semmae.storage.part_identity import META_SCHEMA, StoreIdentity, shard_size_for
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard

SIDE, CROP, BATCH = 256, 224, 64
WORKERS, WATCHED = 2, 20
"""Loader workers of a start, and batches that they are watched for."""
GRID, PARTS, SCALE = (14, 14), 7, (0.2, 1.0)
MODULE = "semmae.benchmarks.loader"
OFFICIAL, WITH_TENSOR = "official recipe", "official recipe, with its tensor"
WANTED = {"images themselves": "1.8, better 1.95", "JPEG cache": "4.5, better 5"}
WANTED |= {"raw cache": "9, better 12"}
"""Least speed that is wanted, in official recipes."""


def made_up_photographs(folder: Path, count: int) -> Path:
    """JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet has them: creatures under noise."""
    for number in range(count):
        place = folder / f"n{number % 10:08d}" / f"{number:05d}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw_creature(0, number, size=500).image[62:437]
        noise = np.random.default_rng(number).normal(0, 7, pixels.shape)
        noisy = np.clip(pixels + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place, quality=95, subsampling="4:2:0")
    return folder


def chosen_images(folder: Path, count: int, place: Path) -> Plan:
    """Images spread evenly over a folder, in a folder of their own as ImageFolder takes them."""
    plan = list_images(folder)
    for number, row in enumerate(spread(len(plan), count).tolist()):
        link = place / f"n{number % 10:08d}" / f"{number:05d}.JPEG"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(plan.root) / plan.key(row))
    return list_images(place)


def store_of(plan: Plan, path: Path, form: str) -> PartStore:
    """A store of the images with made-up parts, smooth as real ones, and with a cache or none."""
    identity = StoreIdentity(
        images=len(plan),
        shard_size=shard_size_for(len(plan)),
        grid=GRID,
        parts=PARTS,
        background=None,
        image_size=(CROP, CROP),
        batch_size=1,
        dtype="uint8",
        device_type="cpu",
        plan_fingerprint=plan.fingerprint,
        learner_hash="made up",
        preprocessing={},
        image_cache=form,
        image_cache_side=SIDE if form else 0,
        image_cache_recipe=RECIPES.get(form, ""),
    )
    create_store(path, identity, plan.tables(), plan.class_names)
    reader, rng = ImageReader(plan), np.random.default_rng(0)
    for shard in range(identity.shards):
        start, stop = identity.shard_range(shard)
        with write_image_cache(path, identity, shard) as cache:
            if cache is not None:
                encoded = map(reader.read, range(start, stop))
                cache.extend(kept_image(data, decode_image(data), SIDE, form) for data in encoded)
        coarse = rng.integers(0, PARTS, (stop - start, 4, 4), dtype=np.uint8)
        write_shard(
            path,
            shard,
            coarse.repeat(4, 1).repeat(4, 2)[:, : GRID[0], : GRID[1]],
            meta_of(plan, start, stop),
            image_cache=cache.description if cache else None,
        )
    complete_store(path)
    return PartStore.open(path)


def meta_of(plan: Plan, start: int, stop: int) -> pa.Table:
    """What a store tells of images that could all be read."""
    count = stop - start
    columns: dict[str, object] = dict.fromkeys(META_SCHEMA.names, pa.nulls(count))
    known = plan.take(np.arange(start, stop))
    columns |= {name: known[name] for name in ("index", "key", "label")}
    columns["status"] = ["ok"] * count
    return pa.table(columns, schema=META_SCHEMA)


# Speed.


def data_of(
    images: ImageSource, store: PartStore, kind: type[PretrainingData] = PretrainingData
) -> PretrainingData:
    masks = MaskSchedule(policy="semantic", mask_ratio=0.75, gamma=2.0, start=0.0, end=1.0)
    return kind(
        images,
        PartMaps(store.labels(), np.arange(len(images))),
        PARTS,
        image_size=(CROP, CROP),
        patch_size=16,
        masks=masks,
        seed=0,
        crop_scale=SCALE,
    )


def draws_of(images: int, size: int) -> Iterator[list[Draw]]:
    """One epoch in order, in batches."""
    for first in range(0, images, size):
        yield [Draw(i, 0, i / images) for i in range(first, min(first + size, images))]


def batches(data: PretrainingData) -> None:
    for draws in draws_of(len(data), BATCH):
        data.__getitems__(draws)


class Parts(PretrainingData):
    """The same data, which tells the CPU seconds that its maps and masks took."""

    spent = 0.0

    def _masks_of(self, *batch: Any) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
        began = time.process_time()
        made = super()._masks_of(*batch)
        self.spent += time.process_time() - began
        return made


def cache_images(plan: Plan, store: PartStore) -> CachedImages:
    every = np.arange(len(plan))
    return CachedImages(plan, every, store, every)


def recipe(folder: str, *last: Any) -> ImageFolder:
    """The images as MAE's released code augments them."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(CROP, scale=SCALE, interpolation=bicubic)
    return ImageFolder(folder, transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last]))


def official(images: ImageFolder, collate: Callable[[list[Any]], Any]) -> None:
    for first in range(0, len(images), BATCH):
        collate([images[i] for i in range(first, min(first + BATCH, len(images)))])


def pixel_errors(images: ImageSource) -> NDArray[np.float64]:
    """Mean absolute difference of each crop from the recipe's in the same box, grey levels (N,)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    errors = []
    for draws in draws_of(len(images), BATCH):
        crops = _cropped(images, draws, 0, SCALE, (CROP, CROP))
        for draw, ours, box, flip in zip(
            draws, crops.pixels, crops.boxes.tolist(), crops.mirrored, strict=True
        ):
            top, left, bottom, right = box
            with Image.open(Path(images.plan.root, images.plan.key(draw.index))) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
            place = top, left, bottom - top, right - left
            cut = functional.resized_crop(upright, *place, [CROP, CROP], bicubic)
            theirs = np.array(functional.hflip(cut) if flip else cut)
            errors.append(np.abs(ours.astype(int) - theirs).mean())
    return np.array(errors)


def measured(subjects: dict[str, Callable[[], None]], rounds: int) -> dict[str, NDArray[Any]]:
    """CPU seconds of each subject in each round, all in turn, after one run of each to warm up."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds + 1):
        for name, run in subjects.items():
            began = time.process_time()
            run()
            if turn:
                found[name].append(time.process_time() - began)
    return {name: np.array(seconds) for name, seconds in found.items()}


def told(values: NDArray[Any], digits: int = 2) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def told_of_sizes(plan: Plan, jpeg: CachedImages, raw: CachedImages) -> str:
    """Bytes of an image in each cache, and what the JPEG loses against the raw pixels."""
    pairs = [(jpeg.decoded(i).astype(float), raw.decoded(i).astype(float)) for i in range(len(raw))]
    noise = 10 * math.log10(255**2 / np.mean([np.square(a - b).mean() for a, b in pairs]))
    off = np.mean([np.abs(a - b).mean() for a, b in pairs])
    kept = np.mean([len(jpeg.cache.read(i)) for i in range(len(raw))])
    return (
        f"an image: {plan.sizes.mean() / 1e3:.1f} kB in the folder, {kept / 1e3:.1f} kB as JPEG of "
        f"quality {QUALITY} ({noise:.1f} dB, {off:.2f} of 255 off the raw pixels), "
        f"{np.mean([b.size for _, b in pairs]) / 1e3:.1f} kB raw; caches made by: {RECIPES['raw']}"
    )


def speed(given: argparse.Namespace, work: Path) -> None:
    torch.set_num_threads(1)
    plan = chosen_images(given.images, given.count, work / "chosen")
    raw_store = store_of(plan, work / "raw", "raw")
    jpeg_store = store_of(plan, work / "jpeg", "jpeg")
    images, jpeg = ImageSource(plan), cache_images(plan, jpeg_store)
    raw = cache_images(plan, raw_store)
    data = data_of(images, raw_store, Parts)
    assert isinstance(data, Parts)
    shares = []

    def themselves() -> None:
        data.spent, began = 0.0, time.process_time()
        batches(data)
        shares.append(100 * data.spent / (time.process_time() - began))

    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tensors = recipe(plan.root, transforms.ToTensor(), normalise)
    found = measured(
        {
            OFFICIAL: partial(official, recipe(plan.root), lambda pairs: pairs),
            WITH_TENSOR: partial(official, tensors, default_collate),
            "images themselves": themselves,
            "JPEG cache": partial(batches, data_of(jpeg, jpeg_store)),
            "raw cache, first reads": lambda: batches(
                data_of(cache_images(plan, raw_store), raw_store)
            ),
            "raw cache": partial(batches, data_of(raw, raw_store)),
        },
        given.rounds,
    )
    print(told_of_sizes(plan, jpeg, raw))
    print(f"{len(plan)} images, batches of {BATCH}, {given.rounds} rounds, one thread")
    for name, seconds in found.items():
        wanted = f", wanted {WANTED[name]}" if name in WANTED else ""
        ratios = [told(found[base] / seconds) for base in (OFFICIAL, WITH_TENSOR)]
        cost = np.median(seconds) / len(plan) * 1e6
        sure = interval(found[OFFICIAL] / seconds)
        print(
            f"{name:33} {cost:6.0f} us {ratios[0]} x, mean {sure}{wanted}; "
            f"with its tensor {ratios[1]} x"
        )
    print(f"maps and masks: {told(np.array(shares[1:]))} % of the CPU time of a batch (wanted 1)")
    errors = pixel_errors(images)
    print(f"pixels: {errors.mean():.3f} grey levels off (wanted 0.1), {errors.max():.3f} at most")


# Start.


def own_memory(process: int) -> float:
    """Private pages of a process, MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def children() -> list[int]:
    """Processes that this one started."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(number) for number in text.split()]


BARE = """
import json, os, torch
from pathlib import Path
from torch.utils.data import DataLoader
for _ in DataLoader(list(range(100)), num_workers=1):
    print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
    input()
    break
"""
"""A process that imported torch alone, and tells the number of its loader worker."""


def bare_memory() -> float:
    """Private pages of a loader worker that only imported torch, MB."""
    process = subprocess.Popen(
        [sys.executable, "-c", BARE],
        env=ONE_THREAD,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline().split()[0])
    memory = own_memory(worker)
    process.communicate("\n")
    return memory


def started(given: argparse.Namespace, work: Path) -> None:
    """A process that starts the loader as a run does; prints what it took."""
    torch.set_num_threads(1)
    began, spent = time.time(), time.process_time()
    options = PretrainOptions(data=str(given.data), parts=given.store, output=work)
    data = pretraining_data(options)
    made: dict[str, Any] = {"fingerprint": data.fingerprint}  # a run keeps and compares it
    made |= {"data": time.time() - began, "cpu": time.process_time() - spent, "memory": 0.0}
    schedule = Schedule(len(data), BATCH, options.epochs, options.warmup_epochs, 1.0)
    sampler = BatchSampler(schedule, options.seed, 0, 1)
    with closing(batches_of(data, sampler, WORKERS, torch.device("cpu"))) as loaded:
        for number, _ in enumerate(loaded):
            made.setdefault("first", time.time() - began)
            made["memory"] = max([made["memory"], *map(own_memory, children())])
            if number == WATCHED:
                break
    print(json.dumps(made))


def start(given: argparse.Namespace, work: Path) -> None:
    data = linked(given.images, work / "data", given.started, 1281)
    print(f"{given.started:,} images, batches of {BATCH}, {WORKERS} workers", flush=True)
    began = time.time()
    plan = list_images(data)
    print(f"all of them listed with their sizes: {time.time() - began:.1f} s", flush=True)
    store_of(plan, work / "store", "")
    bare = bare_memory()
    command = [sys.executable, "-m", MODULE, "started", "--data", str(data)]
    command += ["--store", str(work / "store")]
    for turn in ("with part maps yet to be decoded", *["with part maps kept"] * 3):
        done = subprocess.run(
            command, env=ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True
        )
        made = json.loads(done.stdout)
        print(
            f"start {turn}: first batch after {made['first']:.1f} s (wanted 5), of which "
            f"{made['data']:.1f} s for the data ({made['cpu']:.1f} s CPU time); a worker "
            f"{made['memory']:.0f} MB, {made['memory'] - bare:.0f} MB above one that imported "
            "torch alone (wanted 300)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["all", "speed", "start", "started"], nargs="?")
    parser.add_argument("--images", type=Path, help="photographs; made up if not given")
    parser.add_argument("--count", type=int, default=200, help="images of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--started", type=int, default=1_281_167, help="images of the store")
    parser.add_argument("--folder", type=Path, help="where there is room; the system's by default")
    for inner in ("data", "store"):
        parser.add_argument(f"--{inner}", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="semmae-loader-", dir=given.folder) as folder:
        work = Path(folder)
        if given.part == "started":
            started(given, work)
            return
        print(
            f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, Pillow {PIL.__version__}, "
            f"simplejpeg {simplejpeg.__version__}"
        )
        if given.images is None:
            given.images = made_up_photographs(work / "made-up", given.count)
            print("photographs made up: creatures under noise, 500 x 375 pixels")
        for part in (speed, start):
            if given.part in (part.__name__, "all", None):
                part(given, work)


if __name__ == "__main__":
    main()
