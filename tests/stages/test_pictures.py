import numpy as np
import pytest

from semmae.stages.pictures import colours_of, masked_parts, overlay, soft_overlay

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
LABELS = np.repeat(np.repeat([[0, 1], [2, 1]], 2, axis=0), 3, axis=1).astype(np.uint8)  # (4, 6)


def one_hot(labels: np.ndarray, parts: int) -> np.ndarray:
    return np.asarray(labels == np.arange(parts)[:, None, None], dtype=np.float16)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_soft_overlay__of_one_hot_maps_is_the_hard_overlay_away_from_borders(
    strength: float,
) -> None:
    colours = colours_of(3, 0)
    hard = overlay(IMAGE, LABELS, colours, strength).astype(int)
    soft = soft_overlay(IMAGE, one_hot(LABELS, 3), colours, strength).astype(int)
    # Patches are 8 pixels; bilinear maps mix half a patch on either side of a border.
    away = np.zeros(IMAGE.shape[:2], dtype=bool)
    for rows in (slice(0, 12), slice(20, 32)):
        for columns in (slice(0, 20), slice(28, 48)):
            away[rows, columns] = True
    assert np.abs(hard - soft)[away].max() <= 1
    assert np.abs(hard - soft)[~away].max() > 10


def test_soft_overlay__opacity_follows_the_maps() -> None:
    colours = colours_of(2, None)
    nothing = soft_overlay(IMAGE, np.zeros((2, 4, 6)), colours)
    assert np.array_equal(nothing, IMAGE)
    half = soft_overlay(IMAGE, np.full((2, 4, 6), 0.5), colours, 0.6)
    wanted = IMAGE * 0.4 + 0.6 * colours.astype(float).mean(axis=0)
    assert np.abs(half - wanted).max() <= 0.51
    # Along a row where one part gives way to the other, so do the colours, step by step.
    share = np.linspace(0, 1, 6)[None, None].repeat(4, axis=1)
    blank = np.zeros((32, 48, 3), dtype=np.uint8)
    row = soft_overlay(blank, np.concatenate([1 - share, share]), colours, 1.0)[10, 4:44].astype(
        int
    )
    assert np.abs(np.diff(row, axis=0)).max() <= 8
    assert (np.diff(row[:, 1]) >= 0).all()


def test_masked_parts__shows_the_image_where_it_is_seen_and_the_part_where_it_is_not() -> None:
    colours = colours_of(3, 0)
    mask = RNG.random((4, 6)) < 0.5
    drawn = masked_parts(IMAGE, mask.ravel(), LABELS, colours)
    hidden = mask.repeat(8, axis=0).repeat(8, axis=1)
    flat = colours[LABELS].repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(drawn[hidden], flat[hidden])
    assert np.array_equal(drawn[~hidden], overlay(IMAGE, LABELS, colours, 0.3)[~hidden])
