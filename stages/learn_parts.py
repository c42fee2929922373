"""`semmae stage1 learn-parts`: learn parts on a frozen encoder (paper, section 3.1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from ..errors import MismatchError, SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.parts import LEARNED, PartArchitecture, PartLearner, Variant
from ..models.readings import Facet
from ..pipeline.feeding import TrainingData
from ..pipeline.image_source import ImageSource
from ..pipeline.loaders import SquashedData
from ..pipeline.options import TrainingOptions, choose_device, require
from ..pipeline.sources import Split, list_images
from ..pipeline.training import fit, keep, refuse_foreign_folder
from ..storage.checkpoints import checkpoints, load_checkpoint
from .networks import ENCODER_FILE, image_size_of, open_encoder, parse_reading, shaped_learner
from .part_start import sample_tokens, started_learner
from .part_training import CachedTokens, PartLearning


@dataclass(frozen=True, kw_only=True)
class LearnPartsOptions(TrainingOptions):
    """Settings of `learn_parts`."""

    data: Annotated[str, "Images: a folder, or Parquet."]
    encoder: Annotated[str, "Frozen encoder: timm:<name>, a weight file, or the folder of a run."]
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
    num_parts: Annotated[int, "Parts, the background not counted."] = 6
    variant: Annotated[
        Variant,
        "anchored: ids keep one meaning; paper: queries from the class token, pixels rebuilt; "
        "the others are baselines, with nothing to train.",
    ] = "anchored"
    background: Annotated[
        Literal["auto", "voted", "token", "none"],
        "How the background is set apart; auto: a part token if paper, none for attention and "
        "grid, voted otherwise.",
    ] = "auto"
    clusters: Annotated[int, "Clusters of patch tokens that vote for the background."] = 24
    positions: Annotated[
        Literal["auto", "keep", "remove"],
        "The mean token of each place: remove it, or keep it; auto: remove where place explains "
        "more than half of what differs between tokens.",
    ] = "auto"
    part_order: Annotated[
        Literal["area", "direction"],
        "Part ids at the start: by falling area, or along the first principal direction.",
    ] = "area"
    class_share: Annotated[float, "Weight of the class-token term in anchored part tokens."] = 0.2
    temperature: Annotated[float, "Of the softmax over parts."] = 0.1
    blur: Annotated[float, "Standard deviation of the blur of the maps, patches."] = 0.7
    diversity_weight: Annotated[float, "Of the diversity constraint."] = 0.1
    feature_weight: Annotated[
        float | None, "Of rebuilding the encoder's features; default 1 if anchored, 0 if paper."
    ] = None
    pixel_weight: Annotated[
        float | None,
        "Of rebuilding pixels by the AdaIN decoder; default 0 if anchored, 1 if paper.",
    ] = None
    decoder_width: Annotated[int, "Channels of the pixel decoder's first layer."] = 64
    decoder_noise: Annotated[bool, "Per-layer noise in the pixel decoder."] = False
    sample_images: Annotated[int, "Images that statistics and k-means starts come from."] = 2000
    cached_images: Annotated[
        int,
        "Train on the tokens of this many images, read once and kept in memory; 0: on all images, "
        "encoded anew in each epoch.",
    ] = 0
    epochs: Annotated[int, "Passes over the data."] = 5
    batch_size: Annotated[int, "Images an optimiser step."] = 64
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 4e-3
    weight_decay: Annotated[float, "AdamW's weight decay."] = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        for name in ("clusters", "sample_images", "decoder_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.cached_images >= 0, "cached_images", self.cached_images, "0 or more")
        parse_reading(self.blocks, self.facet, self.pooled)
        for name in ("diversity_weight", "class_share"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.blur <= 8, "blur", self.blur, "0 to 8 patches")
        for name, weight in zip(("feature_weight", "pixel_weight"), self.weights, strict=True):
            require(weight >= 0, name, weight, "0 or more")
        PartArchitecture(
            width=1, parts=self.num_parts, clusters=self.clusters, temperature=self.temperature
        )
        if self.cached_images and self.weights[1]:
            raise SettingError(
                "--cached-images keeps tokens, but --pixel-weight rebuilds pixels, which it does "
                "not keep: set one of them to 0"
            )
        if self.variant in LEARNED and self.weights == (0.0, 0.0):
            raise SettingError(
                "--feature-weight and --pixel-weight are both 0: nothing would be rebuilt"
            )

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the feature and the pixel reconstruction."""
        default = (0.0, 1.0) if self.variant == "paper" else (1.0, 0.0)
        given = (self.feature_weight, self.pixel_weight)
        return tuple(d if g is None else g for g, d in zip(given, default, strict=True))  # type: ignore[return-value]

    @property
    def background_kind(self) -> Literal["voted", "token", "none"]:
        """How the background is set apart."""
        if self.background != "auto":
            return self.background
        return {"paper": "token", "attention": "none", "grid": "none"}.get(self.variant, "voted")  # type: ignore[return-value]


def _recorded_learner(path: Path) -> PartLearner:
    """The learner of a checkpoint, shaped by what its start found: the vote, above all."""
    state = load_checkpoint(path)
    if state.get("kind") != PartLearning.kind:
        raise MismatchError(
            f"{path.parent.parent} holds a run of kind {state.get('kind')!r}: choose another "
            "--output for the part learner"
        )
    return shaped_learner(state)


def learn_parts(options: LearnPartsOptions) -> Path:
    """Learn parts, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--learner`` takes.
    """
    refuse_foreign_folder(options.output, PartLearning.kind)
    images = ImageSource(list_images(options.data, options.split))
    learned = options.variant in LEARNED
    if learned:  # refuses what cannot be before anything is encoded
        options.schedule(min(options.cached_images or len(images), len(images)))
    found = checkpoints(options.output)
    learner = _recorded_learner(found[-1][1]) if found else None
    # A run goes on with the encoder that it began with, whatever the path holds now.
    encoder = (
        open_encoder(str(options.output / ENCODER_FILE))
        if found
        else open_encoder(
            options.encoder, parse_reading(options.blocks, options.facet, options.pooled)
        )
    )
    size = image_size_of(options.image_size, encoder.native_size, encoder.patch_size)
    encoder.to(choose_device(options.device))
    data, tokens = _training_data(encoder, images, size, learner is None, options)
    if learner is None:
        assert tokens is not None
        grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
        learner = started_learner(_some(tokens, options), grid, options)
    task = PartLearning(encoder, learner, data, SquashedData(images, size), options, size)
    return fit(task, options) if learned else keep(task, options)


def _training_data(
    encoder: FrozenEncoder,
    images: ImageSource,
    size: tuple[int, int],
    starts: bool,
    options: LearnPartsOptions,
) -> tuple[TrainingData, Tokens | None]:
    """What is trained on, and tokens to start from where they are needed."""
    whole = SquashedData(images, size)
    cached = options.cached_images and options.variant in LEARNED
    count = max(options.sample_images, options.cached_images) if cached else options.sample_images
    if not (cached or starts):
        return whole, None
    tokens = sample_tokens(encoder, images, size, count, options.seed)
    return (CachedTokens(tokens, whole.fingerprint) if cached else whole), tokens


def _some(tokens: Tokens, options: LearnPartsOptions) -> Tokens:
    """Tokens of as many images as the start asks for, drawn by the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(tokens.patches), generator=generator)
    chosen = order[: options.sample_images].sort().values
    return Tokens(tokens.class_token[chosen], tokens.patches[chosen], tokens.attention[chosen])
