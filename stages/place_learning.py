"""Learning to tell from a frozen encoder's tokens where on its object a patch lies."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SettingError
from ..models.encoders import FrozenEncoder
from ..models.gathering import Gathered
from ..models.parts import PartLearner
from ..models.places import CELLS, PlacePredictor, object_cells
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .predictor_learning import (
    Lesson,
    LessonData,
    PredictorLearning,
    learned,
    measure,
    options_within,
)
from .second_views import look_again

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions

WINDOW_AREA = (0.2, 0.32)
"""Share of the image's area in a window: half of each side, a little more or less."""

CROP_AREA = (0.2, 1.0)
"""Share of the image's area in a crop, which is blown up to the whole image's size."""

PLACES = "places"
"""The run that learns them, in the folder of the learner that they are for."""

LEAST_TOLD = 0.05
"""Nats that tokens must tell of their place, for parts to be told by it."""


@torch.no_grad()
def sample_place_views(
    encoder: FrozenEncoder,
    voter: PartLearner,
    images: ImageSource,
    size: tuple[int, int],
    count: int,
    seed: int,
) -> tuple[Lesson, Lesson]:
    """Windows and crops of some images, cut out before the encoder sees them.

    In a window things keep their size; a crop blows them up, as evaluations and pretraining do.

    Args:
        encoder: The frozen encoder.
        voter: Knows the objects of whole images; moved to the encoder's device.
        images: The data.
        size: (H, W) that whole images are squashed to; windows are half of it, in whole patches.
        count: Images, at most.
        seed: Of images and views.

    Raises:
        SettingError: Not one of the images can be read.
    """
    patch, device = encoder.patch_size, encoder.mean.device
    grid = (size[0] // patch, size[1] // patch)
    half = (max(grid[0] // 2, 1), max(grid[1] // 2, 1))
    kinds = ((half, WINDOW_AREA), (grid, CROP_AREA))
    chosen = drawn(len(images), count, seed)
    found = [Gathered(len(chosen)) for _ in kinds]
    voter.to(device)
    with (
        torch.random.fork_rng(devices=[]),
        Progress("looking for objects", len(chosen), "image") as progress,
    ):
        torch.default_generator.manual_seed(seed)
        for _, read in batches_in_order(images, size, 64, "squash", chosen):
            whole = torch.from_numpy(read).to(device)
            told = [voter.patches(some, grid).objects for some in encoder(whole).split()]
            objects = torch.cat(told)
            for made, (view_grid, area) in zip(found, kinds, strict=True):
                pixels = (view_grid[0] * patch, view_grid[1] * patch)
                view = look_again(encoder, whole, pixels, area)
                cells = object_cells(view.frame, view_grid, objects, grid, CELLS)
                made.add(view.tokens.patches.half().cpu(), cells.cpu())
            progress.update(len(read))
    if not found[0]:
        raise SettingError(
            f"not one of {count} images of {images.plan.root} can be read: nothing to learn from; "
            "expected more --place-images"
        )
    (windows, of_windows), (crops, of_crops) = (made.parts for made in found)
    return Lesson(windows, of_windows, half), Lesson(crops, of_crops, grid)


class PlaceLearning(PredictorLearning[PlacePredictor]):
    """Learning places, as the trainer sees it.

    Of each kind of views, too, the mean token of each place is taken off, so that where the
    encoder says a patch is in the view tells little of where the view is.

    Args:
        data: Views whose targets are cells, as from `models.places.object_cells`; nats are those
            of the first kind.
        tokens: Patch tokens of whole images, float32 (B, L, D), on the CPU: statistics come from
            them.
        grid: (h, w), of whole images, with h w = L.
        seed: Of weights.
    """

    kind = "places"
    figure = "told"

    def __init__(self, data: LessonData, tokens: Tensor, grid: tuple[int, int], seed: int) -> None:
        super().__init__(
            lambda: PlacePredictor(tokens.shape[2], CELLS, tokens.shape[1]), data, seed
        )
        self._tokens, self._grid = tokens, grid

    def examined(self, scores: Tensor, targets: Tensor) -> float:
        """Nats that object patches tell of their cell; the background is left out."""
        return _told(scores, targets)

    def measure(self) -> None:
        """Of the whole images."""
        measure(self.predictor, self._tokens, self._grid)


def learn_places(
    views: Callable[[], Sequence[Lesson]],
    images: str,
    tokens: Tensor,
    grid: tuple[int, int],
    options: "LearnPartsOptions",
    voter: PartLearner | None = None,
) -> tuple[PlacePredictor, float]:
    """A predictor of places, and how much tokens tell it; a run of its own in ``RUN/places``.

    Args:
        views: Gives what it learns from, of one or more kinds, each of the same images.
        images: Fingerprint of the images that views are taken of.
        tokens: As of `PlaceLearning`.
        grid: Likewise.
        options: The learner's settings.
        voter: What tells the objects in the views, if it is to be kept beside the run.

    Returns:
        The predictor, on the CPU, frozen; and nats that object patches of windows (the first kind)
        of images that it has not learned from tell of their place.
    """
    data = LessonData(views, {"images": images}, options.place_steps, options.seed, voter)
    task = PlaceLearning(data, tokens, grid, options.seed)
    model, told = learned(task, options_within(options, PLACES, options.seed))
    print(f"patch tokens tell {told:.2f} nats of where on the object they lie", file=sys.stderr)
    return model, told


def _told(scores: Tensor, targets: Tensor) -> float:
    """Nats that patches on objects tell of their cell, of `PredictorLearning.examined`."""
    on_object = targets < scores.shape[1] - 1
    scores, cells = scores[on_object, :-1], targets[on_object]
    if not len(cells):
        return 0.0
    # The entropy of the cells' shares is the loss of who knows nothing of a patch.
    shares = torch.bincount(cells).double() / len(cells)
    losses = F.cross_entropy(scores, cells, reduction="none").double()
    return float(torch.special.entr(shares).sum() - losses.mean())
