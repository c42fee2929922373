"""What a store of parts is by its learner and its device: asked where a worker would be."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import ran_out_of_memory
from ..pipeline.cached_images import RECIPES
from ..pipeline.options import choose_device
from ..storage.part_identity import StoreIdentity, shard_size_for
from .device_faults import device_faults
from .extract_parts import ExtractPartsOptions
from .extraction_worker import AUTOCAST
from .networks import TrainedLearner, open_learner

MOST_BATCH = 1024
"""Largest batch that ``--batch-size auto`` tries."""

_FASTER = 1.05
_TIMED_SECONDS = 2.0


def identity_of(
    options: ExtractPartsOptions,
    images: int,
    plan_fingerprint: str,
    batch_size: int,
    device_type: str,
    updated_from: str = "",
) -> StoreIdentity:
    """What makes the store of these settings the store it is.

    Args:
        options: The settings; its learner is opened.
        images: Of the plan.
        plan_fingerprint: Of the plan.
        batch_size: Images that the encoder sees at once.
        device_type: ``cuda`` or ``cpu``.
        updated_from: Fingerprint of the store to update from.
    """
    trained = open_learner(options.learner)
    shape = trained.learner.architecture
    form = options.cache_format if options.cache_images else ""
    return StoreIdentity(
        images=images,
        shard_size=shard_size_for(images),
        grid=trained.grid,
        parts=shape.channels,
        background=None if shape.background == "none" else 0,
        image_size=trained.image_size,
        batch_size=batch_size,
        dtype=options.precision,
        device_type=device_type,
        plan_fingerprint=plan_fingerprint,
        learner_hash=trained.hash,
        preprocessing={
            "geometry": "squash",
            "resample": "bicubic, antialiased",
            "mean": [round(value, 6) for value in trained.encoder.mean.tolist()],
            "std": [round(value, 6) for value in trained.encoder.std.tolist()],
        },
        attention_heads=trained.encoder.heads if options.class_attention else 0,
        probabilities=options.probabilities,
        image_cache=form,
        image_cache_side=options.cache_images,
        image_cache_recipe=RECIPES[form] if form else "",
        updated_from=updated_from,
    )


def fastest_batch_size(learner: Path, device: str, precision: str, sharing: int = 1) -> int:
    """The smallest batch size that is about as fast as any, by trying.

    Sizes are doubled from 8 on, until memory runs out or the images a second grow no more by 5 %.

    Args:
        learner: Folder of a learn-parts run.
        device: Device to try on.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        sharing: Workers that share the device, if it is a GPU, and its memory.

    Raises:
        UserError: The device has no room for the networks.
        WorkerLostError: The GPU failed.
    """
    trained, place = open_learner(learner), choose_device(device)
    with device_faults(place, "start fewer workers a GPU, as not even the networks fit"):
        trained.encoder.to(place)
        trained.learner.to(place)
        if place.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1 / sharing, place)
        best = _fastest(trained, place, AUTOCAST.get(precision))
        if place.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, place)
    return best


def _fastest(trained: TrainedLearner, device: torch.device, half: torch.dtype | None) -> int:
    best, size, fastest = 1, 8, 0.0
    while size <= MOST_BATCH:
        try:
            images = torch.zeros(size, *trained.image_size, 3, dtype=torch.uint8, device=device)
            rate = size / _seconds(functools.partial(_maps, trained, images, half), device)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            break
        if rate < _FASTER * fastest:
            break
        best, fastest, size = size, rate, 2 * size
    return best


@torch.no_grad()
def _maps(trained: TrainedLearner, images: torch.Tensor, half: torch.dtype | None) -> None:
    """What a worker computes of a batch."""
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        tokens = trained.encoder(images)
    trained.learner(tokens, trained.grid, images)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Least seconds of a call, after one that warms up."""
    least, began = float("inf"), time.perf_counter()
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
        if time.perf_counter() - began > _TIMED_SECONDS:
            break
    return least
