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
from ..storage.part_records import commit_name, object_names
from ..storage.part_store import PartStore
from ..storage.part_writer import create_store, same_set_up, uncommit
from ..storage.store_paths import StorePath, lasts, sizes_below
from .extract_parts import ExtractPartsOptions, store_identity, worker_inputs, worker_settings
from .extraction_worker import ExtractionWorker
from .pace import steady_seconds
from .previous_store import PreviousStore, keep_previous, previous_rows, refuse_other_parts
from .worker_settings import WorkerSettings

_BLOCK = 1 << 20

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
        old = PreviousStore.open(options.update) if options.update else None
        identity = store_identity(options, plan, workers, old)
        if old is not None:
            refuse_other_parts(old, identity)
        left = images_left(options.output, identity, plan)
        previous = None if old is None else previous_rows(old, plan)
        known = None if previous is None else left & (previous >= 0)
        samples = choose_samples(identity, plan, left, known, previous)
        settings = worker_settings(options, plan, workers)
        work = functools.partial(_try_out, settings, identity, samples)
        cost: _Cost = work() if options.address is None else workers.once(work)
    count, wanted = max(options.workers, 1), int(left.sum())
    shards = int(left[:: identity.shard_size].sum())  # all of a shard is left, or nothing
    taken = 0 if known is None else int(known.sum())
    seconds = (wanted - taken) * cost.encoded_seconds + taken * cost.taken_seconds
    together = seconds_together(seconds, shards, count)
    size = len(plan) * cost.image_bytes + identity.shards * cost.shard_bytes + cost.store_bytes
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
        "time": f"about {_duration(together)}, if all workers are as fast",
        "store": f"about {size / 1e6:.1f} MB, {size / len(plan):.0f} bytes an image",
    }


def seconds_together(seconds: float, shards: int, workers: int) -> float:
    """What shards take that one worker does in so many seconds: each is done whole, by one."""
    return -(-shards // workers) * seconds / max(shards, 1)


def _taken_over(old: PartStore, left: int, taken: int) -> dict[str, str]:
    """What is told of an earlier store: equal name and size are known, equal bytes are not."""
    return {
        "taken over": f"at most {taken}, whose names and sizes are those of {old.path}",
        "encoded": f"at least {left - taken}",
    }


def images_left(output: StorePath, identity: StoreIdentity, plan: Plan) -> NDArray[np.bool_]:
    """Which images are of shards that a store has not yet; another store is refused.

    Args:
        output: Folder of the store, which need not be there.
        identity: What it is to hold.
        plan: Its images.

    Returns:
        bool (N,).

    Raises:
        MismatchError: There is a store of another identity.
    """
    left = np.ones(len(plan), dtype=np.bool_)
    try:
        same_set_up(output, identity, plan.tables(), plan.class_names)
        shards = committed_shards(output)
    except (MissingError, DamageError):
        return left
    for start, stop in map(identity.shard_range, shards):
        left[start:stop] = False
    return left


class Samples(NamedTuple):
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
    shard_bytes: int
    """Of the shard's objects and its record."""
    set_up_bytes: int
    """Of plan and array metadata."""


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
    store_bytes: float
    """A store beside its shards."""


def choose_samples(
    identity: StoreIdentity,
    plan: Plan,
    left: NDArray[np.bool_],
    known: NDArray[np.bool_] | None = None,
    previous: NDArray[np.int64] | None = None,
) -> Samples:
    """Choose images to measure on.

    Args:
        identity: Of the store.
        plan: Its images.
        left: Which of them are to be done, bool (N,).
        known: Which of these are to be taken over, bool (N,); None without an earlier store.
        previous: Row of each in the earlier store, int64 (N,); likewise.
    """
    count = SAMPLED[identity.device_type]
    new = left if known is None else left & ~known
    wanted = int(new.sum())
    some = _chosen(new, spread(wanted, count)) if wanted else spread(len(plan), count)
    encoded = plan_of_rows(plan.root, plan.take(some), plan.class_names)
    if known is None or previous is None or not known.any():
        return Samples(encoded, None, np.empty(0, dtype=np.int64))
    # Side by side, as in a shard: else each would be of another shard of the earlier store.
    together = _chosen(known, np.arange(min(count, int(known.sum()))))
    taken = plan_of_rows(plan.root, plan.take(together), plan.class_names)
    return Samples(encoded, taken, previous[together])


def _chosen(mask: NDArray[np.bool_], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of those at some places among all that a mask (N,) has.

    In blocks: the positions of all take eight times the mask's memory.
    """
    found, before = [], 0
    for start in range(0, len(mask), _BLOCK):
        block = np.flatnonzero(mask[start : start + _BLOCK])
        here = places[(places >= before) & (places < before + len(block))] - before
        found.append(start + block[here])
        before += len(block)
    return np.concatenate(found)


def _try_out(settings: WorkerSettings, identity: StoreIdentity, samples: Samples) -> _Cost:
    """Do half of the images to encode, then all of them, then those to take over."""
    plan, alone = samples.encoded, dataclasses.replace(settings, update=None)
    half, whole = (
        _extracted(alone, identity, plan_of_rows(plan.root, table, plan.class_names))
        for table in (plan.table.slice(0, max(len(plan) // 2, 1)), plan.table)
    )

    def parted(less: int, more: int) -> tuple[float, float]:
        """Bytes of an image, and what is there without images."""
        of_image = (more - less) / max(whole.images - half.images, 1)
        return of_image, max(more - whole.images * of_image, 0)

    in_shard, shard_bytes = parted(half.shard_bytes, whole.shard_bytes)
    in_plan, store_bytes = parted(half.set_up_bytes, whole.set_up_bytes)
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
        image_bytes=in_shard + in_plan,
        shard_bytes=shard_bytes,
        store_bytes=store_bytes,
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
        sizes = sizes_below(output)
        shard = sum(sizes[name] for name in (*object_names(few, 0), commit_name(0)))
        lasting = (size for name, size in sizes.items() if lasts(name))
        return _Measured(len(plan), seconds, shard, sum(lasting) - shard)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
