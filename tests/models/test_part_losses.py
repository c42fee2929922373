import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semmae.models.part_losses import diversity, rebuilt_features


def random_maps(parts: int, places: int, seed: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, parts, places, generator=generator).mul(3).softmax(dim=1)


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(1, 5), places=st.integers(1, 8), seed=st.integers(0, 99))
def test_diversity__is_the_mean_cosine_of_pairs(parts: int, places: int, seed: int) -> None:
    maps = random_maps(parts, places, seed)
    for image, loss in zip(maps, diversity(maps), strict=True):
        cosines = [
            float(a @ b / a.norm() / b.norm())
            for i, a in enumerate(image)
            for j, b in enumerate(image)
            if i != j
        ]
        expected = sum(cosines) / len(cosines) if cosines else 0.0
        assert float(loss) == pytest.approx(expected, abs=1e-5)
        assert -1e-6 <= float(loss) <= 1 + 1e-6


def test_diversity__is_one_for_equal_and_zero_for_disjoint_maps() -> None:
    equal = torch.rand(1, 1, 6).expand(1, 3, 6)
    disjoint = torch.eye(3).repeat_interleave(2, dim=1)[None]
    torch.testing.assert_close(diversity(equal), torch.ones(1))
    assert diversity(disjoint).item() == 0
    assert diversity(torch.zeros(1, 3, 6)).item() == 0


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(1, 5), places=st.integers(1, 8), seed=st.integers(0, 99))
def test_rebuilt_features__of_hard_maps_are_the_means_of_parts(
    parts: int, places: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, parts, (2, places), generator=generator)
    features = torch.randn(2, places, 3, generator=generator)
    maps = torch.nn.functional.one_hot(labels, parts).transpose(1, 2).float()
    rebuilt = rebuilt_features(maps, features)
    for image in range(2):
        for place in range(places):
            members = [q for q in range(places) if labels[image, q] == labels[image, place]]
            mean = sum(features[image, q] for q in members) / len(members)
            torch.testing.assert_close(rebuilt[image, place], mean, rtol=0, atol=1e-5)


def test_rebuilt_features__of_soft_maps_are_weighted_means() -> None:
    maps, features = random_maps(3, 4, 0), torch.randn(2, 4, 5)
    rebuilt = rebuilt_features(maps, features)
    for image in range(2):
        for place in range(4):
            expected = torch.zeros(5)
            for part in maps[image]:
                mean = sum(part[q] * features[image, q] for q in range(4)) / part.sum()
                expected = expected + part[place] * mean
            torch.testing.assert_close(rebuilt[image, place], expected, rtol=0, atol=1e-5)
