"""`semmae stage1 learn-encoder`: a self-supervised encoder of one's own, without downloads.

Masked autoencoding first, then self-distillation of patch tokens.  It is iBOT's idea, a student
that gives each patch the prototypes of a slow teacher, with these deviations:

- Deviation: student and teacher see different crops in different colours, and a patch is compared
  with the same place of the other crop.  iBOT compares a masked patch with itself, which leaves
  colour and position in the tokens.
- Deviation: patches are left out for the student, not replaced by a mask token; it is cheaper.
- Deviation: prototypes are shared out evenly by Sinkhorn's algorithm, as in SwAV and DINOv2.
- Deviation: it starts from a masked autoencoder.  From fresh weights the first targets are noise,
  and small budgets end before they are not (docs/log.md).
"""

import math
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MissingError, SettingError
from ..models.distillation import Distillation, encoded, kept_patches
from ..models.encoders import FrozenEncoder
from ..models.vision import sincos_positions
from ..pipeline.feeding import Batch
from ..pipeline.image_source import ImageSource
from ..pipeline.loaders import SquashedData
from ..pipeline.options import TrainingOptions, require
from ..pipeline.sources import Split, list_images
from ..pipeline.tasks import Task
from ..pipeline.training import fit, refuse_foreign_folder
from ..pipeline.views import View, draw_view, meeting_places, patches_at, recoloured
from .networks import open_encoder
from .pretrain import PretrainOptions, pretrain

try:
    from lightly.loss.swav_loss import sinkhorn
    from lightly.models.modules.heads import DINOProjectionHead
except ModuleNotFoundError as error:
    raise MissingError(
        "`semmae stage1 learn-encoder` takes heads and losses from lightly, which is not "
        "installed: pip install 'semmae[encoder]'"
    ) from error

TEMPERATURES = 0.05, 0.1
"""Of the teacher, in Sinkhorn's algorithm, and of the student."""

MOMENTUM = 0.99
"""Share of the teacher that stays at the first step; it rises to 1 along a half-cosine."""


@dataclass(frozen=True, kw_only=True)
class LearnEncoderOptions(TrainingOptions):
    """Settings of `learn_encoder`."""

    data: Annotated[str, "Images: a folder, or Parquet."]
    split: Annotated[Split, "Which images of the data."] = "train"
    start: Annotated[
        str | None,
        "Encoder to distil from on, such as a run of stage2 pretrain --masking random; by default "
        "one is pretrained first, in a folder beside the output.",
    ] = None
    size: Annotated[
        Literal["micro", "tiny", "small", "base", "large", "huge"], "Of the encoder."
    ] = "small"
    patch_size: Annotated[int, "Pixels of a patch, square."] = 16
    image_size: Annotated[int, "Pixels of a whole image, square; a multiple of the patch."] = 224
    view_size: Annotated[int, "Pixels of a view, likewise; 0: two thirds of the image."] = 0
    start_epochs: Annotated[int, "Epochs of masked autoencoding, where it is pretrained first."] = (
        100
    )
    start_learning_rate: Annotated[float, "Its peak learning rate for 256 images a step."] = 1.5e-3
    prototypes: Annotated[int, "Prototypes that patches are told apart by."] = 256
    head_width: Annotated[int, "Width of the heads' hidden layers; they end in a quarter."] = 256
    view_scale: Annotated[float, "Least share of an image's area in a view; the most is 1."] = 0.4
    recolouring: Annotated[float, "Strength of the change of colours, 0 to 1."] = 1.0
    kept_share: Annotated[float, "Share of the patches that the student sees."] = 0.7
    epochs: Annotated[int, "Passes over the data, of distillation."] = 100
    batch_size: Annotated[int, "Images an optimiser step."] = 64
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 4e-3
    warmup_epochs: Annotated[float, "Epochs of linear warm-up; a cosine to 0 follows."] = 1.0
    weight_decay: Annotated[float, "AdamW's weight decay; none on biases and norms."] = 0.04
    clip_gradients: Annotated[float, "Largest gradient norm; 0 does not clip."] = 3.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        for name in ("prototypes", "head_width", "start_epochs"):
            require(getattr(self, name) >= 4, name, getattr(self, name), "at least 4")
        for name in ("view_scale", "kept_share"):
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "above 0, at most 1")
        require(0 <= self.recolouring <= 1, "recolouring", self.recolouring, "0 to 1")
        for name, value in (("image_size", self.image_size), ("view_size", self.side_of_view)):
            expected = f"a multiple of --patch-size {self.patch_size}, above 0"
            require(value > 0 and value % self.patch_size == 0, name, value, expected)

    @property
    def side_of_view(self) -> int:
        """S, pixels of a view."""
        return self.view_size or 2 * self.image_size // (3 * self.patch_size) * self.patch_size


class EncoderLearning(Task):
    """Self-distillation, as the trainer sees it.

    Args:
        start: Where student and teacher start.
        data: Whole images.
        options: The settings.
    """

    kind = "encoder"

    def __init__(
        self, start: FrozenEncoder, data: SquashedData, options: LearnEncoderOptions
    ) -> None:
        transformer = start.transformer.requires_grad_(True)
        torch.manual_seed(options.seed)
        self.model = self._model = Distillation(
            transformer, lambda: _prototype_head(start.width, options)
        )
        self.data, self._options = data, options
        self._mean, self._std = start.mean.view(3, 1, 1), start.std.view(3, 1, 1)
        self.architecture = {
            "heads": start.heads,
            "image_size": list(start.native_size),
            "width": start.width,
            "depth": len(transformer.blocks),
            "patch_size": start.patch_size,
            "prototypes": options.prototypes,
        }
        across = options.side_of_view // start.patch_size
        self._grid = across, across

    def place(self, device: torch.device) -> None:
        """Move the networks, and what normalises views."""
        super().place(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy between the teacher's prototypes and the student's, place by place."""
        model, grid = self._model, self._grid
        images = batch["images"].permute(0, 3, 1, 2).float() / 255
        seen, other = (self._view(images) for _ in range(2))
        kept = kept_patches(len(images), grid, self._options.kept_share).to(images.device)
        places, inside = meeting_places(seen.frame, other.frame, grid)
        places = places.gather(1, kept[..., None].expand(-1, -1, 2))
        inside = inside.gather(1, kept)
        with torch.no_grad():
            taught = encoded(model.teacher, other.pixels)[:, 1:]
            there = patches_at(taught.float(), places, grid)[inside]
            scores = model.teacher_head(there).float()
            targets = sinkhorn(scores, epsilon=TEMPERATURES[0])
        learned = encoded(model.student, seen.pixels, kept)[:, 1:][inside]
        found = F.log_softmax(model.student_head(learned).float() / TEMPERATURES[1], dim=1)
        loss = -(targets * found).sum(dim=1).mean()
        return loss, {"prototypes": _in_use(targets)}

    def _view(self, images: Tensor) -> View:
        view = draw_view(images, self._options.side_of_view, self._options.view_scale)
        pixels = recoloured(view.pixels, self._options.recolouring)
        return View((pixels - self._mean) / self._std, view.frame)

    def after_step(self, progress: float) -> None:
        """The teacher follows, ever more slowly."""
        self._model.follow(1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * progress)) / 2)


def _prototype_head(width: int, options: LearnEncoderOptions) -> nn.Module:
    with warnings.catch_warnings():  # its weight normalisation is an older one of torch's
        warnings.simplefilter("ignore", FutureWarning)
        head: nn.Module = DINOProjectionHead(
            width, options.head_width, options.head_width // 4, options.prototypes
        )
    return head


def _in_use(targets: Tensor) -> Tensor:
    """How many prototypes the patches of a batch fall to: the exponential of the entropy."""
    entropy: Tensor = torch.special.entr(targets.mean(dim=0)).sum()
    return entropy.exp()


def learn_encoder(options: LearnEncoderOptions) -> Path:
    """Learn an encoder, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--encoder`` takes.

    Raises:
        SettingError: The encoder to start from is of another kind or size.
    """
    refuse_foreign_folder(options.output, EncoderLearning.kind)
    images = ImageSource(list_images(options.data, options.split))
    options.schedule(len(images))  # refuses what cannot be before anything is trained
    start = options.start or str(_pretrained(options))
    encoder = open_encoder(start)
    _refuse_unfit(encoder, start, options)
    side = options.image_size
    return fit(EncoderLearning(encoder, SquashedData(images, (side, side)), options), options)


def _pretrained(options: LearnEncoderOptions) -> Path:
    """The masked autoencoder that distillation starts from, in a folder beside the output."""
    shared = {field.name for field in fields(TrainingOptions)} - {"output", "clip_gradients"}
    taken = {name: getattr(options, name) for name in shared}
    taken |= {
        "output": options.output.with_name(f"{options.output.name}-start"),
        "epochs": options.start_epochs,
        "base_learning_rate": options.start_learning_rate,
        "warmup_epochs": min(options.warmup_epochs, options.start_epochs),
        "weight_decay": PretrainOptions.weight_decay,
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
    model = encoder.transformer
    positions = model.pos_embed.detach().cpu()
    fixed = sincos_positions(encoder.width, model.patch_embed.grid_size)
    if positions.shape != fixed.shape or not torch.allclose(positions, fixed, atol=1e-3):
        raise SettingError(
            f"--start {name} has learned positions or registers: expected an encoder with a class "
            "token and fixed sine-cosine positions, such as a run of `semmae stage2 pretrain`"
        )
    side = (options.image_size, options.image_size)
    if encoder.patch_size != options.patch_size or encoder.native_size != side:
        raise SettingError(
            f"--start {name} has patches of {encoder.patch_size} pixels and images of "
            f"{encoder.native_size[0]} x {encoder.native_size[1]}: say so by --patch-size and "
            f"--image-size, which are {options.patch_size} and {options.image_size}"
        )
