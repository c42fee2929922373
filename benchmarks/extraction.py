"""What extraction costs beside its network, and how well it is placed.

Run one of these; each prints its figures beside those that are wanted::

    python -m semmae.benchmarks.extraction steady LEARNER IMAGES [--rounds 9] [--images 32]
    python -m semmae.benchmarks.extraction writing LEARNER IMAGES [--images 256] [--rounds 9]
    python -m semmae.benchmarks.extraction workers LEARNER IMAGES [--images 256] [--rounds 3]
    python -m semmae.benchmarks.extraction start LEARNER IMAGES [--rounds 3]
    python -m semmae.benchmarks.extraction plan LEARNER IMAGES [--images 1281167]
    python -m semmae.benchmarks.extraction memory LEARNER IMAGES
    python -m semmae.benchmarks.extraction placing
    python -m semmae.benchmarks.extraction verify LEARNER IMAGES [--images 20000]

LEARNER is the folder of a learn-parts run, IMAGES a folder of images.  Each process computes with
one thread.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semmae.benchmarks.intervals import interval
from semmae.pipeline.cluster import open_workers
from semmae.pipeline.image_loading import LoadedImage, load_image
from semmae.pipeline.memory import peak_resident
from semmae.pipeline.placement import Placement
from semmae.pipeline.shard_worker import OneBehind, Record
from semmae.pipeline.sources import ImageReader, list_images
from semmae.pipeline.watching import Tell
from semmae.stages import shard_writing
from semmae.stages.extract_parts import (
    ExtractPartsOptions,
    extract_parts,
    store_identity,
    worker_settings,
)
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.pace import OWN
from semmae.stages.store_care import verify_parts
from semmae.stages.store_filling import commit_shard
from semmae.stages.worker_settings import WorkerSettings
from semmae.storage.part_writer import create_store, uncommit
from semmae.storage.store_paths import sizes_below

BATCH = 8
SHARD_SECONDS = 5
IDLE_SHARDS = 12_208  # of 10^8 images
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
MODULE = "semmae.benchmarks.extraction"


def linked(images: Path, folder: Path, count: int, a_folder: int = 1000) -> Path:
    """A data set of ``count`` images that are links to those of a folder, in class folders."""
    originals = [images / path for path in list_images(images).table["path"].to_pylist()]
    # A file may have 65,000 names only.
    sources = [folder / "originals" / f".{n}" for n in range(max(len(originals), count // 30_000))]
    sources[0].parent.mkdir(parents=True)
    for source, original in zip(sources, itertools.cycle(originals), strict=False):
        shutil.copyfile(original, source)
    for number in range(count):
        place = folder / "images" / f"n{number // a_folder:08d}"
        if number % a_folder == 0:
            place.mkdir(parents=True)
        os.link(sources[number % len(sources)], place / f"{number:010d}.JPEG")
    return folder / "images"


def options_for(given: argparse.Namespace, data: Path, output: Path) -> ExtractPartsOptions:
    return ExtractPartsOptions(
        data=str(data), learner=given.learner, output=output, batch_size=str(BATCH), split="all"
    )


def made_store(
    given: argparse.Namespace, work: Path, count: int, workers: int = 0
) -> tuple[WorkerSettings, list[int]]:
    """A store that is set up for links to the images, what its workers are told, its shards."""
    data = linked(given.images_folder, work / "data", count)
    options = replace(options_for(given, data, work / "store"), workers=workers)
    plan = list_images(data)
    with open_workers(Placement(workers=0, device="cpu")) as here:
        identity = store_identity(options, plan, here, None)
        create_store(options.output, identity, plan.table, plan.class_names)
        return worker_settings(options, plan, here), list(range(identity.shards))


# One worker beside the bare network.


def steady(given: argparse.Namespace, work: Path) -> None:
    torch.set_num_threads(1)
    settings, _ = made_store(given, work, min(given.images or 32, 32))
    worker = ExtractionWorker(settings)
    plan = list_images(settings.root)
    reader, size = ImageReader(plan), worker._trained.image_size
    loaded = [load_image(reader, index, size).pixels for index in range(len(plan))]
    pixels = torch.from_numpy(np.stack([image for image in loaded if image is not None]))
    encoder, learner = worker._trained.encoder, worker._trained.learner

    @torch.no_grad()
    def bare() -> None:
        for batch in torch.split(pixels, BATCH):
            encoder(batch)

    @torch.no_grad()
    def with_learner() -> None:
        for batch in torch.split(pixels, BATCH):
            learner(encoder(batch), worker.identity.grid, batch)

    subjects: dict[str, Callable[[], Any]] = {
        "worker": lambda: worker(0).result(),
        "bare": bare,
        "learner": with_learner,
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(given.rounds + 1):
        for name, run in subjects.items():
            uncommit(settings.output, [0])
            began = time.process_time()
            run()
            if turn:  # the first one warms up
                taken[name].append(time.process_time() - began)
    worker_seconds = np.array(taken["worker"])
    for name, words in (("bare", "the encoder alone"), ("learner", "encoder and part learner")):
        ratios = (np.array(taken[name]) / worker_seconds).tolist()
        print(f"rate of a worker over {words}: {interval(ratios)} (wanted 0.95)")
    print(f"{1000 * worker_seconds.mean() / len(pixels):.1f} ms CPU an image")


# Writing that takes long.


def writing(given: argparse.Namespace, work: Path) -> None:
    """Shards whose storage takes as long as making them, written behind the worker and not."""
    torch.set_num_threads(1)
    settings, shards = made_store(given, work, given.images or 256)
    worker = ExtractionWorker(settings)
    record = worker(0).result()
    slow = sum(record["seconds"][name] for name in OWN)

    def commit_slowly(*args: Any, **arrays: Any) -> dict[str, Any]:
        time.sleep(slow)
        return commit_shard(*args, **arrays)

    shard_writing.commit_shard = commit_slowly  # type: ignore[attr-defined]

    def behind() -> None:
        given_shards = OneBehind(worker)
        for shard in shards:
            given_shards.do(shard, lambda images: None)
        given_shards.finish()

    def in_turn() -> None:
        for shard in shards:
            worker(shard).result()

    ratios = []
    for turn in range(given.rounds + 1):
        taken = []
        for run in (in_turn, behind):
            uncommit(settings.output, shards)
            began = time.monotonic()
            run()
            taken.append(time.monotonic() - began)
        if turn:  # the first one warms up
            ratios.append(taken[0] / taken[1])
    count = len(shards)
    print(
        f"{count} shards that take {slow:.2f} s to make and {slow:.2f} s more to write: "
        f"{interval(ratios)} times as fast as one after another ({2 * count / (count + 1):.2f} "
        "were all of it hidden)"
    )


# Two workers beside one.


def rate_of(store: Path, workers: int) -> float:
    """Shards a second from when every worker has done a shard to the end.

    Records of shards come one shard late, commits do not.
    """
    ends = sorted(commit.stat().st_mtime for commit in (store / "commits").iterdir())
    return (len(ends) - workers) / (ends[-1] - ends[workers - 1])


def plain(given: argparse.Namespace, work: Path) -> None:
    """A process that does shards by itself."""
    settings = WorkerSettings(**json.loads(given.settings, object_hook=_settings))
    worker = OneBehind(ExtractionWorker(settings))
    for shard in given.shards:
        worker.do(shard, lambda _: None)
    worker.finish()


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    kinds = {"output": Path, "learner": Path, "checked": frozenset}
    return {name: kinds.get(name, lambda same: same)(value) for name, value in values.items()}


def workers(given: argparse.Namespace, work: Path) -> None:
    settings, shards = made_store(given, work, given.images or 256)
    told = json.dumps({**vars(settings), "checked": sorted(settings.checked)}, default=str)

    def under_ray(count: int) -> None:
        with open_workers(Placement(workers=count, device="cpu")) as there:
            for _ in there.map(lambda: ExtractionWorker(settings), shards):
                pass

    def as_processes(count: int) -> None:
        command = [sys.executable, "-m", MODULE, "plain", "--settings", told, "--shards"]
        running = [
            subprocess.Popen([*command, *map(str, shards[first::count])], env=ONE_THREAD)
            for first in range(count)
        ]
        for process in running:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)

    def rate(run: Callable[[int], None], count: int) -> float:
        uncommit(settings.output, shards)
        run(count)
        return rate_of(work / "store", count)

    ratios = []
    for _ in range(given.rounds):
        ray, bare = ([rate(run, count) for count in (1, 2)] for run in (under_ray, as_processes))
        ratios.append(ray[1] / ray[0] / (bare[1] / bare[0]))
        print(f"shards/s of 1 and 2 workers: {ray} under Ray, {bare} as processes", flush=True)
    print(f"2 workers over 1, Ray over plain processes: {interval(ratios)} (wanted 0.9)")


# From the command to the first shard.


def start(given: argparse.Namespace, work: Path) -> None:
    data = linked(given.images_folder, work / "data", 128)

    def timed(code: str) -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, env=ONE_THREAD)
        return time.monotonic() - began

    over = []
    for turn in range(given.rounds):
        init = timed("import ray; ray.init(include_dashboard=False, log_to_driver=False)")
        imports = timed("import torch, timm")
        store = work / f"store{turn}"
        command = [sys.executable, "-c", "from semmae.cli import main; main()", "stage1"]
        flags = {"data": data, "learner": given.learner, "output": store, "workers": 1}
        words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, "extract-parts", *words], env=ONE_THREAD, stderr=subprocess.DEVNULL
        )
        while not list(store.glob("runs/tries/*")) and process.poll() is None:
            time.sleep(0.02)
        first = time.monotonic() - began
        process.wait()
        over.append(first - init - imports)
        print(f"first shard after {first:.1f} s; ray.init {init:.1f} s, imports {imports:.1f} s")
    print(f"over both: {interval(over)} s (wanted 3)")


# A listing of ImageNet's size.


def plan(given: argparse.Namespace, work: Path) -> None:
    count = given.images or 1_281_167
    data = linked(given.images_folder, work / "data", count)
    listing = f"from semmae.pipeline.sources import list_images; list_images({str(data)!r})"
    program = "from semmae.cli import main; main()"
    flags = {"data": data, "learner": given.learner, "output": work / "store", "split": "all"}
    words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    dry = [sys.executable, "-c", program, "stage1", "extract-parts", *words, "--dry-run"]
    for name, command in (("planning", [sys.executable, "-c", listing]), ("dry run", dry)):
        began = time.monotonic()
        process = subprocess.Popen(command, env=ONE_THREAD)
        _, _, used = os.wait4(process.pid, 0)
        print(
            f"{name} of {count} images: {time.monotonic() - began:.1f} s (wanted 60), peak memory "
            f"{used.ru_maxrss / 1e6:.2f} GB (wanted 1.5)"
        )


# Memory.


class FakeEncoder(ExtractionWorker):
    """A worker that reads and decodes but has no network to wait for; tells its peak memory."""

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        return self._nothing()

    def __call__(self, shard: int, tell: Tell = lambda images: None) -> Future[Record]:
        told: Future[Record] = Future()

        def tell_peak(written: Future[Record]) -> None:
            told.set_result({**written.result(), "peak": peak_resident()})

        super().__call__(shard, tell).add_done_callback(tell_peak)
        return told


def memory(given: argparse.Namespace, work: Path) -> None:
    peaks = []
    for count in (10_000, 100_000):
        data = linked(given.images_folder, work / str(count), count)
        module = "semmae.benchmarks.extraction_memory"
        paths = [str(path) for path in (given.learner, data, data.parent / "store")]
        command = [sys.executable, "-m", module, *paths]
        # As the command says before it imports Arrow, which is imported here to be watched.
        env = {**ONE_THREAD, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        peaks.append([int(number) / 1e6 for number in done.stdout.split()[-2:]])
    for name, (few, many) in zip(("driver", "worker"), zip(*peaks, strict=True), strict=True):
        print(
            f"peak memory of the {name}: {few:.0f} MB for 10,000 images, {many:.0f} MB for "
            f"100,000, {many / few - 1:+.1%} (wanted within 10 %)"
        )


# Placing.


class Sleeper:
    """A worker that sleeps, as soon as all of them are there."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._workers = folder, workers
        (folder / str(os.getpid())).touch()

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        while len(list(self._folder.iterdir())) < self._workers:
            time.sleep(0.01)
        began = time.time()
        time.sleep(SHARD_SECONDS)
        return {"began": began, "ended": time.time()}


class Idler:
    """A worker with nothing to do."""

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        return {}


def placing(given: argparse.Namespace, work: Path) -> None:
    import ray

    from semmae.pipeline.ray_cluster import RayCluster

    count, shards = 32, 157
    # More processors than there are: the fakes need none.
    ray.init(num_cpus=count + 8, include_dashboard=False, log_to_driver=False)
    address = ray.get_runtime_context().gcs_address
    RayCluster._join = lambda self: None  # type: ignore[method-assign]
    with open_workers(Placement(workers=count, address=address, device="cpu")) as there:
        records = list(there.map(lambda: Sleeper(work, count), range(shards)))
        ends = [time.monotonic() for _ in there.map(Idler, range(IDLE_SHARDS))]
    seconds = max(r["ended"] for r in records) - min(r["began"] for r in records)
    ideal = math.ceil(shards / count) * SHARD_SECONDS
    print(
        f"{shards} shards of {SHARD_SECONDS} s over {len({r['worker'] for r in records})} workers: "
        f"{seconds:.1f} s once all are up, {seconds / ideal - 1:+.1%} of {ideal} s (wanted 10 %)"
    )
    half = IDLE_SHARDS // 2
    each = 1e3 * (ends[-1] - ends[half]) / (IDLE_SHARDS - half)
    print(f"a shard with nothing to do: {each:.1f} ms, the second half of {IDLE_SHARDS}")


# Bytes, and reading them all.


class Noise(ExtractionWorker):
    """A worker whose maps are noise, which nothing compresses."""

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        made = self._nothing()
        made["labels"].random_(0, self.identity.parts)
        for name in ("class_attention", "probabilities"):
            made[name].uniform_(0, 1)
        return made


def verify(given: argparse.Namespace, work: Path) -> None:
    data = linked(given.images_folder, work / "data", given.images or 20_000)
    options = replace(
        options_for(given, data, work / "store"), class_attention=True, probabilities=True
    )
    extract_parts(options, Noise)
    for _ in range(3):
        began = time.process_time()
        assert verify_parts(options.output) == []
        seconds = time.process_time() - began
        size = sum(sizes_below(options.output).values())
        print(f"{size / 1e6:.0f} MB: {size / 1e6 / seconds:.0f} MB/s of CPU time (wanted 300)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run in (steady, writing, workers, start, plan, memory, verify):
        command = commands.add_parser(run.__name__)
        command.add_argument("learner", type=Path)
        command.add_argument("images_folder", type=Path)
        command.add_argument("--images", type=int)
        command.add_argument("--rounds", type=int, default=3 if run in (start, workers) else 9)
        command.set_defaults(run=run)
    commands.add_parser("placing").set_defaults(run=placing)
    inner = commands.add_parser("plain")
    inner.add_argument("--settings")
    inner.add_argument("--shards", type=int, nargs="+")
    inner.set_defaults(run=plain)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="semmae-bench-") as folder:
        given.run(given, Path(folder))


if __name__ == "__main__":
    main()
