"""Semantic-guided masks, the schedule that they follow, and plain random masks.

Paper, section 3.2 and algorithm 1: early in training the same share of every semantic part is
masked, late in training whole parts are, and alpha in [0, 1] leads from the one to the other.
The functions here are pure and work on whole batches; each image has a stream of its own, so its
mask does not depend on the batch that it came in.

Legend: B images, L patches of an image, P parts, K masked and V = L - K visible patches.
A stream's numbers (`semmae.pipeline.randomness.uniforms`) are used by position:

    0 ... L - 1      one a patch: inside a part the patches with the smallest numbers are masked
    L                the offset that rounds the parts' counts
    L + 1 ... L + P  one a part: parts are visited in the order of these numbers

So a map of one part gets the mask of `random_masks`, whatever P is.

Counts are integers in fixed point and patches are sorted by integers without ties, so a mask is the
same on every machine and no rounding can miss a count.  256 images of 196 patches and 7 parts take
about 4 us an image on one core, an image on its own about 80 us.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import MismatchError, SettingError
from .mask_counts import (
    MAX_PATCHES,
    Counts,
    Keys,
    Masks,
    mask_first,
    places_of,
    sort_keys,
    visible_count,
)
from .randomness import Streams, uniforms

Labels = NDArray[np.uint8]

FILL = 255  # what a part store holds where no map was written

_ONE = 2**32  # alpha is kept in steps of 1 / _ONE; L * L * _ONE stays below 2**63
_NUMBER_BITS = 40
_LABEL_SHIFT = np.uint64(56)  # above an index and a number


def alpha_at(
    progress: ArrayLike, gamma: float = 2.0, start: float = 0.0, end: float = 1.0
) -> NDArray[np.float64]:
    """How far masking has gone from shares of every part (0) to whole parts (1).

    alpha = start + (end - start) * progress ** gamma (paper, section 3.2; gamma = 2 did best in
    its ablation, and start = 1, end = 0 is the reversed schedule there).

    Args:
        progress: Any shape, in [0, 1].  Ours: samples seen / samples of the whole run; the
            released code steps once an epoch, (epoch + 1) / epochs.
        gamma: Exponent, positive.
        start: alpha at progress 0, in [0, 1].
        end: alpha at progress 1, in [0, 1].

    Returns:
        float64 of the shape of ``progress``, between ``start`` and ``end``.

    Raises:
        SettingError: ``gamma``, ``start`` or ``end`` is out of range.
        ValueError: A progress is outside [0, 1].
    """
    if not 0 < gamma < math.inf:
        raise SettingError(f"gamma must be a positive number, got {gamma}")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value <= 1:
            raise SettingError(f"{name} of alpha must be in [0, 1], got {value}")
    progress = np.asarray(progress, dtype=np.float64)
    _check_unit_interval("progress", progress)
    power = progress**gamma
    return np.asarray((1 - power) * start + power * end)


def part_sizes(labels: Labels, parts: int) -> Counts:
    """How many patches each part has.

    Args:
        labels: uint8 (B, L), part id of each patch, below ``parts``.
        parts: P, from 1 to 255.

    Returns:
        int64 (B, P), rows sum to L; 0 for a part that an image does not have.

    Raises:
        MismatchError: A label is not below ``parts`` (this, too, is a ValueError).
        ValueError: Labels of another shape or dtype, or ``parts`` out of range.
    """
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"labels must be uint8 (B, L), got {labels.dtype} {labels.shape}")
    if not 1 <= parts <= FILL:
        raise SettingError(f"parts must be from 1 to {FILL}, got {parts}")
    if labels.size and labels.max() >= parts:
        image, patch = np.argwhere(labels >= parts)[0]
        found = labels[image, patch]
        hint = " (the fill value of a store: this image has no part map)" if found == FILL else ""
        raise MismatchError(
            f"part ids must be below {parts}, got {found}{hint} in row {image} of the batch, "
            f"patch {patch}; take the number of parts from the store that the maps come from"
        )
    rows = np.arange(len(labels), dtype=np.int64)[:, None] * parts
    counts = np.bincount((labels + rows).ravel(), minlength=len(labels) * parts)
    return counts.astype(np.int64, copy=False).reshape(-1, parts)


def masked_counts(
    sizes: Counts, masked: int, alpha: NDArray[np.float64], stream: Streams
) -> Counts:
    """How many patches of each part are masked (paper, algorithm 1).

    With n_i the sizes, a_i = K n_i / L is the same share of every part, and b_i masks parts whole
    in random order until K patches are masked, so that the last one visited is cut.  Between them
    lies x_i = (1 - alpha) a_i + alpha b_i, which sums to K.

    Ours: x_i is rounded without bias.  With C_i the running sum of x over the parts in the same
    random order and u uniform in [0, 1), m_i = floor(C_i + u) - floor(C_(i-1) + u).  So the m_i
    sum to K, lie less than 1 from x_i, and have mean x_i whatever the order.  The released code
    rounds each part on its own, and 53 to 62 % of its images miss K.

    Args:
        sizes: int64 (B, P), not negative, every row sums to the same L.
        masked: K, from 0 to L.
        alpha: float64 (B,), in [0, 1]; kept in steps of 2**-32.
        stream: uint64 (B,), see the module for the positions used.

    Returns:
        int64 (B, P), 0 <= m_i <= n_i, every row sums to K.

    Raises:
        ValueError: An argument has another shape or is out of range.
    """
    _check_batch(len(sizes), alpha, stream)
    patches = int(sizes[0].sum()) if len(sizes) else masked
    wrong = (sizes.sum(axis=1) != patches) | (sizes < 0).any(axis=1)
    if wrong.any() or not 0 <= masked <= patches <= MAX_PATCHES:
        raise ValueError(
            f"part sizes must not be negative and sum to the same L in each row, with masked from "
            f"0 to L <= {MAX_PATCHES}, got L = {patches}, masked = {masked}, sizes off in rows "
            f"{np.flatnonzero(wrong).tolist()}"
        )
    numbers = uniforms(stream, patches + 1 + sizes.shape[1])
    return _round_counts(sizes, masked, alpha, numbers[:, patches:])


def semantic_masks(
    labels: Labels,
    parts: int,
    mask_ratio: float,
    alpha: NDArray[np.float64],
    stream: Streams,
) -> Masks:
    """Semantic-guided masks (paper, section 3.2, algorithm 1).

    Each part loses the patches that `masked_counts` gives it, drawn uniformly inside the part.
    Every image keeps exactly ``visible_count(L, mask_ratio)`` patches, whatever its parts.

    Args:
        labels: uint8 (B, L), part id of each patch.
        parts: P, from 1 to 255; parts may be empty.
        mask_ratio: Share of patches to mask, in [0, 1).
        alpha: float64 (B,), in [0, 1], from `alpha_at`.
        stream: uint64 (B,), from ``streams(seed, Purpose.MASK, epoch, index)``.

    Returns:
        bool (B, L), True where a patch is masked.

    Raises:
        SettingError: ``mask_ratio`` is out of range or leaves nothing visible.
        ValueError: A label is not below ``parts``, alpha is outside [0, 1], or an argument has
            another shape or dtype.
    """
    _check_batch(len(labels), alpha, stream)
    sizes = part_sizes(labels, parts)
    patches = labels.shape[1]
    masked = patches - visible_count(patches, mask_ratio)
    numbers = uniforms(stream, patches + 1 + parts)
    counts = _round_counts(sizes, masked, alpha, numbers[:, patches:])
    keys = _random_keys(numbers[:, :patches])
    keys |= labels.astype(np.uint64) << _LABEL_SHIFT
    return _mask_smallest(keys, sizes, counts)


def random_masks(patches: int, mask_ratio: float, stream: Streams) -> Masks:
    """Masks of plain MAE: each set of V visible patches is equally likely.

    Equal, bit for bit, to `semantic_masks` of maps of one part with the same streams.

    Args:
        patches: L.
        mask_ratio: Share of patches to mask, in [0, 1).
        stream: uint64 (B,), from ``streams(seed, Purpose.MASK, epoch, index)``.

    Returns:
        bool (B, L), True where a patch is masked.
    """
    masked = patches - visible_count(patches, mask_ratio)
    return mask_first(_random_keys(uniforms(stream, patches)), masked)


def predicted_places(masked: int, predicted: int, stream: Streams) -> NDArray[np.int64]:
    """Which of the masked patches of each image are predicted; each set is equally likely.

    Args:
        masked: K, masked patches of an image.
        predicted: How many of these are predicted, from 0 to K.
        stream: uint64 (B,), from ``streams(seed, Purpose.PREDICTED, epoch, index)``.

    Returns:
        int64 (B, predicted), places in [0, K), no two of an image the same.
    """
    keys = _random_keys(uniforms(stream, masked))
    keys.sort(axis=1)
    return places_of(keys[:, :predicted])


def _round_counts(
    sizes: Counts, masked: int, alpha: NDArray[np.float64], numbers: NDArray[np.float64]
) -> Counts:
    """`masked_counts` of checked arguments; numbers are (B, 1 + P).

    Everything is an integer in units of 1 / (L _ONE) patch, in which x_i and K are exact.  Since
    x_i <= n_i holds exactly and m_i < x_i + 1, the integer m_i cannot exceed n_i.
    """
    patches = int(sizes[0].sum()) if len(sizes) else 1
    unit = patches * _ONE
    order = numbers[:, 1:].argsort(axis=1, kind="stable")
    rows = np.arange(len(sizes))[:, None]
    size = sizes[rows, order]
    whole = np.clip(masked - (size.cumsum(axis=1) - size), 0, size)
    weight = np.rint(alpha * _ONE).astype(np.int64)[:, None]
    exact = (_ONE - weight) * (masked * size) + weight * (patches * whole)
    offset = (numbers[:, :1] * unit).astype(np.int64)
    steps = (exact.cumsum(axis=1) + offset) // unit
    # The offset is below one unit, so the running floor starts at 0.
    steps[:, 1:] -= steps[:, :-1].copy()
    counts = np.empty_like(sizes)
    counts[rows, order] = steps
    return counts


def _random_keys(numbers: NDArray[np.float64]) -> Keys:
    """Keys (B, L) that sort patches by number, and by index where 40 bits of it are equal."""
    return sort_keys((numbers * 2.0**_NUMBER_BITS).astype(np.uint64))


def _mask_smallest(keys: Keys, sizes: Counts, counts: Counts) -> Masks:
    """Mask the patches with the ``counts`` smallest keys of each part; overwrites the keys."""
    # One sort for all parts: their labels are the highest bits of the keys.
    keys.sort(axis=1)
    places = places_of(keys)
    places += np.arange(len(keys), dtype=np.int64)[:, None] * keys.shape[1]
    # Sorted, each row is part after part: first the masked ones of a part, then its others.
    runs = np.stack((counts, sizes - counts), axis=-1).ravel()
    mask = np.empty(keys.shape, dtype=np.bool_)
    mask.ravel()[places.ravel()] = np.repeat(np.arange(len(runs)) % 2 == 0, runs)
    return mask


def _check_unit_interval(name: str, values: NDArray[np.float64]) -> None:
    """Raise unless every value is in [0, 1]; a NaN is not."""
    outside = ~((values >= 0) & (values <= 1))
    if outside.any():
        raise ValueError(f"{name} must be in [0, 1], got {values[outside].ravel()[0]}")


def _check_batch(images: int, alpha: NDArray[np.float64], stream: Streams) -> None:
    """Raise unless alpha and stream hold one entry an image."""
    if alpha.shape != (images,) or stream.shape != (images,) or stream.dtype != np.uint64:
        raise ValueError(
            f"alpha must be (B,) and stream uint64 (B,) for B = {images} images, "
            f"got {alpha.shape} and {stream.dtype} {stream.shape}"
        )
    _check_unit_interval("alpha", alpha)
