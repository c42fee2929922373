import pytest
import torch

from semmae.models.places import PlacePredictor, cells_of
from semmae.pipeline.views import draw_view

WIDTH, GRID = 6, (3, 4)


def predictor(cells: int = 4) -> PlacePredictor:
    torch.manual_seed(0)
    made = PlacePredictor(WIDTH, cells, 12)
    made.token_mean.copy_(torch.randn(12, WIDTH))
    made.token_std.copy_(torch.rand(WIDTH) + 0.5)
    return made.requires_grad_(False)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.2, 0.32), (0.05, 1.0)])
def test_cells_of__are_where_the_patches_were_seen(scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    # Pixels that hold their own place: the mean over a patch is where its centre was seen.
    across = ((torch.arange(96) + 0.5) / 96).expand(96, 96)
    images = torch.stack([across, across.T, across]).expand(20, 3, 96, 96)
    view = draw_view(images, (48, 32), scale)
    seen = torch.nn.functional.avg_pool2d(view.pixels, 8).flatten(2)
    exact = seen * 5
    wanted = exact.floor().clamp(0, 4).long()
    found = cells_of(view.frame, (6, 4), 5)
    assert found.shape == (20, 24)
    clear = ((exact - exact.round()).abs() > 0.1)[:, :2].all(dim=1)
    assert clear.float().mean() > 0.5
    assert torch.equal(found[clear], (wanted[:, 1] * 5 + wanted[:, 0])[clear])


def test_roots__are_of_shares() -> None:
    roots = predictor().roots(torch.randn(5, 12, WIDTH), GRID)
    assert roots.shape == (5, 12, 8)
    torch.testing.assert_close(roots.square().sum(dim=2), torch.ones(5, 12))


def test_roots__know_no_left_and_right() -> None:
    made, tokens = predictor(), torch.randn(5, 12, WIDTH)
    before = made.roots(tokens, GRID)
    for own in made.last.parameters():
        own.copy_(own.view(4, 4, -1).flip(1).reshape(own.shape))
    torch.testing.assert_close(made.roots(tokens, GRID), before)


def test_roots__go_by_tokens_less_the_mean_of_their_place() -> None:
    made = predictor()
    at_mean = made.roots(made.token_mean.expand(2, 12, WIDTH), GRID)
    torch.testing.assert_close(at_mean, at_mean[:1, :1].expand_as(at_mean))


def test_features__are_standardised_roots() -> None:
    made, tokens = predictor(), torch.randn(5, 12, WIDTH)
    made.root_mean.copy_(torch.rand(8))
    made.root_std.fill_(0.25)
    wanted = (made.roots(tokens, GRID) - made.root_mean) * 4
    torch.testing.assert_close(made.features(tokens, GRID), wanted)
