import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semmae.errors import SettingError
from semmae.models.encoders import Tokens
from semmae.models.part_losses import diversity, rebuilt_features
from semmae.models.part_scores import AnchoredTokens, ClassTokens
from semmae.models.parts import PartArchitecture, PartLearner, part_labels

WIDTH = 12
GRID = (3, 5)
VARIANTS = ["anchored", "paper"]
BACKGROUNDS = ["predicted", "voted", "token", "none"]


@torch.no_grad()
def learner(seed: int = 0, **changes: Any) -> PartLearner:
    """A tiny one whose clusters and statistics are drawn."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"width": WIDTH, "parts": 4, "clusters": 5}
    if changes.get("background") == "predicted" or changes.get("told_by") == "predictor":
        shape |= {"predictor": "places", "place_cells": 4, "grid_places": 15}
    made = PartLearner(PartArchitecture(**{**shape, **changes}))
    for name in ("token", "class"):
        getattr(made, f"{name}_mean").copy_(torch.randn(WIDTH))
        getattr(made, f"{name}_std").copy_(torch.rand(WIDTH) + 0.5)
    made.centres.copy_(torch.randn_like(made.centres))
    made.objectness.copy_(torch.arange(len(made.objectness)) % 2 - 0.5)
    if made.predictor is not None:
        made.predictor.last.weight[-1] *= 60
        made.predictor.last.bias = torch.nn.Parameter(torch.zeros(17))
        made.predictor.last.bias[-1] = math.log(16)
        made.predictor.root_mean.copy_(torch.rand(8))
        made.predictor.root_std.fill_(0.4)
    return made


def part_tokens(made: PartLearner, style: Tensor) -> Tensor:
    assert isinstance(made.scores, AnchoredTokens | ClassTokens)
    return made.scores.tokens(style)


def tokens(count: int = 2, places: int = GRID[0] * GRID[1], seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens(
        torch.randn(count, WIDTH, generator=generator),
        torch.randn(count, places, WIDTH, generator=generator),
        torch.rand(count, 2, places, generator=generator),
    )


def slow_blur(image: Tensor, patches: Tensor, deviation: float, temperature: float) -> Tensor:
    """A bilateral blur place by place, of a map (h, w), by the standardised patches (L, D)."""
    rows, columns = image.shape
    made = torch.zeros(rows, columns)
    for row, column in itertools.product(range(rows), range(columns)):
        shares = torch.zeros(rows, columns)
        for y, x in itertools.product(range(rows), range(columns)):
            share = math.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * deviation**2))
            if temperature:
                one, other = patches[row * columns + column], patches[y * columns + x]
                share *= math.exp(float(one @ other / (one.norm() * other.norm())) / temperature)
            shares[y, x] = share
        made[row, column] = (shares * image).sum() / shares.sum()
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("blur", [0.0, 0.7, 2.0])
def test_maps__sum_to_one_at_every_place(variant: str, background: str, blur: float) -> None:
    made = learner(variant=variant, background=background, blur=blur)
    maps = made(tokens(), GRID)
    assert maps.shape == (2, made.architecture.channels, *GRID)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, *GRID), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("background", "channels", "count"),
    [("predicted", 5, 4), ("voted", 5, 4), ("token", 5, 5), ("none", 4, 4)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_architecture__counts_channels_and_tokens(
    variant: str, background: str, channels: int, count: int
) -> None:
    made = learner(variant=variant, background=background)
    shape = made.architecture
    assert (shape.channels, shape.tokens) == (channels, count)
    assert part_tokens(made, torch.randn(2, WIDTH)).shape == (2, count, WIDTH)
    assert PartArchitecture(**shape.to_record()) == shape


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parts": 0}, "--num-parts is 0"),
        ({"parts": 251}, "--num-parts is 251"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"blur": -1.0}, "--blur -1.0"),
        ({"clusters": 1}, "--clusters is 1"),
    ],
)
def test_architecture__refuses_what_is_out_of_range(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        PartArchitecture(**{"width": WIDTH, **changes})


@torch.no_grad()
@pytest.mark.parametrize("background", ["token", "none"])
def test_maps__are_a_softmax_over_cosines(background: str) -> None:
    made = learner(background=background, blur=0.0)
    known = made.patches(tokens(), GRID)
    patches = known.features
    queries, maps = part_tokens(made, known.style), made.maps(known, GRID).flatten(2)
    for image in range(2):
        for place in range(patches.shape[1]):
            cosines = [
                float(query @ patches[image, place] / query.norm() / patches[image, place].norm())
                for query in queries[image]
            ]
            powers = [math.exp(cosine / made.architecture.temperature) for cosine in cosines]
            expected = [power / sum(powers) for power in powers]
            assert maps[image, :, place].tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("affinity", [0.0, 0.3])
@pytest.mark.parametrize("blur", [0.3, 0.7, 2.0])
def test_blur__is_that_of_a_plain_loop(blur: float, affinity: float) -> None:
    sharp = learner(blur=0.0, background="none")(tokens(1), GRID)[0]
    made = learner(blur=blur, affinity=affinity, background="none")
    patches = made.standardised(tokens(1))[0]
    for before, after in zip(sharp, made(tokens(1), GRID)[0], strict=True):
        wanted = slow_blur(before, patches, blur, affinity)
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("affinity", [0.0, 1.0])
@pytest.mark.parametrize("background", ["predicted", "voted"])
def test_blur__of_the_background_comes_before_it_is_decided(
    affinity: float, background: str
) -> None:
    made = learner(blur=1.0, affinity=affinity, background=background)
    known = made.patches(tokens(), GRID)
    votes = learner(blur=0.0, background=background).patches(tokens(), GRID).objects - 0.5
    if made.predictor is not None:
        votes = 0.5 - made.predictor.told(tokens().patches, GRID).background
    for image in range(2):
        patches = made.standardised(tokens())[image]
        wanted = slow_blur(votes[image].view(GRID), patches, 1.0, affinity) > 0
        assert torch.equal(known.objects[image].view(GRID) > 0, wanted)
    assert not torch.equal(known.objects > 0, votes > 0)
    assert 0 < known.objects.mean() < 1


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["tokens", "predictor"])
def test_blur__of_features_stays_on_its_side_of_the_mask(told_by: str) -> None:
    made = learner(blur=1.5, background="predicted", told_by=told_by)
    known = made.patches(tokens(), GRID)
    standard = made.standardised(tokens())
    assert made.predictor is not None
    told = (
        made.predictor.told(tokens().patches, GRID).shares if told_by == "predictor" else standard
    )
    for image in range(2):
        mask = known.objects[image].view(GRID)
        for side in (mask, 1 - mask):
            share = slow_blur(side, standard[image], 1.5, 0.3)
            for channel in range(told.shape[2]):
                seen = told[image, :, channel].view(GRID) * side
                mean = slow_blur(seen, standard[image], 1.5, 0.3) / share
                if told_by == "predictor":
                    mean = (mean.sqrt() - made.predictor.root_mean[channel]) / 0.4
                found = known.features[image, :, channel].view(GRID)
                torch.testing.assert_close(found[side > 0], mean[side > 0], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("background", ["token", "none"])
def test_blur__of_features_there_is_none_without_a_mask(background: str) -> None:
    made = learner(blur=1.5, background=background)
    known = made.patches(tokens(), GRID)
    assert torch.equal(known.features, made.standardised(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("background", ["predicted", "voted"])
def test_maps__are_background_where_the_mask_says_so(background: str) -> None:
    made = learner(blur=1.5, background=background)
    known = made.patches(tokens(), GRID)
    found = made.maps(known, GRID)[:, 0].flatten(1)
    torch.testing.assert_close(found, 1 - known.objects, rtol=0, atol=1e-6)
    assert 0 < known.objects.mean() < 1


def test_standardise__undoes_mean_and_deviation() -> None:
    made = learner(blur=0.0)
    wanted = tokens()
    raw = Tokens(
        wanted.class_token * made.class_std + made.class_mean,
        wanted.patches * made.token_std + made.token_mean,
        wanted.attention,
    )
    known = made.patches(raw, GRID)
    torch.testing.assert_close(known.features, wanted.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(known.style, wanted.class_token, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("background", ["voted", "token", "none"])
def test_maps__move_with_the_patches(variant: str, background: str) -> None:
    made = learner(variant=variant, background=background, blur=0.0)
    given_tokens = tokens()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    moved = Tokens(given_tokens.class_token, given_tokens.patches[:, order], torch.zeros(0))
    maps, other = made(given_tokens, GRID).flatten(2), made(moved, GRID).flatten(2)
    torch.testing.assert_close(other, maps[..., order], rtol=0, atol=1e-5)


@torch.no_grad()
def test_maps__of_the_voted_background_follow_the_clusters() -> None:
    made = learner(blur=0.0)
    known = made.patches(tokens(), GRID)
    patches, mask = known.features, known.objects
    maps = made.maps(known, GRID).flatten(2)
    for image in range(2):
        for place in range(15):
            distances = [float((patches[image, place] - c).norm()) for c in made.centres]
            is_object = bool(made.objectness[distances.index(min(distances))] > 0)
            assert bool(mask[image, place]) is is_object
            assert float(maps[image, 0, place]) == float(not is_object)
    assert 0 < mask.mean() < 1


def test_maps__take_the_meaning_of_parts_from_anchors_only_when_anchored() -> None:
    style = learner().patches(tokens(), GRID).style
    for variant, same in (("anchored", True), ("paper", False)):
        made = learner(variant=variant, background="none", class_share=0.0)
        first, second = part_tokens(made, style)
        assert torch.equal(first, second) is same


def test_maps__stay_in_float32_under_autocast() -> None:
    made, given_tokens = learner(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = made(given_tokens, GRID)
    assert torch.equal(maps, made(given_tokens, GRID))


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("pixel_decoder", [False, True])
def test_state__of_the_paper_variant_has_no_anchors_and_comes_back(
    background: str, pixel_decoder: bool
) -> None:
    changes = {"background": background, "pixel_decoder": pixel_decoder, "decoder_width": 8}
    made = learner(0, variant="paper", **changes)
    assert "scores.anchors" not in made.state_dict()
    other = learner(1, variant="paper", **changes)
    assert not torch.equal(other(tokens(), GRID), made(tokens(), GRID))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(tokens(), GRID), made(tokens(), GRID))


@pytest.mark.parametrize("variant", VARIANTS)
def test_learning__moves_every_parameter(variant: str) -> None:
    made = learner(variant=variant, pixel_decoder=True, decoder_width=8)
    known = made.patches(tokens(), GRID)
    patches, style, maps = known.features, known.style, made.maps(known, GRID)
    assert made.decoder is not None
    rebuilt = rebuilt_features(maps.flatten(2), patches)
    loss = (rebuilt - patches).square().mean() + diversity(maps.flatten(2)).mean()
    (loss + (made.decoder(maps, style) - 1).square().mean()).backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.any()] == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_part_labels__are_the_lowest_of_the_largest(columns: list[list[int]]) -> None:
    maps = torch.tensor(columns, dtype=torch.float32).T[None, :, None] / 3
    labels, margin = part_labels(maps)
    assert labels.dtype == torch.uint8
    for place, column in enumerate(columns):
        assert labels[0, 0, place] == column.index(max(column))
        first, second = sorted(column)[:-3:-1]
        assert margin[0, 0, place].item() == pytest.approx((first - second) / 3)


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_part_labels__are_sure_within_zero_and_one(blur: float) -> None:
    labels, margin = part_labels(learner(blur=blur, temperature=0.001)(tokens(50), GRID))
    assert labels.max() < 5
    assert 0 <= margin.min() < margin.max() <= 1


def test_part_labels__of_one_part_are_zero_and_sure() -> None:
    labels, margin = part_labels(torch.ones(2, 1, 3, 4))
    assert labels.shape == (2, 3, 4)
    assert labels.dtype == torch.uint8
    assert not labels.any()
    assert (margin == 1).all()


def test_part_labels__fit_the_largest_learner() -> None:
    maps = torch.zeros(1, 251, 1, 251)
    maps[0, range(251), 0, range(251)] = 1
    assert part_labels(maps)[0].flatten().tolist() == list(range(251))
