"""Rounds of telling parts: a predictor learns, from crops, the parts that the round before found.

Ours.  What tells parts in the first round, where on the object content such as this is found, is
said differently of a thing and of the same thing enlarged.  So a predictor learns the parts of
whole images, in them and in random crops of them: it has to say of a crop what was said of the
whole, and by what it learned from all images it takes back the accidents of each.  Its parts are
told from the context of half an object, and make better borders by their looks than those before,
so that another round gains again.  The targets are the learner's own: self-training, as in DINO's
crops (Caron et al. 2021), of parts in place of prototypes.
"""

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.encoders import FrozenEncoder, Tokens
from ..models.gathering import Gathered
from ..models.parts import PartLearner
from ..models.predictors import PartPredictor
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.options import TrainingOptions, choose_device
from ..pipeline.progress import Progress
from ..pipeline.views import meeting_places, patches_at, whole_frames
from .part_start import started_learner
from .predictor_learning import (
    Lesson,
    LessonData,
    PredictorLearning,
    fingerprint_of,
    kept_teacher,
    learned,
    measure,
    options_within,
    statistics,
)
from .second_views import SCALE, SecondView, kept_tokens, kept_view, look_again, seen_in

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions

CROPS = ((SCALE, 1.0), (SCALE, 0.6))
"""Shares of the image's area in each of its crops: of two, one is small, where parts are hardest to
tell and crops of any size are few."""

LOOK_ROUNDS = 1
"""Rounds of looks (`models.looks`) at most: what they told before, the predictor has learned, and
more of them go by the accidents of the image."""


@dataclass(frozen=True)
class Looks:
    """What an encoder makes of some images and of crops of them.

    Attributes:
        wholes: Patch tokens in float16, on the CPU, without attention.
        crops: Views of each, one for each of `CROPS`, likewise.
        grid: (h, w) of all of them.
        statistics: Of the whole images' tokens, as of `predictor_learning.statistics`.
    """

    wholes: Tokens
    crops: tuple[SecondView, ...]
    grid: tuple[int, int]
    statistics: tuple[Tensor, Tensor]


@torch.no_grad()
def sample_looks(
    encoder: FrozenEncoder, images: ImageSource, size: tuple[int, int], count: int, seed: int
) -> Looks:
    """Some images, and `CROPS` of them as `second_views.look_again` draws them.

    Args:
        encoder: The frozen encoder.
        images: The data; one can be read at least.
        size: (H, W) that images are squashed to.
        count: Images, at most.
        seed: Of images and crops.
    """
    chosen = drawn(len(images), count, seed)
    wholes, *crops = (Gathered(len(chosen)) for _ in range(1 + len(CROPS)))
    with (
        torch.random.fork_rng(devices=[]),
        Progress("reading crops", len(chosen), "image") as progress,
    ):
        torch.default_generator.manual_seed(seed)
        for _, read in batches_in_order(images, size, 64, "squash", chosen):
            pixels = torch.from_numpy(read).to(encoder.mean.device)
            wholes.add(*kept_tokens(encoder(pixels)).parts)
            for made, scale in zip(crops, CROPS, strict=True):
                made.add(*kept_view(look_again(encoder, pixels, scale=scale)).parts)
            progress.update(len(read))
    whole = Tokens(*wholes.parts)
    grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
    known = statistics(whole.patches, torch.arange(len(whole.patches)))
    return Looks(whole, tuple(SecondView.of(*made.parts) for made in crops), grid, known)


@torch.no_grad()
def lessons_of(learner: PartLearner, looks: Looks, device: torch.device) -> list[Lesson]:
    """Crops and whole images, with the parts that a learner finds in the latter.

    A learner that was taught by crops is asked in them, too: a patch of the whole image has the
    part that all views of it say on average.

    Args:
        learner: Moved to the device.
        looks: Of the images.
        device: Where to compute.

    Returns:
        The lessons of crops first; targets are parts, the background last.
    """
    learner.to(device)
    wholes, grid = looks.wholes, looks.grid
    found: list[list[Tensor]] = [[] for _ in range(1 + len(looks.crops))]
    crops = zip(*(view.split() for view in looks.crops), strict=True)
    for some, views in zip(wholes.split(), crops, strict=True):
        maps, frames = _maps_of(learner, some, grid), [view.frame.to(device) for view in views]
        if learner.architecture.predictor == "parts":  # which was taught by crops, too
            said = [_maps_of(learner, view.tokens, grid) for view in views]
            maps = _agreed(maps, said, frames, grid)
        if learner.architecture.background != "none":
            maps = maps.roll(-1, dims=2)
        found[-1].append(maps.argmax(dim=2).cpu())
        for made, frame in zip(found, frames, strict=False):
            made.append(seen_in(maps, frame, grid).argmax(dim=2).cpu())
    tokens = [*(view.tokens.patches for view in looks.crops), wholes.patches]
    # As when a crop is asked for its parts, it is told of its places what holds of whole images.
    return [
        Lesson(t, torch.cat(f), grid, looks.statistics) for t, f in zip(tokens, found, strict=True)
    ]


def _maps_of(learner: PartLearner, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """The maps (B, L, P) of tokens on the CPU, on the learner's device."""
    moved = tokens.each(lambda part: part.to(learner.token_mean.device))
    return learner.maps(learner.patches(moved, grid), grid).flatten(2).transpose(1, 2)


def _agreed(
    maps: Tensor, said: Sequence[Tensor], frames: Sequence[Tensor], grid: tuple[int, int]
) -> Tensor:
    """The mean, at each patch (B, L, P), of whole images' maps and of those of crops that show it.

    Args:
        maps: (B, L, P), of whole images.
        said: Of one crop of each image, and of another, likewise.
        frames: (B, 2, 3), where the crops were taken.
        grid: (h, w).
    """
    total, votes = maps, torch.ones_like(maps[..., :1])
    for crop, frame in zip(said, frames, strict=True):
        places, shown = meeting_places(whole_frames(frame), frame, grid)
        total = total + patches_at(crop, places, grid) * shown[..., None]
        votes = votes + shown[..., None]
    return total / votes


class CropLearning(PredictorLearning[PartPredictor]):
    """Learning the parts of whole images in crops, as the trainer sees it.

    Args:
        name: Of the run.
        data: Lessons from `lessons_of`.
        width: Of patch tokens.
        patches: L, of whole images.
        parts: How many there are.
        before: What it goes on from; None begins with random weights.
        seed: Of weights.
    """

    figure = "agreement"

    def __init__(
        self,
        name: str,
        data: LessonData,
        width: int,
        patches: int,
        parts: int,
        before: PartPredictor | None,
        seed: int,
    ) -> None:
        super().__init__(
            lambda: deepcopy(before) or PartPredictor(width, parts, patches), data, seed
        )
        self.kind = name

    def examined(self, scores: Tensor, targets: Tensor) -> float:
        """Share of the patches whose part is told."""
        return float((scores.argmax(dim=1) == targets).double().mean())

    def measure(self) -> None:
        """Of the whole images that it learned from."""
        wholes = self.data.lessons[-1]
        measure(self.predictor, wholes.tokens, wholes.grid, wholes.statistics)


def learn_parts_again(task: CropLearning, options: TrainingOptions) -> PartPredictor:
    """A predictor of the parts that were found in whole images.

    Args:
        task: How it is learned.
        options: From `options_within`.

    Returns:
        On the CPU, frozen.
    """
    predictor, agreement = learned(task, options)
    print(f"crops tell the parts of whole images in {agreement:.0%} of patches", file=sys.stderr)
    return predictor


def goes_on(learner: PartLearner, options: "LearnPartsOptions") -> bool:
    """Whether a learner of the first round is followed by later ones.

    Not where patches are told by their tokens, nor with ``image-kmeans``: what is part 3 in one
    image says nothing of other images.
    """
    by_predictor = learner.architecture.told_by == "predictor"
    return options.rounds > 1 and by_predictor and options.variant != "image-kmeans"


def later_rounds(
    learner: PartLearner,
    looks: Callable[[], Looks],
    images: str,
    tokens: Tokens,
    grid: tuple[int, int],
    options: "LearnPartsOptions",
) -> PartLearner:
    """The learner of the last round, at its start; each round is a run in ``RUN/round-<number>``.

    Args:
        learner: Of the first round; without a background if it found none.
        looks: Gives looks at images of the data; called once, if there is a round to learn.
        images: Fingerprint of the images that are looked at.
        tokens: Of a sample of the data, for `started_learner`.
        grid: (h, w).
        options: The learner's settings.
    """
    parts, looks = learner.architecture.parts, cache(looks)
    look_rounds = min(options.rounds_of_looks, LOOK_ROUNDS)
    background = learner.architecture.background
    options = replace(options, look_rounds=look_rounds, background=background)
    device = choose_device(options.device)
    for number in range(2, options.rounds + 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        name, seed = f"round-{number}", options.seed + number
        learner = kept_teacher(options.output / name) or learner
        before = learner.predictor
        assert before is not None
        sources = {"images": images, "predictor of the round before": fingerprint_of(before)}
        lessons = partial(_lessons, learner, looks, device)
        data = LessonData(lessons, sources, options.round_steps, seed, learner)
        again = before if isinstance(before, PartPredictor) else None
        patches, width = tokens.patches.shape[1:]
        task = CropLearning(f"round {number}", data, width, patches, parts, again, seed)
        predictor = learn_parts_again(task, options_within(options, name, seed))
        learner = started_learner(tokens, grid, options, predictor)
    return learner


def _lessons(
    learner: PartLearner, looks: Callable[[], Looks], device: torch.device
) -> list[Lesson]:
    return lessons_of(learner, looks(), device)
