from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from semmae.models.encoders import FrozenEncoder, Tokens
from semmae.models.parts import PartArchitecture, PartLearner
from semmae.models.vision import scaled
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.predictor_learning import Lesson
from semmae.stages.second_round import learn_parts_of_crops, sample_parts

GRID, CPU = (8, 8), torch.device("cpu")


class Colours(nn.Module):
    """An encoder whose tokens are the mean colours of patches of 8."""

    patch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(3), torch.ones(3)

    def forward(self, images: Tensor) -> Tokens:
        return self.features(scaled(images))

    def features(self, pixels: Tensor) -> Tokens:
        patches = F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)
        return Tokens(patches.mean(dim=1), patches, patches.new_zeros(len(patches), 1, 1))


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


def sampled(images: ImageSource, background: str = "voted") -> tuple[Lesson, Lesson]:
    encoder, count = cast(FrozenEncoder, Colours()), len(images)
    return sample_parts(encoder, Halves(background), images, (64, 64), count, seed=0)


def test_sample_parts__a_crop_shows_the_parts_of_the_whole_where_it_was_taken(
    tmp_path: Path,
) -> None:
    images = source(tmp_path, 40)
    for background, shift in (("voted", 2), ("none", None)):
        for lesson in sampled(images, background):
            assert lesson.tokens.shape == (40, 64, 3)
            assert lesson.targets.shape == (40, 64)
            colour = lesson.tokens.float()
            sure = colour.max(dim=2).values > 0.95 * colour.sum(dim=2)
            if shift is None:  # no learner without a background calls red anything
                sure &= colour.argmax(dim=2) > 0
            wanted = (colour.argmax(dim=2) + (shift or -1)) % 3
            # The maps of whole images are of patches: a crop sees between them.
            assert (lesson.targets == wanted)[sure].float().mean() > 0.93
    crops, wholes = sampled(images)
    assert not torch.equal(crops.tokens, wholes.tokens)


def test_sample_parts__are_the_same_again(tmp_path: Path) -> None:
    images = source(tmp_path, 5)
    for one, other in zip(sampled(images), sampled(images), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)


def test_learn_parts_of_crops__tells_the_parts_again(tmp_path: Path) -> None:
    crops, wholes = sampled(source(tmp_path, 40))
    made = learn_parts_of_crops(crops, wholes, 2, 60, 0, CPU)
    told = made.told(wholes.tokens, GRID)
    assert told.shares.shape == (40, 64, 2)
    kinds = torch.cat(
        [told.shares * (1 - told.background[..., None]), told.background[..., None]], 2
    )
    assert (kinds.argmax(dim=2) == wholes.targets).float().mean() > 0.97
    again = learn_parts_of_crops(crops, wholes, 2, 60, 0, CPU).told(wholes.tokens, GRID)
    assert torch.equal(again.shares, told.shares)
