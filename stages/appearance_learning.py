"""Learning an encoder by predicting appearances: `learn-encoder --method appearance`."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SettingError
from ..models.appearance import FEATURES, AppearanceModel, appearances, palette_of
from ..models.distillation import encoded, kept_patches
from ..models.encoders import FrozenEncoder
from ..models.vision import scaled
from ..pipeline.feeding import Batch
from ..pipeline.loaders import SquashedData
from ..pipeline.schedule import Draw
from ..pipeline.views import recoloured_regions
from .clustering import clustered
from .encoder_learning import EncoderLearning

if TYPE_CHECKING:
    from .learn_encoder import LearnEncoderOptions

CELLS = (1, 3, 12)
"""Regions a side that lose their colours, of a third of the views each."""

WORD_IMAGES = 1000
"""Images whose patches the appearances are clustered from."""


class PredictingAppearances(EncoderLearning):
    """Prediction of appearances, as the trainer sees it.

    Args:
        start: Where the encoder starts.
        data: Whole images.
        words: (Q, 6), from `appearance_words`.
        options: The settings.
    """

    def __init__(
        self,
        start: FrozenEncoder,
        data: SquashedData,
        words: Tensor,
        options: "LearnEncoderOptions",
    ) -> None:
        super().__init__(start, data, options)
        self.model = self._model = AppearanceModel(start.transformer, words)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of the true appearances of the patches that the encoder sees."""
        model, options = self._model, self._options
        images = scaled(batch["images"])
        seen, other = self._view(images), self._view(images)
        # The palette is another crop's, so that it cannot tell this one's places.
        palette = palette_of(model.words_of(other.pixels), options.prototypes, self._grid)
        kept = kept_patches(len(images), self._grid, options.kept_share).to(images.device)
        true = model.words_of(seen.pixels).gather(1, kept)
        pixels = self._normalised(recoloured_regions(seen.pixels, CELLS))
        scores = model.scores(encoded(model.student, pixels, kept)[:, 1:], palette)
        found = scores.float().flatten(0, 1)
        right = (found.argmax(dim=1) == true.flatten()).float().mean()
        return F.cross_entropy(found, true.flatten()), {"accuracy": right}


def appearance_words(data: SquashedData, patch_size: int, count: int, seed: int) -> Tensor:
    """Appearances that the patches of some images cluster in, float32 (Q, 6).

    Raises:
        SettingError: They have fewer patches than appearances.
    """
    chosen = np.random.default_rng(seed).permutation(len(data))[:WORD_IMAGES]
    patches = np.zeros((0, FEATURES), dtype=np.float32)
    for first in range(0, len(chosen), 64):
        draws = [Draw(int(index), 0, 0.0) for index in chosen[first : first + 64]]
        found = appearances(scaled(data.__getitems__(draws)["images"]), patch_size).flatten(0, 1)
        patches = np.concatenate([patches, found[:: max(len(found) // 1800, 1)].numpy()])
    if len(patches) < count:
        raise SettingError(
            f"--prototypes is {count}, but the images have {len(patches)} patches in all: expected "
            "fewer prototypes, or more images"
        )
    return torch.from_numpy(clustered(patches, count, 1, seed).cluster_centers_).float()
