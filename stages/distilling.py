"""Self-distillation of patch tokens, as the trainer sees it: `learn-encoder --method distil`.

It is iBOT's idea, a student that gives each patch the prototypes of a slow teacher, by lightly's
head and SwAV loss, with these deviations:

- Deviation: student and teacher see different crops in different colours, and a patch is compared
  with the same place of the other crop.  iBOT compares a masked patch with itself, which leaves
  colour and position in the tokens.
- Deviation: patches are left out for the student, not replaced by a mask token; it is cheaper.
- Deviation: prototypes are shared out evenly by Sinkhorn's algorithm, as in SwAV and DINOv2.
"""

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import MissingError
from ..models.distillation import Distillation, encoded, kept_patches
from ..models.encoders import FrozenEncoder
from ..models.vision import scaled
from ..pipeline.feeding import Batch
from ..pipeline.loaders import SquashedData
from ..pipeline.views import View, meeting_places, patches_at, recoloured
from .encoder_learning import EncoderLearning

try:
    from lightly.loss.swav_loss import SwaVLoss, sinkhorn
    from lightly.models.modules.heads import DINOProjectionHead
except ModuleNotFoundError as error:
    raise MissingError(
        "--method distil takes its head and its loss from lightly, which is not installed: "
        "pip install 'semmae[encoder]'"
    ) from error

if TYPE_CHECKING:
    from .learn_encoder import LearnEncoderOptions

TEMPERATURES = 0.05, 0.1
"""Of the teacher, in Sinkhorn's algorithm, and of the student."""

MOMENTUM = 0.99
"""Share of the teacher that stays at the first step; it rises to 1 along a half-cosine."""

HEAD_WIDTH = 256
"""Of the heads' hidden layers; they end in a quarter of it."""


class Distilling(EncoderLearning):
    """Self-distillation, as the trainer sees it.

    Args:
        start: Where student and teacher start.
        data: Whole images.
        options: The settings.
    """

    def __init__(
        self, start: FrozenEncoder, data: SquashedData, options: "LearnEncoderOptions"
    ) -> None:
        super().__init__(start, data, options)
        self.model = self._model = Distillation(
            start.transformer, lambda: _prototype_head(start.width, options.prototypes)
        )
        self._loss = SwaVLoss(temperature=TEMPERATURES[1])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy between the teacher's prototypes and the student's, place by place."""
        model, grid = self._model, self._grid
        images = scaled(batch["images"])
        seen, other = self._view(images), self._view(images)
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
        loss = self._loss.subloss(model.student_head(learned).float(), targets)
        return loss, {"prototypes": _in_use(targets)}

    def _view(self, images: Tensor) -> View:
        view = super()._view(images)
        return View(self._normalised(recoloured(view.pixels, 1.0)), view.frame)

    def after_step(self, progress: float, kept: Tensor) -> None:
        """The teacher follows, ever more slowly."""
        self._model.follow(1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * progress)) / 2, kept)


def _prototype_head(width: int, prototypes: int) -> nn.Module:
    with warnings.catch_warnings():  # its weight normalisation is an older one of torch's
        warnings.simplefilter("ignore", FutureWarning)
        head: nn.Module = DINOProjectionHead(width, HEAD_WIDTH, HEAD_WIDTH // 4, prototypes)
    return head


def _in_use(targets: Tensor) -> Tensor:
    """How many prototypes the patches of a batch fall to: the exponential of the entropy."""
    entropy: Tensor = torch.special.entr(targets.mean(dim=0)).sum()
    return entropy.exp()
