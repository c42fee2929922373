import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from semmae.errors import MismatchError, SettingError
from semmae.stages.evals import metrics

MAPS = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 4))
LABELS = arrays(np.uint8, (6, 16), elements=st.integers(0, 3))


def _slow_entropy(values: Sequence[object]) -> float:
    counts = Counter(values)
    return -sum(n / len(values) * math.log(n / len(values)) for n in counts.values())


def _slow_nmi(a: list[int], b: list[int]) -> float:
    ha, hb = _slow_entropy(a), _slow_entropy(b)
    shared = ha + hb - _slow_entropy(list(zip(a, b, strict=True)))
    return 100.0 if ha + hb == 0 else 100 * shared / ((ha + hb) / 2)


def _slow_ari(a: list[int], b: list[int]) -> float:
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    same_a = [a[i] == a[j] for i, j in pairs]
    same_b = [b[i] == b[j] for i, j in pairs]
    both = sum(x and y for x, y in zip(same_a, same_b, strict=True))
    expected = sum(same_a) * sum(same_b) / len(pairs)
    most = (sum(same_a) + sum(same_b)) / 2
    return 100.0 if most == expected else 100 * (both - expected) / (most - expected)


@settings(max_examples=25, deadline=None)
@given(LABELS, LABELS)
def test_nmi_and_ari__equal_the_slow_loops(a: np.ndarray, b: np.ndarray) -> None:
    flat = a.ravel().tolist(), b.ravel().tolist()
    assert metrics.nmi(a, b) == pytest.approx(_slow_nmi(*flat), abs=1e-6)
    assert metrics.ari(a, b) == pytest.approx(_slow_ari(*flat), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(LABELS, LABELS)
def test_foreground__ignores_what_is_said_of_the_background(a: np.ndarray, b: np.ndarray) -> None:
    b[0, 0] = 1
    inside = b > 0
    other = np.where(inside, a, 9)
    assert metrics.fg_nmi(a, b) == metrics.fg_nmi(other, b) == metrics.nmi(a[inside], b[inside])
    assert metrics.fg_ari(a, b) == metrics.fg_ari(other, b) == metrics.ari(a[inside], b[inside])


def test_scores__are_full_for_renamed_parts_and_near_zero_for_random_ones() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 7, (50, 144))
    renamed = np.array([3, 5, 0, 1, 6, 2, 4])[true]
    random = generator.integers(0, 7, true.shape)
    for score in (metrics.nmi, metrics.ari, metrics.fg_nmi, metrics.fg_ari):
        assert score(renamed, true) == pytest.approx(100)
        assert abs(score(random, true)) < 1


def test_ari_inside_images__does_not_mind_other_names_in_each_image() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 4, (30, 64))
    shuffled = np.stack([generator.permutation(4)[labels] for labels in true])
    assert metrics.ari_inside_images(shuffled, true) == pytest.approx(100)
    assert metrics.ari_inside_images(shuffled, true, foreground=True) == pytest.approx(100)
    assert metrics.ari(shuffled, true) < 50


def test_ari_inside_images__is_the_mean_of_the_images_that_have_foreground() -> None:
    true = np.array([[0, 0, 0, 0], [1, 1, 2, 2], [0, 1, 2, 2]])
    predicted = np.array([[0, 1, 2, 3], [5, 5, 5, 6], [0, 1, 1, 2]])
    slow = [
        _slow_ari(predicted[1].tolist(), true[1].tolist()),
        _slow_ari(predicted[2, 1:].tolist(), true[2, 1:].tolist()),
    ]
    found = metrics.ari_inside_images(predicted, true, foreground=True)
    assert found == pytest.approx(sum(slow) / 2)
    whole = [_slow_ari(predicted[i].tolist(), true[i].tolist()) for i in range(3)]
    assert metrics.ari_inside_images(predicted, true) == pytest.approx(sum(whole) / 3)


def test_agreement__counts_equal_ids_by_hand() -> None:
    first = np.array([[[0, 1], [2, 2]], [[0, 0], [0, 3]]])
    second = np.array([[[0, 1], [2, 0]], [[1, 0], [2, 3]]])
    assert metrics.agreement(first, second) == pytest.approx(100 * 5 / 8)
    inside = np.array([[[True, False], [False, True]], [[False, False], [True, True]]])
    assert metrics.agreement(first, second, inside) == pytest.approx(50)
    assert metrics.agreement(first, first) == 100
    assert metrics.agreement(first, first + 1, inside) == 0


@settings(max_examples=25, deadline=None)
@given(MAPS)
def test_coherence__equals_the_slow_loop(maps: np.ndarray) -> None:
    equal = [
        maps[n, i, j] == maps[n, k, m]
        for n in range(3)
        for i in range(4)
        for j in range(5)
        for k, m in ((i + 1, j), (i, j + 1))
        if k < 4 and m < 5
    ]
    assert metrics.coherence(maps) == pytest.approx(100 * sum(equal) / len(equal))


@settings(max_examples=25, deadline=None)
@given(LABELS, LABELS)
def test_information_share__equals_the_slow_loop(a: np.ndarray, b: np.ndarray) -> None:
    x, y = a.ravel().tolist(), b.ravel().tolist()
    whole = _slow_entropy(x)
    shared = whole + _slow_entropy(y) - _slow_entropy(list(zip(x, y, strict=True)))
    expected = 100 * shared / whole if whole else 0.0
    assert metrics.information_share(a, b) == pytest.approx(expected, abs=1e-6)


def test_information_share__is_full_for_parts_that_are_places_and_empty_for_one_part() -> None:
    places = np.arange(36)
    parts = np.broadcast_to(metrics.fixed_grid(6, 6, 7), (5, 36))
    assert metrics.information_share(parts, places) == pytest.approx(100)
    assert metrics.information_share(parts, np.arange(5)[:, None]) == pytest.approx(0)
    assert metrics.information_share(np.zeros((5, 36), int), places) == 0


def test_areas__shares_entropy_and_dead_parts() -> None:
    labels = np.repeat([0, 1, 3], [5000, 4996, 4])
    np.testing.assert_allclose(metrics.area_shares(labels, 4), [50, 49.96, 0, 0.04])
    assert metrics.dead_parts(labels, 4) == (2, 3)
    assert metrics.dead_parts(labels, 4, threshold=0.0001) == (2,)
    assert metrics.area_entropy(np.arange(7), 7) == pytest.approx(100)
    assert metrics.area_entropy(np.zeros(9, int), 7) == 0
    two = metrics.area_entropy(np.array([0, 1]), 4)
    assert two == pytest.approx(100 * math.log(2) / math.log(4))


@pytest.mark.parametrize(
    ("cells", "rows"), [(1, [1]), (2, [2]), (4, [2, 2]), (7, [2, 3, 2]), (9, [3, 3, 3])]
)
def test_fixed_grid__lays_out_all_cells_as_boxes_in_rows(cells: int, rows: list[int]) -> None:
    grid = metrics.fixed_grid(12, 13, cells).reshape(12, 13)
    assert sorted(set(grid.ravel().tolist())) == list(range(cells))
    lines = [grid[i].tolist() for i in range(12)]
    distinct = [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]
    assert [len(set(line)) for line in distinct] == rows
    for cell in range(cells):
        down, across = np.nonzero(grid == cell)
        assert len(down) == (np.ptp(down) + 1) * (np.ptp(across) + 1)


def test_fixed_grid__seven_cells_of_a_square_by_hand() -> None:
    top, middle, bottom = [0] * 3 + [1] * 3, [2, 2, 3, 3, 4, 4], [5] * 3 + [6] * 3
    expected = [*top, *top, *middle, *middle, *bottom, *bottom]
    assert metrics.fixed_grid(6, 6, 7).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, (6, 8), elements=st.integers(0, 3)))
def test_majority_labels__equals_the_slow_loop(label_map: np.ndarray) -> None:
    found = metrics.majority_labels(label_map, (3, 2), 4)
    assert found.dtype == np.uint8
    for i in range(3):
        for j in range(2):
            inside = label_map[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].ravel().tolist()
            assert found[i, j] == max(range(4), key=lambda label: (inside.count(label), -label))


def test_metrics__refuse_what_cannot_be_compared() -> None:
    ones = np.ones((2, 4), int)
    with pytest.raises(MismatchError, match=r"\(2, 4\).*\(4, 2\)"):
        metrics.nmi(ones, ones.reshape(4, 2))
    with pytest.raises(MismatchError, match="no patches"):
        metrics.ari(ones[:0], ones[:0])
    with pytest.raises(MismatchError, match="background"):
        metrics.fg_nmi(ones, 0 * ones)
    with pytest.raises(MismatchError, match="background"):
        metrics.ari_inside_images(ones, 0 * ones, foreground=True)
    with pytest.raises(MismatchError, match="fit part ids"):
        metrics.information_share(ones, np.arange(3))
    with pytest.raises(MismatchError, match="no patches"):
        metrics.agreement(ones, ones, ones == 0)
    with pytest.raises(MismatchError, match="one value a patch"):
        metrics.agreement(ones, ones, np.ones(4, bool))
    with pytest.raises(MismatchError, match=r"\(2, 4\).*\(4, 2\)"):
        metrics.agreement(ones, ones.reshape(4, 2))
    with pytest.raises(MismatchError, match="coherence"):
        metrics.coherence(np.ones((3, 1, 1), int))
    with pytest.raises(MismatchError, match="0 to 2"):
        metrics.area_shares(np.array([0, 3]), 3)
    with pytest.raises(MismatchError, match="equal patches"):
        metrics.majority_labels(np.zeros((10, 10), np.uint8), (3, 3), 2)
    with pytest.raises(SettingError, match="cells"):
        metrics.fixed_grid(2, 2, 7)
    with pytest.raises(SettingError, match="cells"):
        metrics.fixed_grid(4, 4, 0)
