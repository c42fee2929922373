"""`semmae stage1 extract-parts`: run a trained part learner over a data set into a part store.

Nothing here imports torch: workers do, and a second import in this process would make them wait.
"""

import dataclasses
import functools
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import DamageError, MissingError, SettingError
from ..pipeline.cluster import Workers, open_workers
from ..pipeline.options import require, require_finite
from ..pipeline.placement import Placement
from ..pipeline.plan import Plan
from ..pipeline.shard_worker import ShardWorker
from ..pipeline.sources import Split, list_images
from ..pipeline.watching import Watch
from ..storage.part_identity import CacheFormat, StoreIdentity
from ..storage.part_records import read_set_up
from ..storage.part_store import PartStore
from ..storage.store_paths import StorePath
from .previous_store import PreviousStore, keep_previous, previous_rows, refuse_other_parts
from .store_filling import fill_store
from .worker_settings import WorkerSettings

CHECKED_SHARDS = 8
"""Shards of a run, spread over the store, of which a batch is compared with full precision."""

LEAST_EQUAL = 0.995
"""Share of patches whose label must be that of full precision; below it, a warning."""


@dataclass(frozen=True, kw_only=True)
class ExtractPartsOptions:
    """Settings of `extract_parts`."""

    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    learner: Annotated[Path, "Folder of a learn-parts run."]
    output: Annotated[StorePath, "Folder or URL of the part store."]
    workers: Annotated[int, "Ray actors, one GPU or CPU each; 0: this process, without Ray."] = 0
    workers_per_gpu: Annotated[int, "Actors that share a GPU."] = 1
    address: Annotated[str | None, "Ray cluster to run on; default: this machine."] = None
    split: Annotated[Split, "Which images of the data."] = "train"
    batch_size: Annotated[
        str, "Images that the encoder sees at once; auto measures, once for a store."
    ] = "32"
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "Of the encoder."] = "fp32"
    device: Annotated[str, "cuda, cpu; auto takes GPUs where there are any."] = "auto"
    decode_threads: Annotated[int, "Threads a worker that read and decode images."] = 2
    decode_timeout: Annotated[
        float, "Seconds until decoding an image counts as hanging, which ends its worker; 0: never."
    ] = 120.0
    class_attention: Annotated[bool, "Keep the encoder's class-token attention, by head."] = False
    probabilities: Annotated[bool, "Keep the soft part maps."] = False
    cache_images: Annotated[
        int, "Short side in pixels of a cache of the images kept in the store; 0: none."
    ] = 0
    cache_format: Annotated[CacheFormat, "Of that cache: JPEG, or uint8 pixels."] = "jpeg"
    update: Annotated[
        StorePath | None,
        "Earlier store, complete or not: take over rows of equal key, size and CRC-32.",
    ] = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range.
        """
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        for name in ("workers_per_gpu", "decode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_finite(self)
        require(self.decode_timeout >= 0, "decode_timeout", self.decode_timeout, "0 or more")
        require(self.cache_images >= 0, "cache_images", self.cache_images, "0 or more")
        size = str(self.batch_size)
        right = size == "auto" or (size.isascii() and size.isdigit() and int(size) >= 1)
        require(right, "batch_size", size, "auto, or a number of at least 1")
        if self.address is not None and self.workers == 0:
            raise SettingError(
                "--address names a Ray cluster, but --workers is 0, which works without Ray: "
                "expected --workers 1 or more"
            )
        kind, _, number = self.device.partition(":")
        known = kind in ("auto", "cpu", "cuda") and (not number or number.isdigit())
        require(known, "device", self.device, "auto, cpu, cuda or cuda:N")
        if number and self.workers:
            raise SettingError(
                f"--device is {self.device}, but each of the {self.workers} workers has a GPU of "
                "its own: expected --device cuda, or --workers 0"
            )
        if self.update is not None and self.update.absolute() == self.output.absolute():
            raise SettingError(
                f"--update and --output are both {self.output}: expected the earlier store, and "
                "another folder for the new one"
            )

    @property
    def placement(self) -> Placement:
        """Where the workers are."""
        return Placement(
            workers=self.workers,
            workers_per_gpu=self.workers_per_gpu,
            address=self.address,
            device=self.device,
        )


def make_worker(settings: WorkerSettings) -> ShardWorker:
    """The worker of an actor."""
    from .extraction_worker import ExtractionWorker

    return ExtractionWorker(settings)


def extract_parts(
    options: ExtractPartsOptions,
    worker: Callable[[WorkerSettings], ShardWorker] = make_worker,
) -> dict[str, Any]:
    """Extract the part maps of a data set, or go on where an earlier call was interrupted.

    Args:
        options: The settings.
        worker: Makes the worker of an actor.

    Returns:
        The record ``complete.json``: ``images``, ``ok``, ``bad`` and checksums.

    Raises:
        MismatchError: The output holds a store of other images, another learner or other settings;
            or the store to update from does.
        SettingError: The machine or the cluster has no room for the workers.
        MissingError: A node of the cluster does not see the data, the learner or a store.
        DamageError: A finished shard was damaged meanwhile.
    """
    with open_workers(options.placement) as workers:
        plan = list_images(options.data, options.split)
        old = PreviousStore.open(options.update) if options.update else None
        workers.refuse_hidden(worker_inputs(options, plan))
        identity = store_identity(options, plan, workers, old)
        if old is not None:
            refuse_other_parts(old, identity)
        settings = worker_settings(options, plan, workers)

        def work(shards: list[int], watch: Watch) -> Iterator[dict[str, Any]]:
            if old is not None:
                rows = previous_rows(old, plan)
                keep_previous(options.output, old.fingerprint, rows)
                known, there = int((rows >= 0).sum()), f"{len(old.shards)} of {old.identity.shards}"
                print(
                    f"{known} of {len(plan)} images are known to {options.update}, which has "
                    f"{there} shards, by name and size",
                    file=sys.stderr,
                )
            workers.refuse_hidden(on_disk(options.output.absolute() / "plan.json"))
            checked = [] if options.precision == "fp32" else _spread(shards, CHECKED_SHARDS)
            # First, so that it is soon told.
            shards = [*checked, *(shard for shard in shards if shard not in checked)]
            settled = dataclasses.replace(settings, checked=frozenset(checked))
            records = workers.map(functools.partial(worker, settled), shards, watch)
            yield from _telling_precision(options.precision, checked, records)

        command = "stage1 extract-parts"
        return fill_store(command, "extracting parts", options, identity, plan, work)


def store_identity(
    options: ExtractPartsOptions, plan: Plan, workers: Workers, old: PartStore | None
) -> StoreIdentity:
    """What makes the store of these settings the store it is; a worker looks at the learner.

    Args:
        options: The settings.
        plan: Images of the store.
        workers: Who will work on it.
        old: The store to update from.
    """
    there = dataclasses.replace(options, learner=options.learner.absolute())
    size = batch_size_of(there, workers)
    updated = old.fingerprint if old else ""
    about = (len(plan), plan.fingerprint, size, workers.device_type, updated)

    def found() -> StoreIdentity:
        from .extraction_identity import identity_of

        return identity_of(there, *about)

    identity: StoreIdentity = workers.once(found)
    return identity


def batch_size_of(options: ExtractPartsOptions, workers: Workers) -> int:
    """The number asked for; for ``auto`` the store's own if it was begun, else the fastest."""
    if options.batch_size != "auto":
        return int(options.batch_size)
    try:
        return read_set_up(options.output)[1].batch_size
    except (MissingError, DamageError):
        pass
    device = _device_of(options, workers)

    def measured() -> int:
        from .extraction_identity import fastest_batch_size

        sharing = options.workers_per_gpu if options.workers else 1
        return fastest_batch_size(options.learner, device, options.precision, sharing)

    size: int = workers.once(measured)
    print(f"batches of {size} images", file=sys.stderr)
    return size


def worker_settings(options: ExtractPartsOptions, plan: Plan, workers: Workers) -> WorkerSettings:
    """What each worker is told; paths are absolute, since its working folder may be another one."""
    return WorkerSettings(
        output=options.output.absolute(),
        root=plan.root,
        learner=options.learner.absolute(),
        run=uuid.uuid4().hex,
        device=_device_of(options, workers),
        decode_threads=options.decode_threads,
        decode_timeout=options.decode_timeout,
        update=options.update and options.update.absolute(),
    )


def worker_inputs(options: ExtractPartsOptions, plan: Plan) -> list[str | Path]:
    """Absolute paths that every worker reads; what lies behind a URL is not among them."""
    root = [] if "://" in plan.root else [plan.root]
    return [
        *root,
        options.learner.absolute(),
        *on_disk(options.update and options.update.absolute()),
    ]


def on_disk(place: StorePath | None) -> list[Path]:
    """The path, if there is one and it is no URL."""
    return [place] if isinstance(place, Path) else []


def _device_of(options: ExtractPartsOptions, workers: Workers) -> str:
    """Of a worker: an actor's own is always the first it sees."""
    return workers.device_type if options.workers else options.device


def _spread(shards: list[int], count: int) -> list[int]:
    """Some of the shards, or all, far apart: images that lie side by side are often of a class."""
    count = min(count, len(shards))
    return [shards[place * len(shards) // count] for place in range(count)]


def _telling_precision(
    precision: str, checked: list[int], records: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Records of shards, and a line on how far labels of lower precision are those of full."""
    left, equal, compared = set(checked), 0, 0
    for record in records:
        if left:
            left.discard(record["shard"])
            equal += record.get("equal", 0)
            compared += record.get("compared", 0)
            if not left:
                print(_agreement(precision, equal, compared, len(checked)), file=sys.stderr)
        yield record


def _agreement(precision: str, equal: int, compared: int, shards: int) -> str:
    if not compared:
        return (
            f"labels in {precision} were not compared with those in fp32: of the {shards} shards "
            "chosen for it this run encodes no image"
        )
    few = "" if equal / compared >= LEAST_EQUAL else "; that is few: consider --precision fp32"
    return (
        f"labels in {precision}: {equal / compared:.2%} of {compared} patches, from {shards} "
        f"shards, as in fp32{few}"
    )
