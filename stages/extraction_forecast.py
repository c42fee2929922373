"""What an extraction would do, take and cost: `semmae stage1 extract-parts --dry-run`."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DamageError, MissingError
from ..pipeline.cluster import open_workers
from ..pipeline.image_source import spread
from ..pipeline.plan import Plan, plan_of_rows
from ..pipeline.sources import list_images
from ..storage.part_check import committed_shards
from ..storage.part_identity import CHUNK, StoreIdentity
from ..storage.part_records import read_commit
from ..storage.part_store import PartStore
from ..storage.part_writer import create_store, same_set_up, uncommit
from ..storage.store_paths import StorePath
from .extract_parts import ExtractPartsOptions, store_identity, worker_inputs, worker_settings
from .extraction_worker import ExtractionWorker
from .pace import steady_seconds
from .previous_store import keep_previous, previous_rows, refuse_other_parts
from .worker_settings import WorkerSettings

SAMPLED = {"cuda": 256, "cpu": 16}
"""Images that time and size are measured on, by device type."""


def forecast_extraction(options: ExtractPartsOptions) -> dict[str, Any]:
    """What an extraction would do, by doing a few images in a temporary store.

    Nothing is written to the output.

    Args:
        options: The settings.

    Returns:
        Words for each figure: images, shards, workers, grid, time and size.

    Raises:
        MissingError: There are no images or no learner.
        SettingError: The machine or the cluster has no room for the workers.
        MismatchError: The output holds a store of other images, another learner or other settings;
            or the store to update from does.
    """
    with open_workers(options.placement) as workers:
        plan = list_images(options.data, options.split)
        workers.refuse_hidden(worker_inputs(options, plan))
        old = PartStore.open(options.update) if options.update else None
        identity = store_identity(options, plan, workers, old)
        if old is not None:
            refuse_other_parts(old, identity)
        left = _images_left(options.output, identity, plan)
        previous = None if old is None else previous_rows(old, plan)
        known = left & (False if previous is None else previous >= 0)
        samples = _samples(identity, plan, left & ~known, known, previous)
        settings = worker_settings(options, plan, workers)
        work = functools.partial(_try_out, settings, identity, samples)
        cost: _Cost = work() if options.address is None else workers.once(work)
    count, wanted, taken = max(options.workers, 1), int(left.sum()), int(known.sum())
    seconds = (wanted - taken) * cost.encoded_seconds + taken * cost.taken_seconds
    size = len(plan) * cost.image_bytes + identity.shards * cost.shard_bytes
    return {
        "images": f"{len(plan)}, {plan.total_bytes / 1e9:.2f} GB encoded",
        "done already": len(plan) - wanted,
        **({} if old is None else _taken_over(old, wanted, taken)),
        "shards": f"{identity.shards} of {identity.shard_size} images",
        "part map": f"{identity.grid[0]} x {identity.grid[1]}, {identity.parts} parts",
        "images as seen": f"{identity.image_size[0]} x {identity.image_size[1]} pixels",
        "batches": f"{identity.batch_size} images, {options.precision}",
        "workers": f"{count} on {identity.device_type}",
        "rate of a worker": cost.rates,
        "time": f"about {_duration(seconds / count)}, if all workers are as fast",
        "store": f"about {size / 1e6:.1f} MB, {size / len(plan):.0f} bytes an image",
    }


def _taken_over(old: PartStore, left: int, taken: int) -> dict[str, str]:
    """What is told of an earlier store: equal name and size are known, equal bytes are not."""
    return {
        "taken over": f"at most {taken}, whose names and sizes are those of {old.path}",
        "encoded": f"at least {left - taken}",
    }


def _images_left(output: StorePath, identity: StoreIdentity, plan: Plan) -> NDArray[np.bool_]:
    """Which images are of shards that the store has not yet, (N,); another store is refused."""
    left = np.ones(len(plan), dtype=np.bool_)
    try:
        same_set_up(output, identity, plan.tables(), plan.class_names)
        shards = committed_shards(output)
    except (MissingError, DamageError):
        return left
    for start, stop in map(identity.shard_range, shards):
        left[start:stop] = False
    return left


class _Samples(NamedTuple):
    """Images that are done to see what they cost."""

    encoded: Plan
    """Some that the network would see; any, where it would see none."""
    taken: Plan | None
    """Some that the earlier store knows; None where it knows none."""
    taken_rows: NDArray[np.int64]
    """Their rows there."""


class _Measured(NamedTuple):
    """What extracting some images took."""

    images: int
    seconds: float
    bytes: int


class _Cost(NamedTuple):
    """What images and shards cost."""

    rates: str
    """In words."""
    encoded_seconds: float
    """An image that the network sees."""
    taken_seconds: float
    """An image that is taken over."""
    image_bytes: float
    shard_bytes: float
    """A shard beside its images."""


def _samples(
    identity: StoreIdentity,
    plan: Plan,
    new: NDArray[np.bool_],
    known: NDArray[np.bool_],
    previous: NDArray[np.int64] | None,
) -> _Samples:
    """Choose images to measure on.

    Args:
        identity: Of the store.
        plan: Its images.
        new: Which of them are to be encoded, (N,).
        known: Which of them are to be taken over, (N,).
        previous: Row of each in the earlier store, (N,); None without one.
    """
    count = SAMPLED[identity.device_type]
    rows = np.flatnonzero(new) if new.any() else np.arange(len(plan))
    some = rows[spread(len(rows), count)]
    encoded = plan_of_rows(plan.root, plan.take(some), plan.class_names)
    # Side by side, as in a shard: else each would be of another shard of the earlier store.
    together = np.flatnonzero(known)[:count]
    if previous is None or not len(together):
        return _Samples(encoded, None, together)
    taken = plan_of_rows(plan.root, plan.take(together), plan.class_names)
    return _Samples(encoded, taken, previous[together])


def _try_out(settings: WorkerSettings, identity: StoreIdentity, samples: _Samples) -> _Cost:
    """Do half of the images to encode, then all of them, then those to take over."""
    plan, alone = samples.encoded, dataclasses.replace(settings, update=None)
    half, whole = (
        _extracted(alone, identity, plan_of_rows(plan.root, table, plan.class_names))
        for table in (plan.table.slice(0, max(len(plan) // 2, 1)), plan.table)
    )
    an_image = (whole.bytes - half.bytes) / max(whole.images - half.images, 1)
    rates = f"{whole.images / whole.seconds:.1f} images/s, on {whole.images} images"
    taken_seconds = 0.0
    if samples.taken is not None:
        taken = _extracted(settings, identity, samples.taken, samples.taken_rows)
        taken_seconds = taken.seconds / taken.images
        rates += f"; {1 / taken_seconds:.1f} images/s that are taken over, on {taken.images}"
    return _Cost(
        rates=rates,
        encoded_seconds=whole.seconds / whole.images,
        taken_seconds=taken_seconds,
        image_bytes=an_image,
        shard_bytes=max(whole.bytes - whole.images * an_image, 0),
    )


def _extracted(
    settings: WorkerSettings,
    identity: StoreIdentity,
    plan: Plan,
    previous: NDArray[np.int64] | None = None,
) -> _Measured:
    """Extract images into a temporary store of one shard.

    Args:
        settings: Of the worker.
        identity: Of the store that is to be.
        plan: The images.
        previous: Their rows in the earlier store, if they are to be taken from there.
    """
    few = dataclasses.replace(
        identity,
        images=len(plan),
        shard_size=CHUNK,
        batch_size=min(identity.batch_size, len(plan)),
        plan_fingerprint=plan.fingerprint,
    )
    with tempfile.TemporaryDirectory(prefix="semmae-") as folder:
        output = Path(folder) / "store"
        create_store(output, few, plan.tables(), plan.class_names)
        if previous is not None:
            keep_previous(output, identity.updated_from, previous)
        worker = ExtractionWorker(dataclasses.replace(settings, output=output))
        worker(0).result()  # warms up
        uncommit(output, [0])
        seconds = steady_seconds(worker(0).result()["seconds"])
        objects = read_commit(output, few, 0)["objects"].values()
        return _Measured(len(plan), seconds, sum(described["size"] for described in objects))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
