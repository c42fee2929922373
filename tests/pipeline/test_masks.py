import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from semmae.errors import MismatchError, SettingError
from semmae.pipeline.mask_counts import MAX_PATCHES, visible_count
from semmae.pipeline.masks import (
    Labels,
    alpha_at,
    masked_counts,
    part_sizes,
    predicted_places,
    random_masks,
    semantic_masks,
)
from semmae.pipeline.randomness import Purpose, Streams, streams, uniforms

PATCHES, PARTS, RATIO = 196, 16, 0.75
MASKED = 147
MAPS = 10_000


def mask_streams(count: int, seed: int = 0) -> Streams:
    return streams(seed, Purpose.MASK, 0, np.arange(count))


def random_map(generator: np.random.Generator, parts: int, patches: int) -> Labels:
    """Some of the parts, with sizes from 1 patch to all; the others are empty."""
    present = generator.permutation(parts)[: generator.integers(1, min(parts, patches) + 1)]
    spread = generator.choice([0.1, 1.0, 10.0])
    shares = generator.dirichlet(np.full(len(present), spread))
    sizes = 1 + generator.multinomial(patches - len(present), shares)
    return generator.permutation(np.repeat(present, sizes)).astype(np.uint8)


@pytest.fixture(scope="module")
def maps() -> Labels:
    """(10,000, 196) maps, among them maps of one part, and of parts of one patch and the rest."""
    generator = np.random.default_rng(0)
    maps = np.stack([random_map(generator, PARTS, PATCHES) for _ in range(MAPS)])
    maps[:PARTS] = np.arange(PARTS, dtype=np.uint8)[:, None]
    maps[PARTS : 2 * PARTS] = 0
    maps[PARTS : 2 * PARTS, :PARTS] = np.arange(PARTS)
    return maps


def slow_mask(
    labels: list[int], parts: int, ratio: str, alpha: float, stream: np.uint64
) -> list[bool]:
    """The method of METHOD's stage 2, image by image, in exact rational numbers."""
    patches = len(labels)
    visible = math.floor(patches * (1 - Fraction(ratio)) + Fraction(1, 2))
    masked = patches - visible
    numbers = [float(one) for one in uniforms(np.array([stream]), patches + 1 + parts)[0]]
    places, offset, turns = numbers[:patches], numbers[patches], numbers[patches + 1 :]
    sizes = [labels.count(part) for part in range(parts)]
    share = Fraction(round(alpha * 2**32), 2**32)
    unit = patches * 2**32
    floor_before, running, left = 0, Fraction(math.floor(offset * unit), unit), masked
    mask = [False] * patches
    for part in sorted(range(parts), key=lambda part: turns[part]):
        whole = min(left, sizes[part])
        left -= whole
        running += (1 - share) * Fraction(masked * sizes[part], patches) + share * whole
        count = math.floor(running) - floor_before
        floor_before = math.floor(running)
        members = [patch for patch in range(patches) if labels[patch] == part]
        members.sort(key=lambda patch: (math.floor(places[patch] * 2**40), patch))
        for patch in members[:count]:
            mask[patch] = True
    return mask


# --- the schedule ---


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize("gamma", [1 / 3, 1.0, 2.0, 3.0])
def test_alpha_at__runs_from_start_to_end_monotonically(
    gamma: float, start: float, end: float
) -> None:
    alpha = alpha_at(np.linspace(0, 1, 101), gamma, start, end)
    assert alpha[0] == start
    assert alpha[-1] == end
    assert (np.diff(alpha) * np.sign(end - start) > 0).all()
    assert alpha.min() >= min(start, end)
    assert alpha.max() <= max(start, end)


def test_alpha_at__equals_the_formula_and_keeps_shape() -> None:
    progress = np.array([[0.0, 0.1], [0.5, 0.9]])
    expected = [[0.2 + 0.6 * value**3 for value in row] for row in progress.tolist()]
    np.testing.assert_allclose(alpha_at(progress, 3.0, 0.2, 0.8), expected, rtol=1e-14)
    assert alpha_at(0.5).shape == ()
    assert alpha_at(0.5) == 0.25


@pytest.mark.parametrize("progress", [-1e-9, 1.0 + 1e-9, float("nan")])
def test_alpha_at__refuses_progress_outside_the_run(progress: float) -> None:
    with pytest.raises(ValueError, match="progress must be in"):
        alpha_at(np.array([0.5, progress]))


@pytest.mark.parametrize("setting", [{"gamma": 0.0}, {"start": -0.1}, {"end": 1.1}])
def test_alpha_at__refuses_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        alpha_at(0.5, **setting)


# --- part sizes ---


def test_part_sizes__equal_counting(maps: Labels) -> None:
    sizes = part_sizes(maps[:200], PARTS)
    assert sizes.dtype == np.int64
    counted = [[row.count(part) for part in range(PARTS)] for row in maps[:200].tolist()]
    assert sizes.tolist() == counted


@pytest.mark.parametrize(("label", "words"), [(7, "got 7 in row 1"), (255, "fill value")])
def test_part_sizes__name_an_id_that_does_not_exist(label: int, words: str) -> None:
    labels = np.zeros((3, 4), np.uint8)
    labels[1, 2] = label
    with pytest.raises(MismatchError, match=words):
        part_sizes(labels, 7)


@pytest.mark.parametrize("labels", [np.zeros(4, np.uint8), np.zeros((2, 4), np.int64)])
def test_part_sizes__refuse_other_shapes_and_dtypes(labels: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        part_sizes(labels, 7)


# --- masks: what holds in every image ---


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_semantic_masks__counts_hold_in_every_map(maps: Labels, alpha: float) -> None:
    mask = semantic_masks(maps, PARTS, RATIO, np.full(MAPS, alpha), mask_streams(MAPS))
    assert mask.shape == maps.shape
    assert (np.count_nonzero(~mask, axis=1) == 49).all()
    sizes = part_sizes(maps, PARTS)
    rows = np.arange(MAPS)[:, None] * PARTS
    counts = np.bincount((maps + rows).ravel(), mask.ravel(), MAPS * PARTS).reshape(MAPS, PARTS)
    even = MASKED * sizes / PATCHES
    whole = masked_counts(sizes, MASKED, np.ones(MAPS), mask_streams(MAPS))
    assert (counts <= sizes).all()
    assert (np.abs(counts - (1 - alpha) * even - alpha * whole) < 1).all()
    if alpha == 0:
        assert (np.abs(counts - even) < 1).all()
    if alpha == 1:
        cut = (counts > 0) & (counts < sizes)
        assert (cut.sum(axis=1) <= 1).all()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.6, 0.9, 0.995])
def test_semantic_masks__keep_the_count_at_every_ratio(maps: Labels, ratio: float) -> None:
    alpha = np.random.default_rng(1).random(1000)
    mask = semantic_masks(maps[:1000], PARTS, ratio, alpha, mask_streams(1000))
    assert (np.count_nonzero(~mask, axis=1) == visible_count(PATCHES, ratio)).all()


def test_semantic_masks__equal_the_slow_reference(maps: Labels) -> None:
    alpha = np.random.default_rng(2).choice([0, 0.1, 1 / 3, 0.5, 0.999, 1], 500)
    stream = mask_streams(500, seed=5)
    fast = semantic_masks(maps[:500], PARTS, RATIO, alpha, stream)
    for row in range(500):
        slow = slow_mask(maps[row].tolist(), PARTS, "0.75", alpha[row], stream[row])
        assert fast[row].tolist() == slow


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_semantic_masks__equal_the_slow_reference_at_small_sizes(data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, 5))
    labels = data.draw(st.lists(st.integers(0, parts - 1), min_size=1, max_size=12))
    ratio = data.draw(st.integers(0, 9)) / 10
    alpha = data.draw(st.floats(0, 1))
    stream = np.array([data.draw(st.integers(0, 2**64 - 1))], np.uint64)
    if math.floor(len(labels) * (1 - Fraction(str(ratio))) + Fraction(1, 2)) == 0:
        ratio = 0.0
    row = np.array([labels], np.uint8)
    fast = semantic_masks(row, parts, ratio, np.array([alpha]), stream)
    assert fast[0].tolist() == slow_mask(labels, parts, str(ratio), alpha, stream[0])


def test_semantic_masks__do_not_depend_on_the_batch(maps: Labels) -> None:
    stream, alpha = mask_streams(64), np.linspace(0, 1, 64)
    together = semantic_masks(maps[:64], PARTS, RATIO, alpha, stream)
    order = np.random.default_rng(3).permutation(64)
    shuffled = semantic_masks(maps[order], PARTS, RATIO, alpha[order], stream[order])
    assert np.array_equal(shuffled, together[order])
    for row in range(64):
        one = slice(row, row + 1)
        alone = semantic_masks(maps[one], PARTS, RATIO, alpha[one], stream[one])
        assert np.array_equal(alone[0], together[row])


def test_semantic_masks__accept_an_empty_batch() -> None:
    nothing = np.zeros((0, PATCHES), np.uint8)
    mask = semantic_masks(nothing, PARTS, RATIO, np.zeros(0), mask_streams(0))
    assert mask.shape == (0, PATCHES)


def test_semantic_masks__hold_at_the_largest_size() -> None:
    labels = np.random.default_rng(4).integers(0, 255, (1, MAX_PATCHES)).astype(np.uint8)
    mask = semantic_masks(labels, 255, RATIO, np.full(1, 0.7), mask_streams(1))
    assert np.count_nonzero(mask) == MAX_PATCHES * 3 // 4
    with pytest.raises(SettingError, match="patches"):
        semantic_masks(
            np.zeros((1, MAX_PATCHES + 1), np.uint8), 1, RATIO, np.ones(1), np.ones(1, np.uint64)
        )


@pytest.mark.parametrize(
    ("alpha", "stream"),
    [
        (np.zeros(1), mask_streams(2)),
        (np.zeros(2), mask_streams(3)),
        (np.zeros(2), mask_streams(2).astype(np.int64)),
        (np.array([0.0, 1.01]), mask_streams(2)),
        (np.array([0.0, np.nan]), mask_streams(2)),
    ],
)
def test_semantic_masks__refuse_wrong_alpha_and_stream(
    alpha: NDArray[np.float64], stream: NDArray[Any]
) -> None:
    with pytest.raises(ValueError, match="alpha must be"):
        semantic_masks(np.zeros((2, 8), np.uint8), 1, 0.5, alpha, stream)


# --- masks: what holds on average ---

SIZES = [1, 3, 5, 7, 30, 70, 80, 0]


@pytest.fixture(scope="module")
def fixed_map() -> Labels:
    labels = np.repeat(np.arange(len(SIZES)), SIZES).astype(np.uint8)
    return np.random.default_rng(6).permutation(labels)


def test_masked_counts__have_no_bias_at_alpha_0() -> None:
    counts = masked_counts(np.tile(SIZES, (MAPS, 1)), MASKED, np.zeros(MAPS), mask_streams(MAPS))
    for part, size in enumerate(SIZES):
        expected = MASKED * size / PATCHES
        fraction = expected % 1
        error = np.sqrt(fraction * (1 - fraction) / MAPS)
        assert abs(counts[:, part].mean() - expected) <= 5 * error


def test_masked_counts__have_no_bias_between_shares_and_whole_parts() -> None:
    sizes, stream = np.tile(SIZES, (MAPS, 1)), mask_streams(MAPS)
    whole = masked_counts(sizes, MASKED, np.ones(MAPS), stream)
    for alpha in (0.25, 0.5, 0.75):
        counts = masked_counts(sizes, MASKED, np.full(MAPS, alpha), stream)
        rounding = counts - ((1 - alpha) * MASKED * sizes / PATCHES + alpha * whole)
        error = rounding.std(axis=0) / np.sqrt(MAPS)
        assert (np.abs(rounding.mean(axis=0)) <= 5 * error + 1e-12).all()


def test_masked_counts__visit_parts_in_every_order_equally_often() -> None:
    sizes = np.full((MAPS, 4), 49)
    counts = masked_counts(sizes, 98, np.ones(MAPS), mask_streams(MAPS))
    chosen = [tuple(row) for row in (counts == 49).tolist()]
    pairs = {pair: chosen.count(pair) for pair in set(chosen)}
    assert len(pairs) == 6
    error = np.sqrt(MAPS * (1 / 6) * (5 / 6))
    assert max(abs(count - MAPS / 6) for count in pairs.values()) < 5 * error


def stream_with(bits: int, position: int) -> Streams:
    """The stream whose number at a position is the top 53 of these bits: splitmix64 undone."""
    word = 2**64
    bits ^= bits >> 31 ^ bits >> 62
    bits = bits * pow(0x94D049BB133111EB, -1, word) % word
    bits ^= bits >> 27 ^ bits >> 54
    bits = bits * pow(0xBF58476D1CE4E5B9, -1, word) % word
    bits ^= bits >> 30 ^ bits >> 60
    return np.array([(bits - (position + 1) * 0x9E3779B97F4A7C15) % word], np.uint64)


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
@pytest.mark.parametrize("alpha", [0.0, 1e-10, 0.3, 1 - 1e-10, 1.0])
def test_masked_counts__are_exact_at_the_least_and_largest_offset(bits: int, alpha: float) -> None:
    stream = stream_with(bits, PATCHES)
    assert uniforms(stream, PATCHES + 1)[0, PATCHES] == (bits >> 11) / 2**53
    for masked in range(PATCHES + 1):
        counts = masked_counts(np.array([SIZES]), masked, np.array([alpha]), stream)
        assert counts.sum() == masked
        assert (counts >= 0).all()
        assert (counts <= SIZES).all()


@pytest.mark.parametrize(
    ("sizes", "masked"),
    [
        ([[4, 4], [4, 5]], 4),
        ([[9, -1], [4, 4]], 4),
        ([[4, 4], [8, 0]], 9),
        ([[4, 4], [8, 0]], -1),
        ([[MAX_PATCHES, 1]] * 2, 4),
    ],
)
def test_masked_counts__refuse_impossible_sizes(sizes: list[list[int]], masked: int) -> None:
    with pytest.raises(ValueError, match="part sizes"):
        masked_counts(np.array(sizes), masked, np.zeros(2), mask_streams(2))


def test_semantic_masks__mask_every_patch_equally_often_at_alpha_0(fixed_map: Labels) -> None:
    labels = np.tile(fixed_map, (MAPS, 1))
    mask = semantic_masks(labels, len(SIZES), RATIO, np.zeros(MAPS), mask_streams(MAPS))
    error = np.sqrt(RATIO * (1 - RATIO) / MAPS)
    assert np.abs(mask.mean(axis=0) - RATIO).max() < 5 * error


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_semantic_masks__are_uniform_inside_a_part(fixed_map: Labels, alpha: float) -> None:
    labels = np.tile(fixed_map, (MAPS, 1))
    mask = semantic_masks(labels, len(SIZES), RATIO, np.full(MAPS, alpha), mask_streams(MAPS, 7))
    for part in range(len(SIZES) - 1):
        inside = mask[:, fixed_map == part]
        share = inside.mean(axis=1)
        # Given its part's count an indicator has variance share (1 - share), about mean share.
        error = np.sqrt((share * (1 - share)).mean() / MAPS)
        assert (np.abs(inside.mean(axis=0) - share.mean()) <= 5 * error + 1e-12).all()


def test_semantic_masks__pairs_inside_a_part_are_uniform() -> None:
    labels = np.zeros((20_000, 5), np.uint8)
    mask = semantic_masks(labels, 1, 0.4, np.zeros(20_000), mask_streams(20_000))
    codes = np.bincount(mask @ (1 << np.arange(5)), minlength=32)
    pairs = codes[codes > 0]
    assert len(pairs) == 10
    chi_square = ((pairs - 2000) ** 2 / 2000).sum()
    assert chi_square < 9 + 5 * np.sqrt(18)


# --- random masks ---


@pytest.mark.parametrize(("parts", "only"), [(1, 0), (7, 4)])
def test_random_masks__equal_semantic_masks_of_one_part(parts: int, only: int) -> None:
    labels = np.full((300, PATCHES), only, np.uint8)
    alpha = np.linspace(0, 1, 300)
    semantic = semantic_masks(labels, parts, RATIO, alpha, mask_streams(300))
    assert np.array_equal(random_masks(PATCHES, RATIO, mask_streams(300)), semantic)


def test_random_masks__mask_each_patch_equally_often() -> None:
    mask = random_masks(PATCHES, RATIO, mask_streams(MAPS))
    assert (mask.sum(axis=1) == MASKED).all()
    assert np.abs(mask.mean(axis=0) - RATIO).max() < 5 * np.sqrt(RATIO * (1 - RATIO) / MAPS)


def test_random_masks__ratio_0_masks_nothing() -> None:
    assert not random_masks(PATCHES, 0.0, mask_streams(5)).any()


def test_predicted_places__draw_each_place_alike_and_none_twice() -> None:
    stream = streams(3, Purpose.PREDICTED, 0, np.arange(4000))
    found = predicted_places(11, 3, stream)
    assert found.shape == (4000, 3)
    assert np.all(np.diff(np.sort(found, axis=1), axis=1) > 0)
    share = np.bincount(found.ravel(), minlength=11) / found.size
    assert share.tolist() == pytest.approx([1 / 11] * 11, rel=0.1)
    assert np.array_equal(predicted_places(11, 3, stream[7:9]), found[7:9])
    assert np.array_equal(np.sort(predicted_places(11, 11, stream[:2])), [range(11)] * 2)
