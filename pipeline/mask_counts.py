"""How many patches of an image are masked, and the masking of exactly so many.

Legend: B images, L patches of an image, K masked and V = L - K visible patches.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError

Counts = NDArray[np.int64]
Masks = NDArray[np.bool_]
Keys = NDArray[np.uint64]

MAX_PATCHES = 2**15  # an index fits its bits of a sort key, and counts theirs (`masks`)

INDEX_BITS = 16
"""Lowest bits of a sort key, which hold the patch; what patches are ordered by stands above."""


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many patches of each image stay visible: V = floor(L (1 - r) + 1/2).

    Deviation: the released MAE takes ``int(L * (1 - r))``, which floating point can push one
    lower (L = 10, r = 0.9 leaves 0 visible instead of 1).  Here r is the decimal number that was
    written, and the arithmetic is exact.

    Args:
        patches: L, from 1 to `MAX_PATCHES`.
        mask_ratio: r, at least 0 (nothing is masked) and below 1.

    Returns:
        V, from 1 to L.

    Raises:
        SettingError: An argument is out of range, or no patch would stay visible.
    """
    if not 1 <= patches <= MAX_PATCHES:
        raise SettingError(f"an image must have 1 to {MAX_PATCHES} patches, got {patches}")
    if not 0 <= mask_ratio < 1:
        raise SettingError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
    visible = math.floor(patches * (1 - Fraction(str(float(mask_ratio)))) + Fraction(1, 2))
    if visible == 0:
        raise SettingError(
            f"mask_ratio {mask_ratio} leaves none of {patches} patches visible; lower it"
        )
    return visible


def predicted_count(patches: int, mask_ratio: float, share: float) -> int:
    """How many of the masked patches of each image are predicted.

    Args:
        patches: L.
        mask_ratio: As for `visible_count`.
        share: Of the masked patches, above 0, at most 1.

    Returns:
        From 1 to K.
    """
    return max(round(share * (patches - visible_count(patches, mask_ratio))), 1)


def visible_indices(mask: Masks, visible: int) -> Counts:
    """Where the visible patches of each image are.

    Args:
        mask: bool (B, L), True where a patch is masked.
        visible: V, the count that every image must have.

    Returns:
        int64 (B, V), ascending in each row.

    Raises:
        ValueError: An image has another number of visible patches.
    """
    found = np.count_nonzero(~mask, axis=1)
    if (found != visible).any():
        row = int(np.argmax(found != visible))
        raise ValueError(
            f"every image must keep {visible} patches visible, row {row} keeps {found[row]}; "
            "masks of one batch must share one mask ratio"
        )
    return np.nonzero(~mask)[1].astype(np.int64, copy=False).reshape(len(mask), visible)


def sort_keys(order: NDArray[np.unsignedinteger]) -> Keys:
    """Keys that sort patches by a number, and by index where it is equal.

    Args:
        order: Unsigned integers (B, L), below 2**48.

    Returns:
        uint64 (B, L).
    """
    keys = order.astype(np.uint64) << np.uint64(INDEX_BITS)
    keys |= np.arange(order.shape[1], dtype=np.uint64)
    return keys


def places_of(keys: Keys) -> NDArray[np.int64]:
    """The patch of each key, int64 of the same shape."""
    return (keys & np.uint64(2**INDEX_BITS - 1)).astype(np.int64)


def mask_first(keys: Keys, masked: int) -> Masks:
    """Mask the K patches with the smallest keys of each image; overwrites the keys.

    Args:
        keys: uint64 (B, L), from `sort_keys`.
        masked: K, from 0 to L.

    Returns:
        bool (B, L), True where a patch is masked.
    """
    # One sort of packed keys: numpy sorts integers several times as fast as it argsorts.
    keys.sort(axis=1)
    mask = np.zeros(keys.shape, dtype=np.bool_)
    np.put_along_axis(mask, places_of(keys[:, :masked]), True, axis=1)
    return mask
