"""What an extraction worker does: one shard of a part store after another.

Legend: B images of a batch, n of a shard, H attention heads, P parts, (h, w) patches.
"""

import contextlib
import functools
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MismatchError, UserError
from ..models.parts import part_labels
from ..pipeline.cached_images import kept_image
from ..pipeline.image_loading import LoadedImage, load_image
from ..pipeline.load_clock import LoadClock
from ..pipeline.options import choose_device
from ..pipeline.parquet import ParquetImages
from ..pipeline.plan import plan_of_rows
from ..pipeline.remote import open_root
from ..pipeline.shard_worker import Record, WorkerLostError
from ..pipeline.sources import ImageReader
from ..pipeline.watching import Tell
from ..storage.image_cache import write_image_cache
from ..storage.part_records import plan_table, read_set_up, same_store
from ..storage.part_tries import begin_try, take_back_try
from .device_faults import device_faults
from .networks import TrainedLearner, open_learner
from .previous_store import PreviousRows
from .previous_store import PreviousStore as PartStore
from .shard_images import ShardImages, fatal_after
from .shard_writing import MadeShard, ShardWriter
from .store_filling import meta_rows
from .worker_settings import WorkerSettings

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions below float32, by name."""


class _UnderWay(NamedTuple):
    """A batch that was given to the device."""

    first: int
    loaded: list[LoadedImage]
    made: dict[str, torch.Tensor]
    """In the host's memory, but not there before `wait` returned."""
    wait: Callable[[], None]


class ExtractionWorker:
    """Does shards of a store; one lives in each actor, and it runs without Ray too.

    Every batch has the store's batch size, the last one filled with black images, and a CPU worker
    computes with one thread; so what is written does not depend on how many workers there are, nor
    on which images are bad.  Decoding, the network and the transfers overlap, and a shard is
    written by a thread while the next one is worked on.

    A shard whose worker died `TRIES` times holds an image that kills, or had bad luck: its images
    are then loaded one by one in a process that may die, and those that kill it become bad rows.
    A shard that was begun before is begun again only when nothing is being written, so that it
    costs no other shard a try.  Where the GPU failed the shard is not suspected: its try is taken
    back.

    Args:
        settings: The settings.

    Raises:
        MismatchError: The learner is not the one that the store was begun with.
        WorkerLostError: The GPU is gone, or fails when it starts.
    """

    load = staticmethod(load_image)
    """Reads and decodes one image."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        if settings.device == "cuda" and not torch.cuda.device_count():
            # The caller has seen GPUs: this is no setting that is wrong.
            raise WorkerLostError(
                "the GPU of a worker is gone (CUDA finds none): see to the GPU and its driver"
            )
        self._device = choose_device(settings.device)
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        # The patch embedding is a convolution, which would be of 10 bits of mantissa else.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        self._record, self.identity = read_set_up(settings.output)
        self._trained: TrainedLearner = open_learner(settings.learner)
        if self._trained.hash != self.identity.learner_hash:
            raise MismatchError(
                f"{settings.learner} on {socket.gethostname()} is not the learner that "
                f"{settings.output} was begun with (SHA-256 {self._trained.hash[:12]}, there "
                f"{self.identity.learner_hash[:12]}): put the same one at that path on every node, "
                "and leave it while the command runs"
            )
        with device_faults(self._device, "start fewer workers a GPU, as not even the networks fit"):
            self._trained.encoder.to(self._device)
            self._trained.learner.to(self._device)
        self._writer = ShardWriter(settings.output, self.identity)
        self._old = PartStore.open(settings.update) if settings.update else None
        self._pool = ThreadPoolExecutor(settings.decode_threads)
        # Of all shards: a row group may be longer than one of them.
        self._parquet = ParquetImages(open_root(settings.root), in_memory=False)
        self._clock = LoadClock(settings.decode_timeout)
        side, form = self.identity.image_cache_side, self.identity.image_cache
        self._keep = functools.partial(kept_image, side=side, form=form) if form else None

    def __call__(self, shard: int, tell: Tell = lambda images: None) -> Future[Record]:
        """Extract one shard, and begin to write it; it is committed when the future has its record.

        Args:
            shard: Its number.
            tell: Told how many of its images are done.

        Returns:
            ``shard``, counts ``ok`` and ``bad``, ``seconds`` by activity (`pace.ACTIVITIES`), and
            if this shard is a checked one ``equal`` and ``compared``: patches whose label is that
            of full precision, of how many.  Of a shard that another worker committed meanwhile
            only the first three.

        Raises:
            UserError: The shard ended its worker too often in this run, or memory ran out, or the
                shard before cannot be written.
            WorkerLostError: The GPU failed.
        """
        way_out = (
            f"start a new store with a smaller --batch-size than {self.identity.batch_size}, or "
            "fewer workers a GPU"
        )
        try:
            with device_faults(self._device, way_out):
                return self._writer.written(shard) or self._extract(shard, tell)
        except WorkerLostError:
            take_back_try(self._settings.output, shard, self._settings.run)
            raise

    def _extract(self, shard: int, tell: Tell) -> Future[Record]:
        began = time.perf_counter()
        images = self._begin(shard)
        with contextlib.ExitStack() as begun:
            cache = write_image_cache(self._settings.output, self.identity, shard)
            made = MadeShard(shard, images, begun.enter_context(cache))
            made.spent["wait"] = time.perf_counter() - began
            before = self._clock.seconds
            self._encode_all(made, tell)
            for name, seconds in self._clock.seconds.items():
                made.spent[name] = seconds - before[name]
            return self._writer.write(made, begun)

    def _encode_all(self, made: MadeShard, tell: Tell) -> None:
        """Load and encode the images of a shard; the cache takes them on the way."""
        spent = made.spent
        before: _UnderWay | None = None
        loads = made.images.batches(self.identity.batch_size, self._pool)
        while True:
            began = time.perf_counter()
            batch = next(loads, None)
            if batch is not None and made.cache is not None:
                made.cache.extend(image.kept for image in batch[1])
            spent["wait"] += time.perf_counter() - began
            began = time.perf_counter()
            after = (
                None if batch is None else _UnderWay(*batch, *self._fetch(self._encode(batch[1])))
            )
            if before is not None:
                self._finish(made, before)
                tell(len(made.rows))
                if made.shard in self._settings.checked and not made.compared[1]:
                    self._compare(before, made.compared)
            spent["device"] += time.perf_counter() - began
            before = after
            if before is None:
                return
            self._writer.refuse_failure()

    def _begin(self, shard: int) -> ShardImages:
        """Note the try, and find the images that kill if there were too many."""
        settings = self._settings
        start, stop = self.identity.shard_range(shard)
        same_store(settings.output)  # else the try would be noted in a folder made for it alone
        tries = begin_try(settings.output, shard, settings.run)
        if tries.before:
            self._writer.wait()
        table = plan_table(settings.output, self._record, start, stop)
        plan = plan_of_rows(settings.root, table, self._record["class_names"])
        load = functools.partial(
            type(self).load, image_size=self._trained.image_size, keep=self._keep, clock=self._clock
        )
        place = f"shard {shard} of {settings.output} (images {start} to {stop - 1} of its plan)"
        fatal = fatal_after(tries, place, plan, load)
        old = None
        if self._old is not None:
            old = PreviousRows(self._old, settings.output, start, stop)
        # In plan order a row group at a time is quick, and memory does not grow with the data set.
        reader = ImageReader(plan, in_memory_limit=0, parquet=self._parquet)
        return ShardImages(plan, start, reader, load, fatal, old)

    @torch.no_grad()
    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        """Start the part maps of a batch: what the store keeps, (B, ...), still on the device."""
        if all(image.pixels is None for image in loaded):
            return self._nothing()
        half = AUTOCAST.get(precision or self.identity.dtype)
        images = self._batch(loaded).to(self._device, non_blocking=True)
        with torch.autocast(self._device.type, dtype=half, enabled=half is not None):
            tokens = self._trained.encoder(images)
        maps = self._trained.learner(tokens, self.identity.grid, images)
        labels, margin = part_labels(maps)
        made = {"labels": labels, "confidence": margin.mean(dim=(1, 2))}
        if self.identity.attention_heads:
            made["class_attention"] = tokens.attention.unflatten(2, self.identity.grid).half()
        if self.identity.probabilities:
            made["probabilities"] = maps.half()
        return made

    def _fetch(
        self, made: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """Start to bring what the device makes to the host; also gives what waits for it.

        Only that is waited for, not what the device is given after it: it has the next batch to
        work on while the host sees to this one.
        """
        if self._device.type != "cuda":
            return made, lambda: None
        there = {
            name: torch.empty_like(values, device="cpu", pin_memory=True).copy_(
                values, non_blocking=True
            )
            for name, values in made.items()
        }
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return there, event.synchronize

    def _batch(self, loaded: list[LoadedImage]) -> torch.Tensor:
        """uint8 (B, H, W, 3) of the store's batch size, black where there is no image."""
        shape = (self.identity.batch_size, *self._trained.image_size, 3)
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        places = batch.numpy()
        for place, image in zip(places, loaded, strict=False):
            if image.pixels is not None:
                place[:] = image.pixels
        return batch

    def _nothing(self) -> dict[str, torch.Tensor]:
        """What stands for a batch without one image to encode."""
        size, grid, identity = self.identity.batch_size, self.identity.grid, self.identity
        made = {
            "labels": torch.zeros(size, *grid, dtype=torch.uint8),
            "confidence": torch.zeros(size),
        }
        if identity.attention_heads:
            shape = (size, identity.attention_heads, *grid)
            made["class_attention"] = torch.zeros(shape, dtype=torch.float16)
        if identity.probabilities:
            made["probabilities"] = torch.zeros(size, identity.parts, *grid, dtype=torch.float16)
        return made

    def _finish(self, shard: MadeShard, batch: _UnderWay) -> None:
        """Wait for a batch and add its rows to the shard's."""
        batch.wait()
        images, previous, loaded = shard.images, shard.images.previous, batch.loaded
        # A copy: what was fetched may lie in memory that is used again.
        made = {k: np.array(v[: len(loaded)].numpy()) for k, v in batch.made.items()}
        confidence = made.pop("confidence")
        self._refuse_overflow(images, batch, confidence)
        about = (loaded, made["labels"], confidence, self.identity.parts, images.start)
        rows = meta_rows(images.plan, batch.first, *about)
        known = np.flatnonzero([image.known for image in loaded])
        if previous is not None and len(known):
            for name, values in made.items():
                values[known] = previous.array(name, batch.first + known)
            for place in known.tolist():
                rows[place] = previous.meta_row(batch.first + place, rows[place])
        shard.rows += rows
        for name, values in made.items():
            shard.arrays.setdefault(name, []).append(values)

    def _refuse_overflow(
        self, images: ShardImages, batch: _UnderWay, confidence: NDArray[np.floating]
    ) -> None:
        """Maps of a good image that are no numbers would be labels of nothing."""
        for place, image in enumerate(batch.loaded):
            if image.pixels is not None and not np.isfinite(confidence[place]):
                key = images.plan.table["key"][batch.first + place]
                raise UserError(
                    f"the part map of {key} holds values that are no numbers in "
                    f"{self.identity.dtype}: extract with --precision bf16 or fp32 into another "
                    "--output"
                )

    def _compare(self, batch: _UnderWay, compared: list[int]) -> None:
        """Count the patches of a batch whose label is that of full precision."""
        good = [place for place, image in enumerate(batch.loaded) if image.pixels is not None]
        full = self._encode(batch.loaded, "fp32")["labels"].cpu()
        equal = (batch.made["labels"] == full)[good]
        compared[0] += int(equal.sum())
        compared[1] += equal.numel()
