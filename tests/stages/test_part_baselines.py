import itertools

import numpy as np
import pytest
import torch

from semmae.models.encoders import Tokens
from semmae.models.part_scores import GridCells, SetCentres
from semmae.models.parts import PartArchitecture, PartLearner, patch_colours
from semmae.stages.evals.metrics import fixed_grid
from semmae.stages.evals.part_baselines import BASELINES, Baseline, beside

GRID, WIDTH, HEADS = (3, 4), 6, 5


def tokens(count: int = 30) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    return Tokens(
        torch.randn(count, WIDTH, generator=generator),
        3 + 2 * torch.randn(count, 12, WIDTH, generator=generator),
        torch.rand(count, HEADS, 12, generator=generator),
    )


def learner(background: str, **changes: object) -> PartLearner:
    torch.manual_seed(0)
    shape: dict[str, object] = {"width": WIDTH, "parts": 3, "clusters": 4}
    shape |= {"temperature": 0.3, "blur": 0.4, "affinity": 0.0}
    if background == "predicted":
        shape |= {"predictor": "places", "grid_places": 12, "told_by": "predictor"}
    made = PartLearner(PartArchitecture(background=background, **{**shape, **changes}))  # type: ignore[arg-type]
    for _, own in made.named_buffers(recurse=False):
        own.copy_(torch.rand_like(own) + 0.5)
    if background == "voted":
        made.token_mean.fill_(3)
        made.token_std.fill_(2)
        made.centres.copy_(torch.randn(4, WIDTH))
        made.objectness.copy_(torch.tensor([1.0, -1, 1, -1]))
    if made.predictor is not None:
        made.predictor.token_mean.fill_(3)
        made.predictor.last.weight[-1] *= 60
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "background"),
    list(itertools.product(BASELINES, ("predicted", "voted", "token", "none"))),
)
def test_beside__has_as_many_ids_as_the_learner_and_its_statistics(
    name: Baseline, background: str
) -> None:
    start, given = learner(background), tokens()
    made = beside(start, given, GRID, name, seed=0)
    expected = HEADS if name == "attention" else start.architecture.channels
    assert made.architecture.channels == expected
    for buffer in ("token_mean", "token_std", "class_mean", "class_std"):
        assert torch.equal(getattr(made, buffer), getattr(start, buffer))
    images = torch.randint(0, 256, (30, 6, 8, 3), dtype=torch.uint8)
    maps = made.maps(made.patches(given, GRID, patch_colours(images, GRID)), GRID)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(30, *GRID))
    assert not made.training


@pytest.mark.parametrize("background", ["predicted", "voted"])
@pytest.mark.parametrize("name", BASELINES)
def test_beside__shares_the_mask_where_it_is_meant_to(name: Baseline, background: str) -> None:
    start, given = learner(background), tokens()
    made = beside(start, given, GRID, name, seed=0)
    mask = start.patches(given, GRID).objects
    assert 0.1 < mask.mean() < 0.9
    if name in ("kmeans", "image_kmeans", "colour"):
        # Not the learner's own: that may lie on another device.
        assert made.predictor is None or made.predictor is not start.predictor
        assert torch.equal(made.patches(given, GRID).objects, mask)
    else:
        assert made.architecture.background == "none"
        assert made.predictor is None
        assert made.patches(given, GRID).objects.all()


@pytest.mark.parametrize("name", BASELINES)
def test_beside__shares_temperature_and_blur_but_where_it_is_bare(name: Baseline) -> None:
    made = beside(learner("voted"), tokens(), GRID, name, seed=0).architecture
    assert made.temperature == 0.3
    assert made.told_by == "tokens"
    assert made.blur == (0.0 if name in ("bare_kmeans", "grid") else 0.4)
    assert not made.pixel_decoder


def test_beside__kmeans_is_made_of_object_tokens() -> None:
    start, given = learner("voted"), tokens(200)
    made = beside(start, given, GRID, "kmeans", seed=0)
    assert isinstance(made.scores, SetCentres)
    patches = start.patches(given, GRID)
    points = patches.features[patches.objects > 0]
    nearest = torch.cdist(points, made.scores.centres).argmin(dim=1)
    for part in range(3):
        mean = points[nearest == part].mean(dim=0)
        torch.testing.assert_close(made.scores.centres[part], mean, atol=0.05, rtol=0)


def test_beside__is_the_same_again_for_one_seed() -> None:
    start, given = learner("voted"), tokens(100)
    first, second = (beside(start, given, GRID, "bare_kmeans", seed=3) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_beside__the_grid_is_the_fixed_one() -> None:
    made = beside(learner("voted"), tokens(), GRID, "grid", seed=0)
    assert isinstance(made.scores, GridCells)
    labels = made.maps(made.patches(tokens(), GRID), GRID).argmax(dim=1).flatten(1)
    assert np.array_equal(labels[0].numpy(), fixed_grid(*GRID, 4))
    assert (labels == labels[0]).all()


def test_beside__takes_over_the_means_of_places() -> None:
    start, given = learner("none", places=12), tokens()
    made = beside(start, given, GRID, "kmeans", seed=0)
    assert made.token_mean.shape == (12, WIDTH)
    assert torch.equal(made.patches(given, GRID).features, start.patches(given, GRID).features)
