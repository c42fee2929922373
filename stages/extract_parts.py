"""`semmae stage1 extract-parts`: run a trained part learner over a data set into a part store."""

import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from .. import __version__
from ..errors import SettingError
from ..models.parts import part_labels
from ..pipeline.cluster import Placement, map_shards, refuse_without_room
from ..pipeline.crops import squash
from ..pipeline.decoding import BadImage, decode_image
from ..pipeline.options import choose_device, plain_options, require
from ..pipeline.plan import Plan
from ..pipeline.progress import Progress
from ..pipeline.sources import ImageReader, Split, list_images
from ..storage.files import write_json
from ..storage.part_identity import META_SCHEMA, StoreIdentity, shard_size_for
from ..storage.part_records import read_plan
from ..storage.part_writer import (
    committed_shards,
    complete_store,
    create_store,
    damaged_shards,
    uncommit,
    write_shard,
)
from .networks import TrainedLearner, open_learner


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

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range.
        """
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        for name in ("workers_per_gpu", "batch_size", "decode_threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.address is not None and self.workers == 0:
            raise SettingError(
                "--address names a Ray cluster, but --workers is 0, which works without Ray: "
                "expected --workers 1 or more"
            )


class _Loaded(NamedTuple):
    """One image as a worker has read it: pixels, or why there are none."""

    pixels: NDArray[np.uint8] | None
    height: int | None
    width: int | None
    crc32: int
    bad: BadImage | None


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
        for first in range(start, stop, size):
            loaded = list(waiting)
            after = first + size
            waiting = self._pool.map(self._load, range(after, min(after + size, stop)))
            made = self._infer(loaded)
            rows += self._meta(first, loaded, made)
            for name in ("labels", "class_attention", "probabilities"):
                if name in made:
                    arrays.setdefault(name, []).append(made[name])
        meta = pa.Table.from_pylist(rows, META_SCHEMA)
        whole = {name: np.concatenate(parts) for name, parts in arrays.items()}
        commit = write_shard(self._options.output, shard, whole.pop("labels"), meta, **whole)
        return {
            "shard": shard,
            "ok": commit["ok"],
            "bad": commit["bad"],
            "seconds": time.monotonic() - began,
        }

    def _load(self, index: int) -> _Loaded:
        """Read, check, decode and squash one image."""
        checksum = 0
        try:
            data = self._reader.read(index)
            checksum = zlib.crc32(data)
            image = decode_image(data)
        except BadImage as bad:
            return _Loaded(None, None, None, checksum, bad)
        height, width = image.shape[:2]
        return _Loaded(squash(image, self._trained.image_size), height, width, checksum, None)

    @torch.no_grad()
    def _infer(self, loaded: list[_Loaded]) -> dict[str, NDArray[Any]]:
        """Part maps of a batch: labels, margins and what else the store keeps, (n, ...)."""
        height, width = self._trained.image_size
        batch = np.zeros((self.identity.batch_size, height, width, 3), dtype=np.uint8)
        for place, image in zip(batch, loaded, strict=False):
            if image.pixels is not None:
                place[:] = image.pixels
        half = self._options.precision == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            tokens = self._trained.encoder(torch.from_numpy(batch).to(self._device))
        maps = self._trained.learner(tokens, self.identity.grid)
        labels, margin = part_labels(maps)
        made = {"labels": labels, "margin": margin.mean(dim=(1, 2))}
        if self._options.class_attention:
            made["class_attention"] = tokens.attention.unflatten(2, self.identity.grid).half()
        if self._options.probabilities:
            made["probabilities"] = maps.half()
        return {name: value[: len(loaded)].cpu().numpy() for name, value in made.items()}

    def _meta(
        self, first: int, loaded: list[_Loaded], made: dict[str, NDArray[Any]]
    ) -> list[dict[str, Any]]:
        keys, classes = self._plan.keys, self._plan.labels
        rows = []
        for place, image in enumerate(loaded):
            index, bad = first + place, image.bad
            labels = made["labels"][place].ravel()
            areas = np.bincount(labels, minlength=self.identity.parts) / labels.size
            rows.append(
                {
                    "index": index,
                    "key": keys[index],
                    "label": int(classes[index]),
                    "width": image.width,
                    "height": image.height,
                    "crc32": image.crc32,
                    "status": "ok" if bad is None else "bad",
                    "error_code": bad and bad.code,
                    "error_kind": bad and bad.kind,
                    "error": bad and bad.message,
                    "confidence": float(made["margin"][place]) if bad is None else None,
                    "part_areas": areas.tolist() if bad is None else None,
                }
            )
        return rows


def identity_of(options: ExtractPartsOptions, plan: Plan, trained: TrainedLearner) -> StoreIdentity:
    """What makes the store of these settings the store it is."""
    shape = trained.learner.architecture
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
        },
        attention_heads=trained.encoder.heads if options.class_attention else 0,
        probabilities=options.probabilities,
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
    create_store(options.output, identity_of(options, plan, trained), plan.table, plan.class_names)
    identity = read_plan(options.output)[0]
    if not (options.output / "complete.json").exists():
        # What an interrupted run left may have been altered since; what is damaged is done again.
        uncommit(options.output, damaged_shards(options.output))
    done = committed_shards(options.output)
    todo = [shard for shard in range(identity.shards) if shard not in done]
    started = datetime.now(UTC)
    finished = sum(stop - start for start, stop in map(identity.shard_range, done))
    bad = 0
    if todo:
        make = make_worker or functools.partial(
            ExtractionWorker, _from_anywhere(options), str(Path(plan.root).absolute())
        )
        with Progress("extracting parts", identity.images, "image", finished) as progress:
            for record in map_shards(make, todo, placement):
                bad += record["bad"]
                progress.update(record["ok"] + record["bad"], bad=bad)
    complete = complete_store(options.output)
    _record_run(options, started, len(todo), complete)
    if not complete["ok"]:
        raise SettingError(
            f"not one of the {complete['images']} images in {options.data} could be read: "
            f"the error columns of {options.output / 'meta'} say why"
        )
    return complete


def _from_anywhere(options: ExtractPartsOptions) -> ExtractPartsOptions:
    """The same settings for a worker whose working folder is another one."""
    return dataclasses.replace(
        options, output=options.output.absolute(), learner=options.learner.absolute()
    )


def _record_run(
    options: ExtractPartsOptions, started: datetime, shards: int, complete: dict[str, Any]
) -> None:
    """Keep what differs from run to run apart from the store itself."""
    write_json(
        options.output / "runs" / f"{started:%Y%m%dT%H%M%S.%f}Z.json",
        {
            "command": "stage1 extract-parts",
            "options": plain_options(options),
            "started": started.isoformat(),
            "finished": datetime.now(UTC).isoformat(),
            "shards": shards,
            "ok": complete["ok"],
            "bad": complete["bad"],
            "versions": {"semmae": __version__, "torch": torch.__version__},
        },
    )
    if complete["bad"]:
        print(
            f"{complete['bad']} of {complete['images']} images could not be used: status and "
            f"error in {options.output / 'meta'} name them",
            file=sys.stderr,
        )
