import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.pipeline.views import draw_view, meeting_places, patches_at, recoloured


def positions(count: int, size: int) -> torch.Tensor:
    """Images whose first two channels are the place (x, y), scaled to [0, 1]."""
    along = (2 * torch.arange(size) + 1) / size / 2
    image = torch.stack([along.expand(size, size), along[:, None].expand(size, size)])
    return torch.cat([image, torch.zeros(1, size, size)]).expand(count, -1, -1, -1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.2, 1.0))
def test_draw_view__shows_what_its_frame_says(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    view = draw_view(positions(3, 64), 16, scale)
    for image in range(3):
        for row, column in ((0, 0), (3, 12), (15, 15)):
            place = torch.tensor([(2 * column + 1) / 16 - 1, (2 * row + 1) / 16 - 1, 1.0])
            seen = view.frame[image] @ place
            assert seen.abs().max() <= 1 + 1e-5
            shown = 2 * view.pixels[image, :2, row, column] - 1
            assert torch.allclose(shown, seen, atol=0.03)


@pytest.mark.parametrize("scale", [0.3, 0.9])
def test_draw_view__takes_in_the_share_of_the_area_asked_for(scale: float) -> None:
    torch.manual_seed(0)
    frame = draw_view(positions(500, 8), 8, scale).frame
    area = torch.linalg.det(frame[:, :, :2]).abs()
    assert area.max() <= 1 + 1e-5
    # A side is cut at the image's, which at an aspect of 4 / 3 leaves 3 / 4 of the area.
    assert area.min() >= 0.75 * scale - 1e-5
    mirrored = (torch.linalg.det(frame[:, :, :2]) < 0).float().mean()
    assert 0.4 < mirrored < 0.6


def test_draw_view__follows_the_generator() -> None:
    torch.manual_seed(3)
    first = draw_view(positions(4, 16), 8, 0.4)
    torch.manual_seed(3)
    again = draw_view(positions(4, 16), 8, 0.4)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.frame, again.frame)


def test_meeting_places__meet_at_the_same_place_of_the_image() -> None:
    torch.manual_seed(1)
    images = positions(6, 96)
    first, second = (draw_view(images, 48, 0.4) for _ in range(2))
    places, inside = meeting_places(first.frame, second.frame, (6, 6))
    there = patches_at(second.pixels.flatten(2).transpose(1, 2), places, (48, 48))
    here = torch.nn.functional.avg_pool2d(first.pixels, 8).flatten(2).transpose(1, 2)
    assert 0.2 < inside.float().mean() < 1
    assert torch.allclose(here[inside], there[inside], atol=0.03)


def test_meeting_places__of_a_view_with_itself_are_its_own() -> None:
    torch.manual_seed(2)
    frame = draw_view(positions(3, 16), 8, 0.5).frame
    tokens = torch.randn(3, 12, 5)
    places, inside = meeting_places(frame, frame, (3, 4))
    assert inside.all()
    assert torch.allclose(patches_at(tokens, places, (3, 4)), tokens, atol=1e-4)


def test_recoloured__of_strength_zero_changes_nothing() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(recoloured(pixels, 0.0), pixels)


def test_recoloured__keeps_equal_colours_equal_and_in_range() -> None:
    torch.manual_seed(0)
    colours = torch.rand(8, 3, 1, 2)
    made = recoloured(colours.repeat(1, 1, 3, 1), 1.0)
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.allclose(made[:, :, 0], made[:, :, 2])
    assert not torch.allclose(made, colours.repeat(1, 1, 3, 1), atol=0.1)


def test_recoloured__greys_stay_grey() -> None:
    torch.manual_seed(0)
    grey = torch.rand(16, 1, 2, 2).expand(-1, 3, -1, -1)
    made = recoloured(grey, 1.0)
    assert torch.allclose(made[:, 0], made[:, 2], atol=5e-3)


def test_recoloured__turns_hues_all_the_way_round() -> None:
    torch.manual_seed(0)
    red = torch.tensor([0.7, 0.3, 0.3]).view(1, 3, 1, 1).expand(300, -1, 2, 2)
    made = recoloured(red, 1.0)[:, :, 0, 0]
    strongest = made.argmax(dim=1)
    shares = [float((strongest == channel).float().mean()) for channel in range(3)]
    assert min(shares) > 0.15
    assert math.isclose(sum(shares), 1, rel_tol=1e-6)
