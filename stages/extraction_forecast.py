"""What an extraction would do, take and cost: `semmae stage1 extract-parts --dry-run`."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DamageError, MissingError
from ..pipeline.cluster import Workers, open_workers
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
from .previous_store import refuse_other_parts
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
        MismatchError: The output holds a store of other images, another learner or other settings.
    """
    with open_workers(options.placement) as workers:
        plan = list_images(options.data, options.split)
        workers.refuse_hidden(worker_inputs(options, plan))
        old = PartStore.open(options.update) if options.update else None
        identity = store_identity(options, plan, workers, old)
        if old is not None:
            refuse_other_parts(old, identity)
        done = _images_done(options.output, identity, plan)
        half, whole = _measured(options, plan, identity, workers)
    count, left = max(options.workers, 1), len(plan) - done
    rate = whole.images / whole.seconds
    an_image = (whole.bytes - half.bytes) / max(whole.images - half.images, 1)
    a_shard = max(whole.bytes - whole.images * an_image, 0)
    size = len(plan) * an_image + identity.shards * a_shard
    return {
        "images": f"{len(plan)}, {plan.total_bytes / 1e9:.2f} GB encoded",
        "done already": done,
        "shards": f"{identity.shards} of {identity.shard_size} images",
        "part map": f"{identity.grid[0]} x {identity.grid[1]}, {identity.parts} parts",
        "images as seen": f"{identity.image_size[0]} x {identity.image_size[1]} pixels",
        "batches": f"{identity.batch_size} images, {options.precision}",
        "workers": f"{count} on {identity.device_type}",
        "rate of a worker": f"{rate:.1f} images/s, on {whole.images} images",
        "time": f"about {_duration(left / rate / count)}, if all workers are as fast",
        "store": f"about {size / 1e6:.1f} MB, {size / len(plan):.0f} bytes an image",
    }


def _images_done(output: StorePath, identity: StoreIdentity, plan: Plan) -> int:
    """Images of the shards that the store has already; one of another identity is refused."""
    try:
        same_set_up(output, identity, plan.tables(), plan.class_names)
        shards = committed_shards(output)
    except (MissingError, DamageError):
        return 0
    return sum(stop - start for start, stop in map(identity.shard_range, shards))


class _Tried(NamedTuple):
    """What extracting some images took."""

    images: int
    seconds: float
    bytes: int


def _measured(
    options: ExtractPartsOptions, plan: Plan, identity: StoreIdentity, workers: Workers
) -> tuple[_Tried, _Tried]:
    """What half of a sample of the images takes, then all of it."""
    count = min(SAMPLED[identity.device_type], len(plan))
    # Spread over the data set, so that no class decides.
    rows = np.unique(np.linspace(0, len(plan) - 1, count).astype(np.int64))
    sample = plan_of_rows(plan.root, plan.take(rows), plan.class_names)
    settings = dataclasses.replace(worker_settings(options, plan, workers), update=None)
    work = functools.partial(_try_out, settings, identity, sample)
    found: tuple[_Tried, _Tried] = work() if options.address is None else workers.once(work)
    return found


def _try_out(
    settings: WorkerSettings, identity: StoreIdentity, plan: Plan
) -> tuple[_Tried, _Tried]:
    half = max(len(plan) // 2, 1)
    first, second = (
        _extracted(settings, identity, plan_of_rows(plan.root, table, plan.class_names))
        for table in (plan.table.slice(0, half), plan.table)
    )
    return first, second


def _extracted(settings: WorkerSettings, identity: StoreIdentity, plan: Plan) -> _Tried:
    """Extract images into a temporary store of one shard."""
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
        worker = ExtractionWorker(dataclasses.replace(settings, output=output))
        worker(0).result()  # warms up
        uncommit(output, [0])
        seconds = steady_seconds(worker(0).result()["seconds"])
        objects = read_commit(output, few, 0)["objects"].values()
        return _Tried(len(plan), seconds, sum(described["size"] for described in objects))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
