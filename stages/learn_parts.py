"""`semmae stage1 learn-parts`: learn parts on a frozen encoder (paper, section 3.1)."""

import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from ..errors import SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.parts import LEARNED, PartArchitecture, PartLearner, Variant
from ..models.readings import Facet
from ..pipeline import ranks
from ..pipeline.feeding import TrainingData
from ..pipeline.image_source import ImageSource
from ..pipeline.launching import launch
from ..pipeline.loaders import SquashedData
from ..pipeline.memory_faults import memory_faults
from ..pipeline.options import TrainingOptions, choose_device, require
from ..pipeline.resuming import begin, begun_to_resume, refuse_foreign_folder, run_to_resume
from ..pipeline.sources import Split, list_images, refuse_among_images
from ..pipeline.training import fit, keep
from ..pipeline.wandb_log import refuse_missing_wandb
from ..storage.files import refuse_unwritable
from .evals.metrics import fixed_grid
from .networks import (
    ENCODER_FILE,
    Weights,
    image_size_of,
    learner_of,
    open_encoder,
    parse_reading,
    save_encoder,
)
from .part_rounds import goes_on, later_rounds, sample_looks
from .part_start import sample_tokens, started_learner, voting_learner
from .part_training import CachedTokens, PartLearning
from .place_learning import LEAST_TOLD, PLACES, learn_places, sample_place_views
from .predictor_learning import kept_teacher
from .second_views import sample_views


@dataclass(frozen=True, kw_only=True)
class LearnPartsOptions(TrainingOptions):
    """Settings of `learn_parts`."""

    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    encoder: Annotated[str, "Frozen encoder: timm:<name>, a weight file, or the folder of a run."]
    weights: Annotated[
        Weights, "Of the encoder's run: trained: those of its last step; ema: their average."
    ] = "trained"
    split: Annotated[Split, "Which images of the data."] = "train"
    image_size: Annotated[
        str,
        "Pixels that images are squashed to, 224 or 224x320 (height x width); 0: the encoder's.",
    ] = "0"
    blocks: Annotated[str, "Blocks whose patch tokens are read, from 1, or -1 for the last."] = "-1"
    facet: Annotated[
        Facet,
        "What is read of them: the block's tokens, or its attention's keys, queries or values.",
    ] = "tokens"
    pooled: Annotated[bool, "Take the mean patch token for the class token."] = False
    num_parts: Annotated[
        int, "Parts, the background not counted; of attention always the encoder's heads."
    ] = 6
    variant: Annotated[
        Variant,
        "anchored: ids keep one meaning; paper: queries from the class token, pixels rebuilt; "
        "the others are baselines, with nothing to train.",
    ] = "anchored"
    told_by: Annotated[
        Literal["auto", "places", "tokens"],
        "Parts are told by the places on objects that patches tell by their content, or by the "
        "tokens themselves; auto: places if anchored.",
    ] = "auto"
    rounds: Annotated[
        int,
        "Of telling parts: by places, then by a predictor that learned from crops the parts of the "
        "round before; one where parts are not told by places.",
    ] = 3
    background: Annotated[
        Literal["auto", "predicted", "voted", "token", "none"],
        "How the background is set apart: predicted, learned from a vote of clusters of patch "
        "tokens, or by that vote; auto: a part token if paper, none for attention and grid, "
        "predicted otherwise.",
    ] = "auto"
    clusters: Annotated[int, "Clusters of patch tokens that vote for the background."] = 128
    positions: Annotated[
        Literal["auto", "keep", "remove"],
        "The mean token of each place: remove it, or keep it; auto: remove where place explains "
        "more than half of what differs between tokens.",
    ] = "auto"
    part_order: Annotated[
        Literal["area", "direction"],
        "Part ids at the start, of anchored and kmeans: by falling area, or along the first "
        "principal direction.",
    ] = "area"
    class_share: Annotated[float, "Weight of the class-token term in anchored part tokens."] = 0.2
    temperature: Annotated[float, "Of the softmax over parts."] = 0.1
    similarity: Annotated[
        Literal["cosine", "dot"],
        "Of part tokens and patches: cosines, or dot products over the root of the width (try "
        "--temperature 1 with them).",
    ] = "cosine"
    normalisation: Annotated[
        Literal["parts", "places"],
        "Of attention: the parts share each patch, or each part gives the same to all patches.",
    ] = "parts"
    blur: Annotated[
        float,
        "Standard deviation of the blur, patches: of the maps and, inside an object mask, of the "
        "features.",
    ] = 1.5
    affinity: Annotated[
        float,
        "Temperature of the cosines of patch tokens that the blur goes by, too; 0: by distance "
        "alone.",
    ] = 0.3
    look_rounds: Annotated[
        int | None,
        "Times that patches also go by how parts look in their own image (once at most after the "
        "first of --rounds); default 3 if anchored, 0 otherwise.",
    ] = None
    look_temperature: Annotated[
        float, "Of the distances of patch tokens to the part's mean token in those rounds."
    ] = 0.05
    diversity_weight: Annotated[float, "Of the diversity constraint."] = 0.1
    feature_weight: Annotated[
        float | None,
        "Of rebuilding what parts are told by from each part's mean; default 1 if anchored, 0 if "
        "paper.",
    ] = None
    pixel_weight: Annotated[
        float | None,
        "Of rebuilding pixels by the AdaIN decoder; default 0 if anchored, 1 if paper.",
    ] = None
    perceptual_weight: Annotated[
        float, "Of rebuilding the image such that the encoder sees the same patch tokens in it."
    ] = 0.0
    consistency_weight: Annotated[
        float, "Of finding the same parts in a random crop of each image, mirrored by half."
    ] = 0.0
    decoder_width: Annotated[int, "Channels of the pixel decoder's first layer."] = 64
    decoder_upsamplings: Annotated[
        int, "Doublings of the resolution in it: 2 gives 4 x 4 pixels a patch."
    ] = 2
    decoder_noise: Annotated[bool, "Per-layer noise in the pixel decoder."] = False
    sample_images: Annotated[int, "Images that statistics and k-means starts come from."] = 2000
    place_images: Annotated[
        int,
        "Images that places and later rounds are learned from, by two crops of each; tokens of all "
        "are kept in memory, 6 bytes a patch and channel.",
    ] = 4000
    place_steps: Annotated[
        int, "Steps that places are learned in; a step sees 8 crops, or as many patches."
    ] = 1500
    round_steps: Annotated[int, "Steps that each later round is learned in; likewise."] = 4500
    cached_images: Annotated[
        int,
        "Train on the tokens of this many images, --sample-images at least (and of one view of "
        "each, if --consistency-weight asks), read once and kept in memory; 0: on all images, "
        "encoded anew in each epoch.",
    ] = 0
    epochs: Annotated[int, "Passes over the data."] = 5
    batch_size: Annotated[int, "Images an optimiser step."] = 64
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 4e-3
    weight_decay: Annotated[float, "AdamW's weight decay."] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        "Of the forward pass in training; auto is bf16 on GPUs, fp32 on CPUs. What training begins "
        "with (places, rounds, clusters, cached tokens) is computed in fp32 whatever it is.",
    ] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        whole = (
            "rounds",
            "clusters",
            "sample_images",
            "place_images",
            "place_steps",
            "round_steps",
        )
        for name in whole:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.decoder_width >= 4, "decoder_width", self.decoder_width, "at least 4")
        doublings = self.decoder_upsamplings
        require(0 <= doublings <= 6, "decoder_upsamplings", doublings, "0 to 6")
        require(self.cached_images >= 0, "cached_images", self.cached_images, "0 or more")
        parse_reading(self.blocks, self.facet, self.pooled)
        require(self.class_share >= 0, "class_share", self.class_share, "0 or more")
        require(0 <= self.blur <= 8, "blur", self.blur, "0 to 8 patches")
        require(self.affinity >= 0, "affinity", self.affinity, "0 or more")
        for loss, weight in self.loss_weights.items():
            flag = f"{loss.removesuffix('s')}_weight"
            require(weight >= 0, flag, weight, "0 or more")
        self.architecture(1)
        if self.ema:
            raise SettingError(f"--ema is {self.ema}: parts are found by trained weights; drop it")
        if self.told_by == "places" and self.variant in ("colour", "attention", "grid"):
            raise SettingError(
                f"--variant {self.variant} is told neither by places nor by tokens: expected no "
                "--told-by"
            )
        ordered = ("anchored", "kmeans")
        if self.part_order != "area" and self.variant not in ordered:
            raise SettingError(
                f"--part-order is {self.part_order}, and --variant {self.variant} has no clusters "
                f"of the data to put in order: drop it, or take --variant {' or '.join(ordered)}"
            )
        self._refuse_idle_weights()

    def _refuse_idle_weights(self) -> None:
        """Refuse weights of losses that cannot be taken."""
        if self.cached_images and self.rebuilds_pixels:
            raise SettingError(
                "--cached-images keeps tokens, but --pixel-weight and --perceptual-weight rebuild "
                "pixels, which it does not keep: set it, or both of them, to 0"
            )
        if self.variant in LEARNED and not (self.loss_weights["features"] or self.rebuilds_pixels):
            raise SettingError(
                "--feature-weight, --pixel-weight and --perceptual-weight are all 0: nothing "
                "would be rebuilt; expected one above 0"
            )
        if self.decoder_noise and not (self.variant in LEARNED and self.rebuilds_pixels):
            raise SettingError(
                f"--decoder-noise is of the pixel decoder, and --variant {self.variant} has none "
                "with these settings: drop it, or give a --pixel-weight or --perceptual-weight "
                f"above 0 to --variant {' or '.join(LEARNED)}"
            )
        losses = ("feature_weight", "pixel_weight", "perceptual_weight", "consistency_weight")
        if self.variant not in LEARNED and any(getattr(self, name) for name in losses):
            raise SettingError(
                f"--variant {self.variant} has nothing to train: expected --feature-weight, "
                "--pixel-weight, --perceptual-weight and --consistency-weight 0, or --variant "
                f"{' or '.join(LEARNED)}"
            )

    def architecture(self, width: int, **measured: Any) -> PartArchitecture:
        """The learner's shape, as far as these settings say, and as measured on tokens.

        Args:
            width: Of the patch tokens.
            measured: The other fields of `PartArchitecture`.

        Raises:
            SettingError: A value is out of range.
        """
        settings: dict[str, Any] = {
            "parts": self.num_parts,
            "variant": self.variant,
            "background": self.background_kind,
            "clusters": self.clusters,
            "look_rounds": self.rounds_of_looks,
            "look_temperature": self.look_temperature,
            "class_share": self.class_share,
            "temperature": self.temperature,
            "similarity": self.similarity,
            "normalisation": self.normalisation,
            "blur": self.blur,
            "affinity": self.affinity,
            "pixel_decoder": self.variant in LEARNED and self.rebuilds_pixels,
            "decoder_width": self.decoder_width,
            "decoder_upsamplings": self.decoder_upsamplings,
            "decoder_noise": self.decoder_noise,
        }
        return PartArchitecture(width=width, **{**settings, **measured})

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss, by its name in the logs."""
        features, pixels = (0.0, 1.0) if self.variant == "paper" else (1.0, 0.0)
        return {
            "features": features if self.feature_weight is None else self.feature_weight,
            "pixels": pixels if self.pixel_weight is None else self.pixel_weight,
            "perceptual": self.perceptual_weight,
            "diversity": self.diversity_weight,
            "consistency": self.consistency_weight,
        }

    @property
    def cached(self) -> int:
        """Images whose tokens are read once and trained on; 0: all images, encoded anew."""
        return self.cached_images if self.variant in LEARNED else 0

    @property
    def by_places(self) -> bool:
        """Whether parts are told by places."""
        return self.told_by == "places" or (self.told_by == "auto" and self.variant == "anchored")

    @property
    def rounds_of_looks(self) -> int:
        """Rounds in which patches also go by how parts look in their own image."""
        if self.look_rounds is None:
            return 3 if self.variant == "anchored" else 0
        return self.look_rounds

    @property
    def rebuilds_pixels(self) -> bool:
        """Whether there is a pixel decoder to train."""
        return self.loss_weights["pixels"] > 0 or self.loss_weights["perceptual"] > 0

    @property
    def background_kind(self) -> Literal["predicted", "voted", "token", "none"]:
        """How the background is set apart."""
        if self.background != "auto":
            return self.background
        kinds = {"paper": "token", "attention": "none", "grid": "none"}
        return kinds.get(self.variant, "predicted")  # type: ignore[return-value]

    @property
    def masked(self) -> bool:
        """Whether there is an object mask before there are parts."""
        return self.background_kind in ("predicted", "voted")

    @property
    def learns_places(self) -> bool:
        """Whether patches are asked for their place."""
        return self.by_places or self.background_kind == "predicted"


def learn_parts(options: LearnPartsOptions) -> Path:
    """Learn parts, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--learner`` takes.
    """
    return launch(_learn_parts, options)


def _learn_parts(options: LearnPartsOptions) -> Path:
    with memory_faults(options, *_ways_out(options)):
        task = _task_of(options)
    return fit(task, options) if options.variant in LEARNED else keep(task, options)


def _task_of(options: LearnPartsOptions) -> PartLearning:
    """What is trained, its learner at the start or where an earlier call left it."""
    refuse_missing_wandb(options)
    refuse_foreign_folder(options.output, PartLearning.kind)
    refuse_among_images(options.output, options.data, options.split)
    images = ImageSource(list_images(options.data, options.split))
    learned = options.variant in LEARNED
    count = max(options.sample_images, options.cached)
    if learned:  # a batch larger than the data is refused before anything is encoded
        options.schedule(min(count if options.cached else len(images), len(images)))
    state = run_to_resume(PartLearning.kind, options)
    begun = begun_to_resume(PartLearning.kind, options, images)
    ranks.refuse_disagreement(
        {"newest checkpoint": state["step"] if state else "none", "begun run": begun}
    )
    # A run goes on with the encoder that it began with, whatever the path holds now.
    encoder = (
        open_encoder(str(options.output / ENCODER_FILE))
        if state or begun
        else open_encoder(
            options.encoder,
            parse_reading(options.blocks, options.facet, options.pooled),
            options.weights,
        )
    )
    if options.variant == "attention" and encoder.transformer.cls_token is None:
        raise SettingError(
            f"--variant attention is of the class token, and {encoder.name} has none: expected "
            "another --encoder or --variant"
        )
    size = image_size_of(options.image_size, encoder.native_size, encoder.patch_size)
    _refuse_one_patch(_grid(size, encoder), options)
    if options.variant == "grid":
        _refuse_small_grid(_grid(size, encoder), options)
    refuse_unwritable(options.output)
    learner = None
    if state is not None:
        learner = learner_of(state, options.output)
    encoder.to(choose_device(options.device))
    sampled = cache(partial(sample_tokens, encoder, images, size, count, options.seed))
    if options.cached:
        sampled()  # by all processes at a time
    if learner is None:
        # GPUs do not compute alike to the bit, and parts come in the order of what they computed.
        learner = ranks.by_first(
            lambda: _started(encoder, images, size, _some(sampled(), options), options, begun)
        )
    whole = SquashedData(images, size)
    data: TrainingData = whole
    if options.cached:
        views = None
        if options.consistency_weight:
            views = sample_views(encoder, images, size, count, options.seed)
        learner.to(choose_device(options.device))
        data = CachedTokens(sampled(), whole.fingerprint, learner, _grid(size, encoder), views)
    return PartLearning(encoder, learner, data, whole, options, size)


def _ways_out(options: LearnPartsOptions) -> tuple[str, str]:
    """What to do where the memory of the device, or of the machine, runs out at the start."""
    kept = {
        "--sample-images": options.sample_images,
        "--place-images": options.place_images if options.learns_places else 0,
        "--cached-images": options.cached,
    }
    named = " and ".join(f"{flag} {count}" for flag, count in kept.items() if count)
    return (
        "parts begin by batches of images that --micro-batch does not change; try a smaller "
        "--image-size or --encoder, or --device cpu",
        f"tokens of {named} are kept in it; try fewer, or a smaller --image-size",
    )


def _refuse_one_patch(grid: tuple[int, int], options: LearnPartsOptions) -> None:
    """Refuse to rebuild pixels of one patch, whose decoder normalises over the patches."""
    if grid == (1, 1) and options.variant in LEARNED and options.rebuilds_pixels:
        raise SettingError(
            "an image is one patch, and pixels are rebuilt from two or more: expected a larger "
            "--image-size, or --variant anchored with --pixel-weight and --perceptual-weight 0"
        )


def _refuse_small_grid(grid: tuple[int, int], options: LearnPartsOptions) -> None:
    """Refuse, before tokens are read, a fixed grid of too many cells."""
    try:
        fixed_grid(*grid, options.num_parts)
    except SettingError as error:
        raise SettingError(f"--variant grid, --num-parts {options.num_parts}: {error}") from error


def _grid(size: tuple[int, int], encoder: FrozenEncoder) -> tuple[int, int]:
    return size[0] // encoder.patch_size, size[1] // encoder.patch_size


def _started(
    encoder: FrozenEncoder,
    images: ImageSource,
    size: tuple[int, int],
    tokens: Tokens,
    options: LearnPartsOptions,
    begun: bool,
) -> PartLearner:
    """A learner at its start, told by places unless the tokens tell too little of them.

    What is learned before it, is learned by runs in its folder, which go on where they were killed.

    Args:
        encoder: On the device.
        images: The data.
        size: (H, W) that images are squashed to.
        tokens: Of a sample of the data.
        options: The learner's settings.
        begun: Whether there are such runs already.
    """
    grid = _grid(size, encoder)
    if not options.learns_places:
        return started_learner(tokens, grid, options)
    voter = kept_teacher(options.output / PLACES) or voting_learner(tokens, grid, options)
    if not begun:
        begin(PartLearning.kind, options, images)
        save_encoder(encoder, options.output / ENCODER_FILE)
    if options.masked and not voter.architecture.masked:
        options = replace(options, background="none")
    count, seed = options.place_images, options.seed
    views = partial(sample_place_views, encoder, voter, images, size, count, seed)
    places, told = learn_places(views, images.fingerprint, tokens.patches, grid, options, voter)
    if options.by_places and told < LEAST_TOLD:
        if options.told_by == "places":
            raise SettingError(
                "--told-by places: the encoder's tokens do not tell places; expected --told-by "
                "tokens or auto, or another encoder; and another --output"
            )
        print("that is too little for parts to be told by places", file=sys.stderr)
        options = replace(options, told_by="tokens")
    learner = started_learner(tokens, grid, options, places)
    if not goes_on(learner, options):
        return learner
    looks = partial(sample_looks, encoder, images, size, count, seed)
    return later_rounds(learner, looks, images.fingerprint, tokens, grid, options)


def _some(tokens: Tokens, options: LearnPartsOptions) -> Tokens:
    """Tokens of as many images as the start asks for, drawn by the seed."""
    if len(tokens.patches) <= options.sample_images:
        return tokens  # a choice of all would be a copy
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(tokens.patches), generator=generator)
    return tokens.each(itemgetter(order[: options.sample_images].sort().values))
