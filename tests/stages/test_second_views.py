import math

import numpy as np
import pytest
import torch
from torch import Tensor

from semmae.models.parts import PartArchitecture, PartLearner
from semmae.pipeline.crops import squash
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.networks import open_encoder
from semmae.stages.part_start import sample_tokens
from semmae.stages.second_views import SCALE, disagreement, look_again, sample_views
from semmae.tests.world import World

WHOLE = torch.eye(2, 3)
MIRRORED = WHOLE * torch.tensor([[-1.0], [1.0]])


def random_maps(count: int, parts: int, grid: tuple[int, int]) -> Tensor:
    return torch.randn(count, parts, *grid).softmax(dim=1)


def frames(count: int) -> Tensor:
    """Frames of crops, every other one mirrored."""
    wide, tall = torch.empty(2, count).uniform_(0.5, 1)
    across, down = (1 - wide) * 0.7, -(1 - tall) * 0.4
    mirror = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    none = torch.zeros(count)
    x = torch.stack([wide * mirror, none, across], dim=1)
    return torch.stack([x, torch.stack([none, tall, down], dim=1)], dim=1)


def at(maps: Tensor, x: float, y: float) -> Tensor:
    """Maps (P, h, w) between their patches, at a place from -1 to 1; the border goes on outside."""
    height, width = maps.shape[1:]
    column = min(max((x + 1) * width / 2 - 0.5, 0), width - 1)
    row = min(max((y + 1) * height / 2 - 0.5, 0), height - 1)
    found = torch.zeros(len(maps))
    for r in {math.floor(row), math.ceil(row)}:
        for c in {math.floor(column), math.ceil(column)}:
            found += (1 - abs(row - r)) * (1 - abs(column - c)) * maps[:, r, c]
    return found


def test_disagreement__is_half_the_squared_difference_at_the_same_places() -> None:
    torch.manual_seed(0)
    whole, seen, frame = random_maps(4, 3, (5, 4)), random_maps(4, 3, (5, 4)), frames(4)
    slow = []
    for image in range(4):
        for r in range(5):
            for c in range(4):
                place = torch.tensor([(2 * c + 1) / 4 - 1, (2 * r + 1) / 5 - 1, 1.0])
                x, y = (frame[image] @ place).tolist()
                there = at(whole[image], x, y)
                slow.append((there - seen[image, :, r, c]).square().sum().item() / 2)
    assert float(disagreement(whole, seen, frame)) == pytest.approx(np.mean(slow), abs=1e-5)


def test_disagreement__is_0_for_equal_maps_and_1_for_other_parts() -> None:
    torch.manual_seed(0)
    maps = random_maps(2, 3, (4, 6))
    assert float(disagreement(maps, maps, WHOLE.expand(2, 2, 3))) == pytest.approx(0, abs=1e-9)
    mirrored = MIRRORED.expand(2, 2, 3)
    assert float(disagreement(maps, maps.flip(3), mirrored)) == pytest.approx(0, abs=1e-9)
    assert float(disagreement(maps, maps, mirrored)) > 0.01
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[:, 0], other[:, 2] = 1, 1
    assert float(disagreement(one, other, frames(2))) == pytest.approx(1)


def test_disagreement__is_0_where_maps_are_constant_and_sends_gradients_to_both() -> None:
    torch.manual_seed(0)
    constant = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1).expand(4, 3, 5, 5)
    assert float(disagreement(constant, constant, frames(4))) == pytest.approx(0, abs=1e-9)
    whole, seen = (random_maps(4, 3, (5, 5)).requires_grad_() for _ in range(2))
    disagreement(whole, seen, frames(4)).backward()  # type: ignore[no-untyped-call]
    for maps in (whole, seen):
        assert maps.grad is not None
        assert maps.grad.abs().sum() > 0


def test_disagreement__is_0_for_a_learner_whose_maps_are_constant(world: World) -> None:
    encoder = open_encoder(str(world.encoder))
    learner = PartLearner(PartArchitecture(width=encoder.width, parts=3, background="none"))
    learner.token_std.fill_(math.inf)  # every patch is the mean patch
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    view = look_again(encoder, images)
    learner.class_std.fill_(math.inf)
    with torch.no_grad():
        whole, seen = learner(encoder(images), (4, 4)), learner(view.tokens, (4, 4))
    assert float(disagreement(whole, seen, view.frame)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_look_again__shows_crops_of_the_size_of_the_image(
    world: World, size: tuple[int, int]
) -> None:
    encoder = open_encoder(str(world.encoder))
    images = torch.randint(0, 256, (40, *size, 3), dtype=torch.uint8)
    torch.manual_seed(1)
    view = look_again(encoder, images)
    assert view.tokens.patches.shape == (40, size[0] * size[1] // 64, encoder.width)
    assert not view.tokens.patches.requires_grad
    area = torch.linalg.det(view.frame[:, :, :2])
    assert 0.2 < (area < 0).float().mean() < 0.8
    assert area.abs().min() >= 0.75 * SCALE - 1e-5
    torch.manual_seed(1)
    assert torch.equal(look_again(encoder, images).frame, view.frame)


def test_sample_views__are_of_the_images_that_tokens_are_sampled_of(world: World) -> None:
    encoder = open_encoder(str(world.encoder))
    images = ImageSource(list_images(world.data, "train"))
    before = torch.random.get_rng_state()
    kept = sample_views(encoder, images, (32, 32), 10, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    chosen = sorted(np.random.default_rng(5).permutation(len(images))[:10].tolist())
    pixels = np.stack([squash(images.decoded(index), (32, 32)) for index in chosen])
    whole = encoder(torch.from_numpy(pixels)).patches
    tokens = sample_tokens(encoder, images, (32, 32), 10, seed=5)
    torch.testing.assert_close(tokens.patches, whole)
    torch.manual_seed(5)
    wanted = look_again(encoder, torch.from_numpy(pixels))
    assert torch.equal(kept.frame, wanted.frame)
    torch.testing.assert_close(
        kept.tokens.patches.float(), wanted.tokens.patches, rtol=0, atol=0.02
    )
    again = sample_views(encoder, images, (32, 32), 10, seed=5)
    assert torch.equal(again.tokens.patches, kept.tokens.patches)
