from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from semmae.models.encoders import FrozenEncoder, Tokens
from semmae.models.parts import PartArchitecture, PartLearner
from semmae.models.predictors import PartPredictor
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.sources import list_images
from semmae.pipeline.views import meeting_places, whole_frames
from semmae.stages.part_rounds import (
    CROPS,
    CropLearning,
    Looks,
    learn_parts_again,
    lessons_of,
    sample_looks,
)
from semmae.stages.predictor_learning import LessonData, options_within
from semmae.tests.stages.colours import Colours

GRID, CPU = (8, 8), torch.device("cpu")


class Halves(PartLearner):
    """Calls what is red background, what is green part 0 and what is blue part 1."""

    def __init__(self, background: Any) -> None:
        super().__init__(PartArchitecture(width=3, parts=2, background=background, clusters=2))

    def patches(self, tokens: Tokens, *_: Any) -> Any:
        return tokens.patches

    def maps(self, patches: Any, grid: tuple[int, int]) -> Tensor:
        kinds = F.one_hot(patches.argmax(dim=2), 3).float().mT.reshape(-1, 3, *grid)
        return kinds if self.architecture.masked else kinds[:, 1:]


def source(folder: Path, count: int) -> ImageSource:
    """Red images of 64 px with a square, green above and blue below, somewhere."""
    (folder / "train" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[..., 0] = 160
        top, left = rng.integers(0, 32, 2)
        for half in (0, 1):
            rows = slice(top + 16 * half, top + 16 * half + 16)
            pixels[rows, left : left + 32] = np.eye(3, dtype=np.uint8)[half + 1] * 200
        Image.fromarray(pixels).save(folder / "train" / "a" / f"{index:03d}.png")
    return ImageSource(list_images(str(folder), "train"))


def sampled(images: ImageSource) -> Looks:
    return sample_looks(cast(FrozenEncoder, Colours()), images, (64, 64), len(images), seed=0)


def test_lessons_of__a_crop_shows_the_parts_of_the_whole_where_it_was_taken(
    tmp_path: Path,
) -> None:
    looks = sampled(source(tmp_path, 40))
    for background in ("voted", "none"):
        first, second, wholes = lessons_of(Halves(background), looks, CPU)
        for lesson in (first, second, wholes):
            assert lesson.tokens.shape == (40, 64, 3)
            assert lesson.targets.shape == (40, 64)
            colour = lesson.tokens.float()
            sure = colour.max(dim=2).values > 0.95 * colour.sum(dim=2)
            if background == "none":  # such a learner has to call red something
                sure &= colour.argmax(dim=2) > 0
            wanted = (colour.argmax(dim=2) - 1) % 3
            # The maps of whole images are of patches: a crop sees between them.
            assert (lesson.targets == wanted)[sure].float().mean() > 0.93
        assert not torch.equal(first.tokens, second.tokens)
        assert not torch.equal(first.tokens, wholes.tokens)


class Taught(Halves):
    """Is sure of nothing in whole images, which it is asked first, and of colours in crops."""

    def __init__(self) -> None:
        super().__init__("voted")
        self.architecture = replace(self.architecture, predictor="parts")
        self.calls = 0

    def maps(self, patches: Any, grid: tuple[int, int]) -> Tensor:
        self.calls += 1
        sure = super().maps(patches, grid)
        return sure if self.calls > 1 else torch.full_like(sure, 1 / 3)


def test_lessons_of__a_learner_taught_by_crops_is_asked_in_them_too(tmp_path: Path) -> None:
    looks = sampled(source(tmp_path, 40))
    *_, wholes = lessons_of(Taught(), looks, CPU)
    shown = torch.zeros(40, 64, dtype=torch.bool)
    for view in looks.crops:
        shown |= meeting_places(whole_frames(view.frame), view.frame, GRID)[1]
    colour = looks.wholes.patches.float()
    sure = colour.max(dim=2).values > 0.95 * colour.sum(dim=2)
    right = wholes.targets == (colour.argmax(dim=2) - 1) % 3
    assert right[shown & sure].float().mean() > 0.93
    assert 0.1 < (~shown).float().mean() < 0.9
    assert (wholes.targets[~shown] == 0).all()  # the first of equals


def test_sample_looks__are_the_same_again(tmp_path: Path) -> None:
    images = source(tmp_path, 5)
    one, other = sampled(images), sampled(images)
    assert torch.equal(one.wholes.patches, other.wholes.patches)
    for view, again in zip(one.crops, other.crops, strict=True):
        assert torch.equal(view.tokens.patches, again.tokens.patches)
        assert torch.equal(view.frame, again.frame)


def test_sample_looks__one_crop_of_two_is_small(tmp_path: Path) -> None:
    for view, (least, most) in zip(sampled(source(tmp_path, 40)).crops, CROPS, strict=True):
        share = torch.linalg.det(view.frame[:, :, :2]).abs()
        assert least - 0.05 < share.min()
        assert share.max() < most + 0.05
        assert share.max() - share.min() > 0.6 * (most - least)


def test_learn_parts_again__tells_the_parts_and_goes_on_from_there(tmp_path: Path) -> None:
    lessons = lessons_of(Halves("voted"), sampled(source(tmp_path, 40)), CPU)
    tokens, targets = lessons[-1].tokens, lessons[-1].targets

    def right(model: PartPredictor) -> float:
        told = model.told(tokens, GRID)
        assert told.shares.shape == (40, 64, 2)
        parts = told.shares * (1 - told.background[..., None])
        kinds = torch.cat([parts, told.background[..., None]], dim=2)
        return float((kinds.argmax(dim=2) == targets).float().mean())

    def learned(name: str, before: PartPredictor | None, steps: int, seed: int) -> PartPredictor:
        data = LessonData(lambda: lessons, {}, steps, seed)
        task = CropLearning(name, data, 3, 64, 2, before, seed)
        given = TrainingOptions(output=tmp_path, device="cpu")
        return learn_parts_again(task, options_within(given, name, seed))

    made = learned("made", None, 240, 0)
    assert right(made) > 0.97
    again = learned("again", None, 240, 0)
    assert torch.equal(again.last.weight, made.last.weight)
    # A step changes little of what was learned; from the beginning it would not do.
    assert right(learned("on", made, 1, 1)) > 0.9
    assert right(learned("anew", None, 1, 1)) < 0.9
    assert torch.equal(again.last.weight, made.last.weight)
