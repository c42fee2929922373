"""`semmae stage1 extract-parts`: run a trained part learner over a data set into a part store."""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import SettingError
from ..models.parts import part_labels
from ..pipeline.cached_images import RECIPES, CacheFormat, kept_image
from ..pipeline.cluster import Placement, map_shards, refuse_without_room
from ..pipeline.options import choose_device, require
from ..pipeline.plan import Plan
from ..pipeline.sources import ImageReader, Split, list_images
from ..storage.image_cache import write_image_cache
from ..storage.part_identity import StoreIdentity, shard_size_for
from ..storage.part_records import read_plan
from .networks import TrainedLearner, open_learner
from .store_filling import LoadedImage, commit_shard, fill_store, load_image, meta_rows


@dataclass(frozen=True, kw_only=True)
class ExtractPartsOptions:
    """Settings of `extract_parts`."""

    data: Annotated[str, "Images: a folder, or Parquet."]
    learner: Annotated[Path, "Folder of a learn-parts run."]
    output: Annotated[Path, "Folder of the part store."]
    workers: Annotated[int, "Ray actors, one GPU or CPU each; 0: this process, without Ray."] = 0
    workers_per_gpu: Annotated[int, "Actors that share a GPU."] = 1
    address: Annotated[str | None, "Ray cluster to run on; default: this machine."] = None
    split: Annotated[Split, "Which images of the data."] = "train"
    batch_size: Annotated[int, "Images that the encoder sees at once."] = 32
    precision: Annotated[Literal["fp32", "bf16"], "Of the encoder."] = "fp32"
    device: Annotated[str, "cuda, cpu; auto takes a GPU where there is one."] = "auto"
    decode_threads: Annotated[int, "Threads a worker that read and decode images."] = 2
    class_attention: Annotated[bool, "Keep the encoder's class-token attention, by head."] = False
    probabilities: Annotated[bool, "Keep the soft part maps."] = False
    cache_images: Annotated[
        int, "Short side in pixels of a cache of the images kept in the store; 0: none."
    ] = 0
    cache_format: Annotated[CacheFormat, "Of that cache: JPEG, or uint8 pixels."] = "jpeg"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range.
        """
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        for name in ("workers_per_gpu", "batch_size", "decode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.cache_images >= 0, "cache_images", self.cache_images, "0 or more")
        if self.address is not None and self.workers == 0:
            raise SettingError(
                "--address names a Ray cluster, but --workers is 0, which works without Ray: "
                "expected --workers 1 or more"
            )


class ExtractionWorker:
    """Does shards of a store, one after another; one lives in each actor.

    It runs without Ray too.  Every batch has the store's batch size, the last one filled with
    black images, and a CPU worker computes with one thread; so what is written does not depend on
    how many workers there are, nor on which images are bad.

    Args:
        options: The settings of the command.
        root: Folder that the paths of the plan start from.
    """

    def __init__(self, options: ExtractPartsOptions, root: str) -> None:
        self._options = options
        self._device = choose_device(options.device)
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        self._trained: TrainedLearner = open_learner(options.learner)
        self._trained.encoder.to(self._device)
        self._trained.learner.to(self._device)
        self.identity, table, class_names = read_plan(options.output)
        self._plan = Plan(root, table, class_names)
        self._reader = ImageReader(self._plan)
        self._reader.warm()
        self._pool = ThreadPoolExecutor(options.decode_threads)
        side, form = options.cache_images, options.cache_format
        self._keep = functools.partial(kept_image, side=side, form=form) if side else None

    def __call__(self, shard: int) -> dict[str, Any]:
        """Extract and commit one shard.

        Returns:
            ``shard``, counts ``ok`` and ``bad``, and ``seconds``.
        """
        began = time.monotonic()
        start, stop = self.identity.shard_range(shard)
        size = self.identity.batch_size
        rows: list[dict[str, Any]] = []
        arrays: dict[str, list[NDArray[Any]]] = {}
        waiting = self._pool.map(self._load, range(start, min(start + size, stop)))
        with write_image_cache(self._options.output, self.identity, shard) as cache:
            for first in range(start, stop, size):
                loaded = list(waiting)
                after = first + size
                waiting = self._pool.map(self._load, range(after, min(after + size, stop)))
                made = self._infer(loaded)
                labels, confidence = made["labels"], made["confidence"]
                parts = self.identity.parts
                rows += meta_rows(self._plan, first, loaded, labels, confidence, parts)
                for name in ("labels", "class_attention", "probabilities"):
                    if name in made:
                        arrays.setdefault(name, []).append(made[name])
                if cache is not None:
                    cache.extend(image.kept for image in loaded)
        whole = {name: np.concatenate(blocks) for name, blocks in arrays.items()}
        description = None if cache is None else cache.description
        record = commit_shard(self._options.output, shard, rows, description, **whole)
        return {**record, "seconds": time.monotonic() - began}

    def _load(self, index: int) -> LoadedImage:
        return load_image(self._reader, index, self._trained.image_size, self._keep)

    @torch.no_grad()
    def _infer(self, loaded: list[LoadedImage]) -> dict[str, NDArray[Any]]:
        """Part maps of a batch: labels, margins and what else the store keeps, (n, ...)."""
        height, width = self._trained.image_size
        batch = np.zeros((self.identity.batch_size, height, width, 3), dtype=np.uint8)
        for place, image in zip(batch, loaded, strict=False):
            if image.pixels is not None:
                place[:] = image.pixels
        half = self._options.precision == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            images = torch.from_numpy(batch).to(self._device)
            tokens = self._trained.encoder(images)
        maps = self._trained.learner(tokens, self.identity.grid, images)
        labels, margin = part_labels(maps)
        made = {"labels": labels, "confidence": margin.mean(dim=(1, 2))}
        if self._options.class_attention:
            made["class_attention"] = tokens.attention.unflatten(2, self.identity.grid).half()
        if self._options.probabilities:
            made["probabilities"] = maps.half()
        return {name: value[: len(loaded)].cpu().numpy() for name, value in made.items()}


def identity_of(options: ExtractPartsOptions, plan: Plan, trained: TrainedLearner) -> StoreIdentity:
    """What makes the store of these settings the store it is."""
    shape = trained.learner.architecture
    form = options.cache_format if options.cache_images else ""
    return StoreIdentity(
        images=len(plan),
        shard_size=shard_size_for(len(plan)),
        grid=trained.grid,
        parts=shape.channels,
        background=None if shape.background == "none" else 0,
        image_size=trained.image_size,
        batch_size=options.batch_size,
        dtype=options.precision,
        device_type=choose_device(options.device).type,
        plan_fingerprint=plan.fingerprint,
        learner_hash=trained.hash,
        preprocessing={
            "geometry": "squash",
            "resample": "bicubic, antialiased",
            "mean": [round(value, 6) for value in trained.encoder.mean.tolist()],
            "std": [round(value, 6) for value in trained.encoder.std.tolist()],
            **({"image_cache": RECIPES[form]} if form else {}),
        },
        attention_heads=trained.encoder.heads if options.class_attention else 0,
        probabilities=options.probabilities,
        image_cache=form,
        image_cache_side=options.cache_images,
    )


def extract_parts(
    options: ExtractPartsOptions,
    make_worker: Callable[[], ExtractionWorker] | None = None,
) -> dict[str, Any]:
    """Extract the part maps of a data set, or go on where an earlier call was interrupted.

    Args:
        options: The settings.
        make_worker: Makes the worker of an actor; for tests.

    Returns:
        The record ``complete.json``: ``images``, ``ok``, ``bad`` and checksums.

    Raises:
        MismatchError: The output holds a store of other images, another learner or other settings.
        SettingError: The machine has no room for the workers.
        DamageError: A finished shard was damaged meanwhile.
    """
    placement = Placement(
        workers=options.workers,
        workers_per_gpu=options.workers_per_gpu,
        address=options.address,
    )
    refuse_without_room(placement)
    plan = list_images(options.data, options.split)
    trained = open_learner(options.learner)
    make = make_worker or functools.partial(
        ExtractionWorker, _from_anywhere(options), str(Path(plan.root).absolute())
    )
    return fill_store(
        "stage1 extract-parts",
        "extracting parts",
        options,
        identity_of(options, plan, trained),
        plan,
        lambda shards: map_shards(make, shards, placement),
    )


def _from_anywhere(options: ExtractPartsOptions) -> ExtractPartsOptions:
    """The same settings for a worker whose working folder is another one."""
    return dataclasses.replace(
        options, output=options.output.absolute(), learner=options.learner.absolute()
    )
