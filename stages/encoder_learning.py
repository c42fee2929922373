"""What the tasks that learn an encoder from views of whole images have in common."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.encoders import FrozenEncoder
from ..models.vision import normalise_pixels
from ..pipeline.loaders import SquashedData
from ..pipeline.tasks import Task
from ..pipeline.views import View, draw_view

if TYPE_CHECKING:
    from .learn_encoder import LearnEncoderOptions


class EncoderLearning(Task):
    """Learning an encoder; who derives from it makes the ``model``, of the seed set here.

    Args:
        start: Where the encoder starts; its transformer is to be trained.
        data: Whole images.
        options: The settings.
    """

    kind = "encoder"

    def __init__(
        self, start: FrozenEncoder, data: SquashedData, options: "LearnEncoderOptions"
    ) -> None:
        start.transformer.requires_grad_(True)
        self.data, self._options = data, options
        self._mean, self._std = start.mean, start.std
        self.architecture = start.shape_record() | {"prototypes": options.prototypes}
        across = options.side_of_view // start.patch_size
        self._grid = across, across
        torch.manual_seed(options.seed)

    def place(self, device: torch.device) -> None:
        """Move the networks, and what normalises views."""
        super().place(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def _view(self, images: Tensor) -> View:
        """A look at each image (B, 3, H, W) in [0, 1]."""
        return draw_view(images, self._options.side_of_view, self._options.view_scale)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return normalise_pixels(pixels, self._mean, self._std)
