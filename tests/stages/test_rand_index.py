import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from semmae.stages.evals import rand_index
from semmae.stages.evals.rand_index import rand_indices

IDS = arrays(np.uint8, (7, 3, 4), elements=st.sampled_from([0, 1, 2, 250]))


@settings(max_examples=50, deadline=None)
@given(IDS, IDS, arrays(np.bool_, (7, 3, 4)))
def test_rand_indices__equal_scikit_learn_image_by_image(
    predicted: np.ndarray, true: np.ndarray, inside: np.ndarray
) -> None:
    inside[0, 0, 0] = True
    expected = [
        adjusted_rand_score(true[i][inside[i]], predicted[i][inside[i]])
        for i in range(len(true))
        if inside[i].any()
    ]
    found = rand_indices(predicted, true, inside)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("cells", [1, 40, 10**6])
def test_rand_indices__do_not_hang_on_how_many_images_are_counted_at_once(
    monkeypatch: pytest.MonkeyPatch, cells: int
) -> None:
    generator = np.random.default_rng(0)
    predicted, true = generator.integers(0, 4, (2, 9, 20))
    inside = generator.random((9, 20)) < 0.5
    inside[3] = False
    whole = rand_indices(predicted, true, inside)
    assert whole.shape == (8,)
    monkeypatch.setattr(rand_index, "CELLS_AT_ONCE", cells)
    assert np.array_equal(rand_indices(predicted, true, inside), whole)


def test_rand_indices__of_equal_partitions_are_1_and_of_random_ones_near_0() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 5, (50, 400))
    everywhere = np.ones(true.shape, dtype=bool)
    assert rand_indices(9 - true, true, everywhere).tolist() == [1.0] * 50
    assert abs(rand_indices(generator.permuted(true, axis=1), true, everywhere).mean()) < 0.01
    one = np.zeros((1, 4), int)
    assert rand_indices(one, one, one == 0).tolist() == [1.0]
    assert rand_indices(np.arange(4)[None], one, one == 0).tolist() == [0.0]
