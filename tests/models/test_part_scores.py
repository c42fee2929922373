import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semmae.errors import SettingError
from semmae.models.encoders import Tokens
from semmae.models.part_scores import (
    Attending,
    AttentionHeads,
    GridCells,
    ImageCentres,
    Patches,
    SetCentres,
    kmeans_inside_images,
)
from semmae.models.parts import LEARNED, PartArchitecture, PartLearner, patch_colours

BASELINES = ("kmeans", "image-kmeans", "colour", "attention", "grid")
WIDTH, GRID = 6, (3, 4)


def baseline(variant: str, **changes: Any) -> PartLearner:
    torch.manual_seed(0)
    shape = {"width": WIDTH, "parts": 3, "clusters": 4, "grid_places": 12, "background": "none"}
    made = PartLearner(PartArchitecture(variant=variant, **{**shape, **changes}))  # type: ignore[arg-type]
    made.centres.copy_(torch.randn_like(made.centres))
    made.objectness.copy_(torch.arange(len(made.objectness)) % 2 - 0.5)
    if isinstance(made.scores, SetCentres):
        made.scores.centres.copy_(torch.randn(3, WIDTH))
    if isinstance(made.scores, GridCells):
        made.scores.cells.copy_(torch.arange(12) % 3)
    return made


def tokens(count: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    return Tokens(
        torch.randn(count, WIDTH, generator=generator),
        torch.randn(count, 12, WIDTH, generator=generator),
        torch.rand(count, 3, 12, generator=generator),
    )


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 6, 8, 3), generator=generator, dtype=torch.uint8)


def patches(points: Tensor, objects: Tensor | None = None) -> Patches:
    weights = torch.ones(points.shape[:2]) if objects is None else objects
    return Patches(points, torch.zeros(len(points), 1), torch.zeros(len(points), 1, 1), weights)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("normalisation", ["parts", "places"])
def test_attending__is_attention_whose_rows_are_shared_out(
    similarity: Any, normalisation: Any
) -> None:
    torch.manual_seed(0)
    features, queries = torch.randn(2, 12, WIDTH), torch.randn(2, 3, WIDTH)
    objects = (torch.arange(12) < 8).float().expand(2, -1)
    products = torch.einsum("bnd,bld->bnl", queries, features)
    if similarity == "cosine":
        products /= queries.norm(dim=2)[:, :, None] * features.norm(dim=2)[:, None]
    else:
        products /= WIDTH**0.5
    expected = (products / 0.5).exp()
    if normalisation == "places":
        expected /= expected[:, :, :8].sum(dim=2, keepdim=True)
    expected /= expected.sum(dim=1, keepdim=True)
    shares = Attending(0.5, similarity, normalisation).shares(queries, patches(features, objects))
    torch.testing.assert_close(shares, expected, rtol=1e-4, atol=1e-5)


def test_attending__over_places_leaves_no_part_without_patches() -> None:
    # All patches are most like the first token.  Over places both parts have the same to give, so
    # the first cannot have more at all of them.
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3]]])
    queries = torch.tensor([[[1.0, 0.1], [0.0, 1.0]]])
    owners = {
        over: Attending(0.1, normalisation=over).shares(queries, patches(features)).argmax(dim=1)
        for over in ("parts", "places")
    }
    assert owners["parts"].tolist() == [[0, 0, 0, 0]]
    assert set(owners["places"].flatten().tolist()) == {0, 1}


def test_attending__over_places_bears_an_image_without_objects() -> None:
    features, queries = torch.randn(1, 12, WIDTH), torch.randn(1, 3, WIDTH)
    nothing = patches(features, torch.zeros(1, 12))
    shares = Attending(0.1, normalisation="places").shares(queries, nothing)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, 12))


@pytest.mark.parametrize("variant", BASELINES)
@pytest.mark.parametrize("background", ["voted", "none"])
def test_baselines__give_maps_that_sum_to_one(variant: str, background: str) -> None:
    made = baseline(variant, background=background)
    maps = made(tokens(), GRID, images())
    assert maps.shape == (2, made.architecture.channels, *GRID)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, *GRID), rtol=0, atol=1e-5)
    assert not list(made.parameters())


@pytest.mark.parametrize("variant", BASELINES)
def test_baselines__share_the_background_of_the_learned(variant: str) -> None:
    made = baseline(variant, background="voted", blur=0.0)
    known = made.patches(tokens(), GRID, patch_colours(images(), GRID))
    maps = made.maps(known, GRID).flatten(2)
    assert torch.equal(maps[:, 0], 1 - known.objects)
    assert 0 < known.objects.mean() < 1


@pytest.mark.parametrize("variant", BASELINES)
def test_architecture__refuses_a_background_token_where_there_are_no_tokens(variant: str) -> None:
    assert variant not in LEARNED
    with pytest.raises(SettingError, match=f"--variant {variant} has none"):
        PartArchitecture(width=4, variant=variant, background="token")  # type: ignore[arg-type]


def test_set_centres__give_each_patch_to_the_nearest() -> None:
    scores = SetCentres(4, WIDTH, temperature=0.1)
    scores.centres.copy_(torch.randn(4, WIDTH))
    points = torch.randn(2, 12, WIDTH)
    found = scores(patches(points)).argmax(dim=1)
    for image, place in itertools.product(range(2), range(12)):
        apart = [float((points[image, place] - centre).norm()) for centre in scores.centres]
        assert int(found[image, place]) == apart.index(min(apart))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), clusters=st.integers(1, 5))
def test_kmeans_inside_images__each_point_is_with_its_nearest_mean(
    seed: int, clusters: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Far apart beside their spread, so that Lloyd's rounds are over well before they are cut off.
    centres = 100 * torch.randn(2, clusters, 3, generator=generator)
    member = torch.randint(0, clusters, (2, 20), generator=generator)
    points = centres.gather(1, member[..., None].expand(-1, -1, 3))
    points = points + 0.01 * torch.randn(2, 20, 3, generator=generator)
    labels = kmeans_inside_images(points, torch.ones(2, 20), clusters)
    for image in range(2):
        used = sorted(set(labels[image].tolist()))
        means = {c: points[image][labels[image] == c].mean(dim=0) for c in used}
        for place in range(20):
            apart = {c: float((points[image, place] - mean).norm()) for c, mean in means.items()}
            own = int(labels[image, place])
            assert apart[own] == pytest.approx(min(apart.values()), abs=1e-3)


def test_kmeans_inside_images__orders_clusters_by_area() -> None:
    points = torch.tensor([[9.0], [9.1], [9.2], [1.0], [1.1], [5.0]])[None]
    assert kmeans_inside_images(points, torch.ones(1, 6), 3).tolist() == [[0, 0, 0, 1, 1, 2]]


def test_kmeans_inside_images__background_makes_no_centres() -> None:
    points = torch.tensor([[0.0], [0.1], [4.0], [4.1], [900.0], [905.0]])[None]
    weights = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    labels = kmeans_inside_images(points, weights, 2)[0]
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_kmeans_inside_images__an_image_is_alone_with_itself() -> None:
    points = torch.randn(5, 12, 3, generator=torch.Generator().manual_seed(0))
    whole = kmeans_inside_images(points, torch.ones(5, 12), 3)
    for image in range(5):
        alone = kmeans_inside_images(points[image : image + 1], torch.ones(1, 12), 3)
        assert torch.equal(alone[0], whole[image])


def test_image_centres__of_colours_see_no_tokens() -> None:
    colours = patch_colours(images(), GRID)
    scores = ImageCentres(3, colours=True)
    first, second = (
        scores(
            Patches(
                torch.randn(2, 12, WIDTH),
                torch.zeros(2, 1),
                torch.zeros(2, 1, 1),
                ones,
                colours=colours,
            )
        )
        for ones in (torch.ones(2, 12), torch.ones(2, 12))
    )
    assert torch.equal(first, second)


def test_patch_colours__are_means_of_pixels() -> None:
    given_images = images()
    colours = patch_colours(given_images, GRID).reshape(2, *GRID, 3)
    for image, row, column in itertools.product(range(2), range(3), range(4)):
        patch = given_images[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].float()
        torch.testing.assert_close(colours[image, row, column], patch.mean(dim=(0, 1)))


def test_attention_heads__go_by_the_largest_share() -> None:
    attention = torch.tensor([[[0.1, 0.6], [0.3, 0.2]]])
    shares = AttentionHeads()(
        Patches(torch.zeros(1, 2, 1), torch.zeros(1, 1), attention, torch.ones(1, 2))
    )
    torch.testing.assert_close(shares, torch.tensor([[[0.25, 0.75], [0.75, 0.25]]]))


def test_grid_cells__are_the_same_in_every_image() -> None:
    made = baseline("grid", blur=0.0)
    labels = made(tokens(3), GRID).argmax(dim=1).flatten(1)
    assert labels.tolist() == [[place % 3 for place in range(12)]] * 3
