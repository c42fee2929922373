"""`semmae stage1 learn-encoder`: a self-supervised encoder of one's own, without downloads.

A small budget goes furthest in steps (docs/log.md): masked autoencoding (`stage2 pretrain`), then
the prediction of appearances, or self-distillation, or one after the other by ``--start``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from ..errors import SettingError
from ..models.appearance import FEATURES
from ..models.autoencoder import SIZES
from ..models.encoders import FrozenEncoder
from ..models.vision import are_sincos
from ..pipeline.image_source import ImageSource
from ..pipeline.launching import launch
from ..pipeline.loaders import SquashedData
from ..pipeline.options import TrainingOptions, require, training_settings
from ..pipeline.resuming import refuse_foreign_folder
from ..pipeline.sources import Split, list_images, refuse_among_images
from ..pipeline.training import fit
from ..pipeline.wandb_log import refuse_missing_wandb
from ..storage.checkpoints import checkpoints
from .appearance_learning import PredictingAppearances, appearance_words
from .networks import open_encoder, refuse_other_pixels
from .pretrain import PretrainOptions, pretrain


@dataclass(frozen=True, kw_only=True)
class LearnEncoderOptions(TrainingOptions):
    """Settings of `learn_encoder`."""

    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    split: Annotated[Split, "Which images of the data."] = "train"
    method: Annotated[
        Literal["appearance", "distil"],
        "appearance: predict how recoloured patches looked; distil: iBOT-like self-distillation "
        "between two views.",
    ] = "appearance"
    start: Annotated[
        str | None,
        "Encoder to go on from, such as another run of this; by default a masked autoencoder is "
        "pretrained first, in a folder beside the output.",
    ] = None
    size: Annotated[
        Literal["micro", "tiny", "small", "base", "large", "huge"], "Of the encoder."
    ] = "small"
    patch_size: Annotated[int, "Pixels of a patch, square."] = 16
    image_size: Annotated[int, "Pixels of a whole image, square; a multiple of the patch."] = 224
    view_size: Annotated[int, "Pixels of a view, likewise; 0: the whole image's."] = 0
    start_epochs: Annotated[int, "Epochs of masked autoencoding, where it is pretrained first."] = (
        100
    )
    start_learning_rate: Annotated[float, "Its peak learning rate for 256 images a step."] = 1.5e-3
    prototypes: Annotated[int, "Appearances, or prototypes, that patches are told apart by."] = 256
    view_scale: Annotated[float, "Least share of an image's area in a view; the most is 1."] = 0.5
    kept_share: Annotated[float, "Share of the patches that the trained encoder sees."] = 0.7
    epochs: Annotated[int, "Passes over the data."] = 100
    batch_size: Annotated[int, "Images an optimiser step."] = 64
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 6e-3
    warmup_epochs: Annotated[float, "Epochs of linear warm-up; a cosine to 0 follows."] = 1.0
    weight_decay: Annotated[float, "AdamW's weight decay; none on biases and norms."] = 0.04
    clip_gradients: Annotated[float, "Largest gradient norm; 0 does not clip."] = 3.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.method == "distil" and self.ema:
            raise SettingError(
                f"--ema is {self.ema}, and --method distil keeps a moving average already, the "
                "teacher, which is the encoder that it learns: drop the flag"
            )
        require(self.prototypes >= 4, "prototypes", self.prototypes, "at least 4")
        require(self.start_epochs >= 1, "start_epochs", self.start_epochs, "at least 1")
        for name in ("view_scale", "kept_share"):
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "above 0, at most 1")
        for name, value in (("image_size", self.image_size), ("view_size", self.side_of_view)):
            expected = f"a multiple of --patch-size {self.patch_size}, two patches or more"
            fits = value >= 2 * self.patch_size and value % self.patch_size == 0
            require(fits, name, value, expected)

    @property
    def side_of_view(self) -> int:
        """S, pixels of a view."""
        return self.view_size or self.image_size


def learn_encoder(options: LearnEncoderOptions) -> Path:
    """Learn an encoder, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--encoder`` takes.

    Raises:
        SettingError: The encoder to start from is of another kind or size.
    """
    return launch(_learn_encoder, options)


def _learn_encoder(options: LearnEncoderOptions) -> Path:
    refuse_missing_wandb(options)
    refuse_foreign_folder(options.output, PredictingAppearances.kind)
    refuse_among_images(options.output, options.data, options.split)
    images = ImageSource(list_images(options.data, options.split))
    options.schedule(len(images))  # refuses what cannot be before anything is trained
    data = SquashedData(images, (options.image_size, options.image_size))
    begun = bool(checkpoints(options.output))
    words = torch.zeros(options.prototypes, FEATURES)  # a checkpoint holds its own
    if options.method == "appearance" and not begun:
        words = appearance_words(data, options.patch_size, options.prototypes, options.seed)
    if options.method == "distil":
        # lightly is an extra: where it lacks, nothing is trained for it
        from .distilling import Distilling
    start = options.start or str(options.output if begun else _pretrained(options))
    encoder = open_encoder(start)
    _refuse_unfit(encoder, start, options)
    if options.method == "distil":
        return fit(Distilling(encoder, data, options), options)
    return fit(PredictingAppearances(encoder, data, words, options), options)


def _pretrained(options: LearnEncoderOptions) -> Path:
    """The masked autoencoder that distillation starts from, in a folder beside the output."""
    taken = training_settings(options) | {
        "output": options.output.with_name(f"{options.output.name}-start"),
        "epochs": options.start_epochs,
        "base_learning_rate": options.start_learning_rate,
        "warmup_epochs": min(options.warmup_epochs, options.start_epochs),
        "weight_decay": PretrainOptions.weight_decay,
        "clip_gradients": PretrainOptions.clip_gradients,
        "ema": PretrainOptions.ema,
    }
    pretrain(
        PretrainOptions(
            data=options.data,
            split=options.split,
            masking="random",
            size=options.size,
            patch_size=options.patch_size,
            image_size=options.image_size,
            crop_scale=options.view_scale,
            **taken,
        )
    )
    return Path(taken["output"])


def _refuse_unfit(encoder: FrozenEncoder, name: str, options: LearnEncoderOptions) -> None:
    """Refuse an encoder that views cannot be made for."""
    refuse_other_pixels(encoder, name)
    model = encoder.transformer
    if not are_sincos(model.pos_embed, model.patch_embed.grid_size) or encoder.pools:
        raise SettingError(
            f"--start {name} has learned positions or registers, or pools its patch tokens: "
            "expected an encoder with a class token and fixed sine-cosine positions, such as a run "
            "of `semmae stage2 pretrain`"
        )
    held = (encoder.width, len(model.blocks), encoder.heads)
    wanted = tuple(SIZES[options.size][of] for of in ("width", "depth", "heads"))
    if held != wanted:
        raise SettingError(
            f"--start {name} has width, depth and heads {held}, and --size {options.size} is "
            f"{wanted}: expected a --size that fits it"
        )
    side = (options.image_size, options.image_size)
    if encoder.patch_size != options.patch_size or encoder.native_size != side:
        raise SettingError(
            f"--start {name} has patches of {encoder.patch_size} pixels and images of "
            f"{encoder.native_size[0]} x {encoder.native_size[1]}: say so by --patch-size and "
            f"--image-size, which are {options.patch_size} and {options.image_size}"
        )
