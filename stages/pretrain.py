"""`semmae stage2 pretrain`: pretrain a masked autoencoder with semantic-guided masks."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..errors import MissingError, SettingError, first_line
from ..models.autoencoder import SIZES, Architecture, MaskedAutoencoder
from ..models.warm_start import Start, take_decoder, take_encoder
from ..pipeline.cached_images import CachedImages
from ..pipeline.feeding import Batch
from ..pipeline.flops import FlopCount
from ..pipeline.image_source import ImageSource, spread
from ..pipeline.launching import launch
from ..pipeline.loaders import PretrainingData
from ..pipeline.loss_bins import LossBins, part_shares
from ..pipeline.mask_counts import predicted_count, visible_count
from ..pipeline.mask_policies import POLICIES, Masking, MaskSchedule
from ..pipeline.options import TrainingOptions, require
from ..pipeline.part_maps import join_store, read_maps
from ..pipeline.runs import Run
from ..pipeline.schedule import Draw
from ..pipeline.sources import Split, list_images, refuse_among_images
from ..pipeline.tasks import Task
from ..pipeline.training import fit
from ..storage.checkpoints import checkpoints
from ..storage.part_store import PartStore
from ..storage.store_paths import StorePath
from .networks import checkpoint_hash, open_start, parse_image_size
from .pictures import colours_of, save_picture
from .reconstructions import PICTURED, mask_pictures, reconstruction_picture

ALPHA_EDGES = (0.2, 0.4, 0.6, 0.8)
"""Between the values of alpha that losses are told apart by."""

PART_SIZE_EDGES = (0.05, 0.1, 0.2, 0.4)
"""Between the sizes of parts, shares of a crop's patches, that losses are told apart by."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """Settings of `pretrain`; the defaults are SemMAE's and MAE's recipe."""

    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    parts: Annotated[
        StorePath | None,
        "Part store of those images; --masking random, block and green need none.",
    ] = None
    images: Annotated[
        Literal["data", "cache"],
        "What crops are taken from: the images of the data, or those that the part store keeps.",
    ] = "data"
    masking: Annotated[
        Masking, "; ".join(f"{name}: {policy.about}" for name, policy in POLICIES.items()) + "."
    ] = "semantic"
    split: Annotated[Split, "Which images of the data."] = "train"
    size: Annotated[
        Literal["micro", "tiny", "small", "base", "large", "huge"], "Of encoder and decoder."
    ] = "base"
    patch_size: Annotated[int, "Pixels of a patch, square."] = 16
    image_size: Annotated[
        str | int, "Pixels of a crop, 224 or 224x320 (height x width); multiples of the patch size."
    ] = 224
    start: Annotated[
        str | None,
        "Weights to begin from: a run, a training file of MAE or SemMAE, another encoder's file or "
        "timm:<name>; a run under way does not read them again.",
    ] = None
    mask_ratio: Annotated[float, "Share of patches masked."] = 0.75
    gamma: Annotated[float, "Exponent of the schedule from shares of parts to whole parts."] = 2.0
    alpha_start: Annotated[float, "Where the schedule begins: 0 shares of parts, 1 whole."] = 0.0
    alpha_end: Annotated[float, "Where it ends."] = 1.0
    alpha_by: Annotated[
        Literal["sample", "epoch"], "What it follows: samples seen, or steps of an epoch."
    ] = "sample"
    crop_scale: Annotated[float, "Least share of an image's area in a crop; the most is 1."] = 0.2
    predicted_share: Annotated[
        float, "Share of the masked patches that are decoded and predicted, drawn at random."
    ] = 1.0
    recompute: Annotated[
        bool, "Compute blocks again in the backward pass, for less memory (checkpointing)."
    ] = False
    compile: Annotated[bool, "Compile the network with torch.compile."] = False
    normalise_target: Annotated[bool, "Rebuild each patch relative to its mean and spread."] = True
    epochs: Annotated[int, "Passes over the data."] = 800
    batch_size: Annotated[int, "Images an optimiser step."] = 4096
    micro_batch: Annotated[
        int, "Most images that a device computes at once; 0: its whole share of the batch."
    ] = 256
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 1.5e-4
    warmup_epochs: Annotated[float, "Epochs of linear warm-up; a cosine to 0 follows."] = 40.0
    loader_workers: Annotated[int, "Processes that decode images; 0 decodes in the trainer."] = 8

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "above 0, below 1")
        for name in ("crop_scale", "predicted_share"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0, at most 1")
        require(self.gamma > 0, "gamma", self.gamma, "above 0")
        for name in ("alpha_start", "alpha_end"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        policy = POLICIES.get(self.masking)
        if policy is not None and not policy.scheduled:
            for name in ("gamma", "alpha_start", "alpha_end", "alpha_by"):
                value, default = getattr(self, name), getattr(PretrainOptions, name)
                expected = f"its default, {default}, with --masking {self.masking}: it has no alpha"
                require(value == default, name, value, expected)
        patches = math.prod(self.architecture().grid)
        masked = patches - visible_count(patches, self.mask_ratio)
        expected = f"so much that at least one of the {patches} patches of a crop is masked"
        require(masked > 0, "mask_ratio", self.mask_ratio, expected)

    def architecture(self) -> Architecture:
        """The network's shapes."""
        return Architecture(
            image_size=parse_image_size(self.image_size),
            patch_size=self.patch_size,
            **SIZES[self.size],
        )


class Pretraining(Task):
    """Pretraining, as the trainer sees it."""

    kind = "pretraining"

    def __init__(self, model: MaskedAutoencoder, data: PretrainingData, options: PretrainOptions):
        self.model = self._model = model
        self.data = self._data = data
        self.architecture = model.architecture.to_record()
        self._epochs = options.epochs
        patches = model.architecture.grid[0] * model.architecture.grid[1]
        self._visible = visible_count(patches, options.mask_ratio)
        self._predicted = predicted_count(patches, options.mask_ratio, options.predicted_share)
        model.recomputes = options.recompute
        losses = model.patch_losses
        self._patch_losses = torch.compile(losses) if options.compile else losses
        scheduled = POLICIES[options.masking].scheduled
        self._by_alpha = LossBins("loss_by_alpha", ALPHA_EDGES) if scheduled else None
        self._by_part_size = LossBins("loss_by_part_size", PART_SIZE_EDGES)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the masked patches; the batch's mean alpha, where masks follow it.

        Raises:
            MissingError: The network is to be compiled, and no compiler is found.
        """
        with _compiler_wanted():
            losses, patches = self._patch_losses(
                batch["images"], batch["mask"], self._visible, batch.get("predicted")
            )
        known, scalars = losses.detach(), {}
        if self._by_alpha is not None:
            self._by_alpha.add(known.mean(dim=1), batch["alpha"])
            scalars["alpha"] = batch["alpha"].mean()
        if "parts" in batch:
            self._by_part_size.add(known, part_shares(batch["parts"]).gather(1, patches))
        return losses.mean(), scalars

    def after_step(self, progress: float, kept: Tensor) -> None:
        """Count its losses by alpha and part size, unless it is skipped."""
        for bins in (self._by_alpha, self._by_part_size):
            if bins is not None:
                bins.settle(kept)

    def flops(self, images: int) -> int:
        """Of the same network on the meta device, where nothing is computed."""
        shape = self._model.architecture
        with torch.device("meta"):
            twin = MaskedAutoencoder(shape, self._model.normalise_target)
            pixels = torch.empty(images, *shape.image_size, 3, dtype=torch.uint8)
            mask = torch.empty(images, shape.grid[0] * shape.grid[1], dtype=torch.bool)
            with FlopCount() as count:
                places = torch.empty(images, self._predicted, dtype=torch.int64)
                losses, _ = twin.patch_losses(pixels, mask, self._visible, places)
                losses.mean().backward()  # type: ignore[no-untyped-call]
        flops: int = count.flops
        return flops

    def figures(self) -> dict[str, float]:
        """Losses by alpha, and by the size of the part that a patch belongs to."""
        by_alpha = {} if self._by_alpha is None else self._by_alpha.read()
        return {**by_alpha, **self._by_part_size.read()}

    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Draw reconstructions of a few crops, with the masks of this point of the schedule.

        Where parts are known, masks are drawn over them, too.
        """
        chosen = spread(len(self._data), PICTURED).tolist()
        draws = [Draw(index, epoch - 1, epoch / self._epochs) for index in chosen]
        batch = self._data.__getitems__(draws)
        drawn = []
        if "parts" in batch:
            colours = colours_of(self._data.parts, self._data.background)
            drawn.append(mask_pictures(batch, self._model.architecture.grid, colours))
        picture = reconstruction_picture(
            self._model, batch["images"], batch["mask"], self._visible, *drawn
        )
        run.picture("reconstructions", picture)
        save_picture(run.folder / "pictures" / f"reconstructions-epoch-{epoch:04d}.png", picture)
        return {}


@contextlib.contextmanager
def _compiler_wanted() -> Iterator[None]:
    """Within, a compiler that torch (C++, on CPUs) or Triton (C, on GPUs) misses is a sentence."""
    try:
        yield
    except RuntimeError as error:
        if not any(kind in str(error) for kind in ("C++ compiler", "C compiler")):
            raise
        raise MissingError(
            f"--compile finds no compiler ({first_line(error)}): install one, such as g++, or name "
            "it in the environment variable CXX (CC on GPUs), or leave --compile out"
        ) from error


def pretraining_data(options: PretrainOptions) -> PretrainingData:
    """The crops and masks that a run of these settings trains on.

    Raises:
        SettingError: The masking or the image cache needs a part store and none was named.
        MismatchError: The store is of other images.  Those that have another size than it knows
            are refused when they are read.
        MissingError: The store keeps no images, and its cache is to be read, or no attention, and
            masks are to follow it.
    """
    if options.images == "cache" and options.parts is None:
        raise SettingError("--images cache needs --parts: the part store that keeps the images")
    store = PartStore.open(options.parts) if options.parts is not None else None
    # By name, beside the store: to look at each of a million files would take most of the start.
    known = store.plan_tables() if store is not None else None
    plan = list_images(options.data, options.split, known)
    masks = MaskSchedule(
        policy=options.masking,
        mask_ratio=options.mask_ratio,
        gamma=options.gamma,
        start=options.alpha_start,
        end=options.alpha_end,
        epochs=options.epochs if options.alpha_by == "epoch" else None,
    )
    images, maps, parts, background = ImageSource(plan), None, 0, None
    own_parts = None
    if store is not None:
        rows, places = join_store(plan, store)
        if len(rows) < len(plan):
            print(
                f"{len(plan) - len(rows)} of {len(plan)} images are left out: they were bad when "
                f"{store.path} was made, whose meta rows say why; extract-parts --update "
                f"{store.path} reads them again, into a new store",
                file=sys.stderr,
            )
        if options.images == "cache":
            images = CachedImages(plan, rows, store, places)
        else:
            images = ImageSource(plan, rows)
        parts, background = store.identity.parts, store.identity.background
        reads = POLICIES[options.masking].reads
        if reads is not None:
            maps = read_maps(store, reads, places, options.seed)
        if reads is None or reads == "attention":
            own_parts = read_maps(store, "parts", places, options.seed)
    return PretrainingData(
        images,
        maps,
        parts,
        image_size=options.architecture().image_size,
        patch_size=options.patch_size,
        masks=masks,
        seed=options.seed,
        crop_scale=(options.crop_scale, 1.0),
        store=None if store is None else _facts_of(store),
        background=background,
        predicted_share=options.predicted_share,
        own_parts=own_parts,
    )


def _facts_of(store: PartStore) -> dict[str, str]:
    """What tells a part store from another, in words."""
    identity = store.identity
    return {
        "part store": store.fingerprint,
        "its learner": identity.learner_hash,
        "its parts": str(identity.parts),
        "its grid": "{} x {}".format(*identity.grid),
        "its precision": identity.dtype,
    }


def pretrain(options: PretrainOptions) -> Path:
    """Pretrain, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--checkpoint`` and ``--encoder`` take.

    Raises:
        SettingError: The weights to start from are of another shape, or the run would lie among the
            images.
        MissingError: They are not there.
        DamageError: They cannot be read.
    """
    return launch(_pretrain, options)


def _pretrain(options: PretrainOptions) -> Path:
    refuse_among_images(options.output, options.data, options.split)
    data = pretraining_data(options)
    settings = _recorded(options)
    torch.manual_seed(options.seed)
    model = MaskedAutoencoder(options.architecture(), options.normalise_target)
    if options.start and not checkpoints(options.output):
        print(_begin_from(model, open_start(options.start)), file=sys.stderr)
    return fit(Pretraining(model, data, settings), settings)


_HASH = "sha256:"


def _recorded(options: PretrainOptions) -> PretrainOptions:
    """The options as a run keeps and compares them.

    A file to start from is known by its content, not by its place.  What is recorded is itself a
    value of ``--start``: with it a run goes on whose file is there no more.
    """
    height, width = options.architecture().image_size
    start = options.start
    if start and not start.startswith(_HASH):
        try:
            start = f"{_HASH}{checkpoint_hash(start)}"
        except MissingError as error:
            if not checkpoints(options.output):
                raise
            raise MissingError(
                f"{error}; the run in {options.output} goes on without it if --start is what its "
                "options.json says"
            ) from error
    size = height if height == width else f"{height}x{width}"
    return replace(options, start=start, image_size=size)


def _begin_from(model: MaskedAutoencoder, start: Start) -> str:
    """Load what there is to begin from; what was taken and what was changed, in one line."""
    changes = take_encoder(model, start)
    both, fresh = take_decoder(model, start)
    told = ["encoder and decoder" if both else "encoder", *changes, fresh]
    return f"begins from {start.name}: {'; '.join(filter(None, told))}"
