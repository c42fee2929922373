import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.errors import SettingError
from semmae.pipeline.mask_counts import (
    MAX_PATCHES,
    mask_first,
    places_of,
    predicted_count,
    sort_keys,
    visible_count,
    visible_indices,
)
from semmae.pipeline.masks import random_masks
from semmae.pipeline.randomness import Purpose, streams

MASK_STREAMS = streams(0, Purpose.MASK, 0, np.arange(50))


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (196, 0.75, 49),
        (784, 0.75, 196),
        (256, 0.75, 64),
        (196, 0.0, 196),
        (10, 0.9, 1),
        (5, 0.9, 1),  # one half is rounded up, though 5 * (1 - 0.9) falls below it in floats
        (15, 0.7, 5),
        (1, 0.5, 1),
    ],
)
def test_visible_count__rounds_the_written_decimal_half_up(
    patches: int, ratio: float, visible: int
) -> None:
    assert visible_count(patches, ratio) == visible


@settings(derandomize=True, deadline=None)
@given(patches=st.integers(1, 2000), thousandths=st.integers(0, 999))
def test_visible_count__equals_integer_arithmetic(patches: int, thousandths: int) -> None:
    visible = (patches * (1000 - thousandths) + 500) // 1000
    if visible == 0:
        with pytest.raises(SettingError, match="lower it"):
            visible_count(patches, thousandths / 1000)
    else:
        assert visible_count(patches, thousandths / 1000) == visible


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_visible_count__refuses_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(SettingError, match="mask_ratio"):
        visible_count(196, ratio)


@pytest.mark.parametrize("patches", [0, MAX_PATCHES + 1])
def test_visible_count__refuses_impossible_patch_counts(patches: int) -> None:
    with pytest.raises(SettingError, match="patches"):
        visible_count(patches, 0.75)


def test_visible_indices__partition_the_patches_with_the_masked() -> None:
    mask = random_masks(196, 0.75, MASK_STREAMS)
    indices = visible_indices(mask, 49)
    assert indices.shape == (50, 49)
    assert indices.dtype == np.int64
    for row in range(50):
        assert indices[row].tolist() == [p for p in range(196) if not mask[row, p]]


def test_visible_indices__name_the_row_with_another_count() -> None:
    mask = random_masks(196, 0.75, MASK_STREAMS[:5])
    mask[3] = False
    with pytest.raises(ValueError, match="row 3 keeps 196"):
        visible_indices(mask, 49)


@pytest.mark.parametrize("masked", [0, 1, 5, 12])
def test_mask_first__masks_the_smallest_and_the_first_of_equals(masked: int) -> None:
    order = np.random.default_rng(0).integers(0, 4, (200, 12)).astype(np.uint64) << np.uint64(40)
    mask = mask_first(sort_keys(order), masked)
    for row, numbers in zip(mask, order.tolist(), strict=True):
        expected = sorted(range(12), key=lambda patch: (numbers[patch], patch))[:masked]
        assert np.flatnonzero(row).tolist() == sorted(expected)


def test_sort_keys__hold_number_and_patch_at_the_largest_size() -> None:
    order = np.full((1, MAX_PATCHES), 2**48 - 1, np.uint64)
    keys = sort_keys(order)
    assert places_of(keys)[0].tolist() == list(range(MAX_PATCHES))
    assert (keys >> np.uint64(16) == order).all()


@pytest.mark.parametrize(("share", "count"), [(1.0, 147), (0.5, 74), (0.25, 37), (1e-6, 1)])
def test_predicted_count__is_a_share_of_the_masked_patches(share: float, count: int) -> None:
    assert predicted_count(196, 0.75, share) == count
