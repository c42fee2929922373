import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from semmae.models.places import SPAN, PlacePredictor, object_cells
from semmae.pipeline.views import draw_view

WIDTH, GRID = 6, (3, 4)


def predictor(cells: int = 4) -> PlacePredictor:
    torch.manual_seed(0)
    made = PlacePredictor(WIDTH, cells, 12)
    made.token_mean.copy_(torch.randn(12, WIDTH))
    made.token_std.copy_(torch.rand(WIDTH) + 0.5)
    return made.requires_grad_(False)


def whole(count: int) -> Tensor:
    return torch.eye(2, 3).expand(count, -1, -1)


def by_hand(frame: Tensor, view: tuple[int, int], mask: Tensor, cells: int) -> list[int]:
    """`object_cells` of one image, patch by patch; mask (h, w)."""
    rows, columns = mask.shape
    lit = [(r + 0.5, c + 0.5) for r in range(rows) for c in range(columns) if mask[r, c]]
    radius = (len(lit) / torch.pi) ** 0.5
    middle = [sum(place[axis] for place in lit) / len(lit) for axis in (0, 1)]
    found = []
    for r in range(view[0]):
        for c in range(view[1]):
            seen = torch.tensor([(2 * c + 1) / view[1] - 1, (2 * r + 1) / view[0] - 1, 1.0])
            x, y = (frame @ seen).tolist()
            place = ((y + 1) / 2 * rows, (x + 1) / 2 * columns)
            if not mask[int(place[0]), int(place[1])]:
                found.append(cells**2)
                continue
            cell = []
            for axis in (0, 1):
                apart = (place[axis] - middle[axis]) / (SPAN * radius)
                cell.append(min(max(int((apart + 1) / 2 * cells), 0), cells - 1))
            found.append(cell[0] * cells + cell[1])
    return found


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.2, 0.32), (0.05, 1.0)])
def test_object_cells__are_as_worked_out_by_hand(scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    view = draw_view(torch.zeros(20, 3, 60, 70), (48, 32), scale)
    masks = (torch.rand(20, 5, 7) < 0.4).float()
    masks[:, 2, 3] = 1
    found = object_cells(view.frame, (6, 4), masks.flatten(1), (5, 7), 6)
    wanted = torch.tensor(
        [by_hand(*pair, 6) for pair in zip(view.frame, [(6, 4)] * 20, masks, strict=True)]
    )
    # Places on the edge between two cells may fall to either.
    assert (found == wanted).float().mean() > 0.99
    assert 36 in found
    assert len(set(found.flatten().tolist())) > 12


def test_object_cells__move_with_the_object() -> None:
    mask = torch.zeros(1, 6, 8)
    mask[0, 1:4, 2:4] = 1
    here = object_cells(whole(1), (6, 8), mask.flatten(1), (6, 8), 4).reshape(6, 8)
    moved = mask.roll((1, 3), (1, 2))
    there = object_cells(whole(1), (6, 8), moved.flatten(1), (6, 8), 4).reshape(6, 8)
    assert torch.equal(here.roll((1, 3), (0, 1)), there)
    assert here[2, 2] != here[2, 3]


def test_object_cells__are_of_the_image_where_all_of_it_is_object() -> None:
    cells = object_cells(whole(2), (6, 6), torch.ones(2, 36), (6, 6), 8).reshape(2, 6, 6)
    assert torch.equal(cells[0], cells[1])
    assert torch.equal(cells[0] // 8, cells[0].T % 8)
    assert cells[0, 0, 0] < cells[0, 0, 5] < cells[0, 5, 5] < 64


def test_object_cells__without_an_object_there_is_but_background() -> None:
    assert (object_cells(whole(2), (6, 6), torch.zeros(2, 36), (6, 6), 4) == 16).all()


def test_told__shares_and_background_are_likelihoods() -> None:
    told = predictor().told(torch.randn(5, 12, WIDTH), GRID)
    assert told.shares.shape == (5, 12, 8)
    torch.testing.assert_close(told.shares.sum(dim=2), torch.ones(5, 12))
    assert told.background.shape == (5, 12)
    assert ((told.background > 0) & (told.background < 1)).all()


def test_told__background_is_the_last_score() -> None:
    made, tokens = predictor(), torch.randn(5, 12, WIDTH)
    before = made.told(tokens, GRID)
    assert made.last.bias is not None
    made.last.bias[-1] += 50
    after = made.told(tokens, GRID)
    assert (after.background > 0.99).all()
    torch.testing.assert_close(after.shares, before.shares)


def test_told__knows_no_left_and_right() -> None:
    made, tokens = predictor(), torch.randn(5, 12, WIDTH)
    before = made.told(tokens, GRID).shares
    for own in made.last.parameters():
        own[:-1] = own[:-1].view(4, 4, -1).flip(1).reshape(own[:-1].shape)
    torch.testing.assert_close(made.told(tokens, GRID).shares, before)


def test_told__goes_by_tokens_less_the_mean_of_their_place() -> None:
    made = predictor()
    at_mean = made.told(made.token_mean.expand(2, 12, WIDTH), GRID).shares
    torch.testing.assert_close(at_mean, at_mean[:1, :1].expand_as(at_mean))


def test_features__are_standardised_roots() -> None:
    made = predictor()
    made.root_mean.copy_(torch.rand(8))
    made.root_std.fill_(0.25)
    shares = F.normalize(torch.rand(5, 12, 8), p=1, dim=2)
    wanted = (shares.sqrt() - made.root_mean) * 4
    torch.testing.assert_close(made.features(shares), wanted)
