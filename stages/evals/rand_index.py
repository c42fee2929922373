"""The adjusted Rand index inside each of many images, computed for all of them at once."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]

CELLS_AT_ONCE = 4_000_000
"""Cells of contingency tables that are held at once, 32 MB."""


def rand_indices(predicted: Ids, true: Ids, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The adjusted Rand index of two partitions inside each image.

    Args:
        predicted: Part ids, (N, ...) integers, N and the rest at least 1.
        true: True labels of the same shape.
        inside: bool of that shape, the patches that count.

    Returns:
        float64, one for each image with a patch that counts, in order; at most 1, near 0 by
        chance, and 1 where both partitions are one part or all single patches.
    """
    tables = _tables(np.asarray(predicted), np.asarray(true), inside)
    return np.concatenate([_adjusted(counts) for counts in tables])


def _tables(predicted: Ids, true: Ids, inside: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """How often each id meets each label in each image, (n, ids, labels), some images a time.

    Images without a patch that counts are left out.
    """
    count = len(true)
    ids, a = np.unique(predicted, return_inverse=True)
    labels, b = np.unique(true, return_inverse=True)
    cells = len(ids) * len(labels)
    pairs = (a.reshape(count, -1) * len(labels) + b.reshape(count, -1)).astype(np.int64)
    inside = inside.reshape(count, -1)
    step = max(CELLS_AT_ONCE // cells, 1)
    for start in range(0, count, step):
        chosen = inside[start : start + step]
        offsets = np.arange(len(chosen))[:, None] * cells
        met = (pairs[start : start + step] + offsets)[chosen]
        counts = np.bincount(met, minlength=len(chosen) * cells).astype(np.float64)
        yield counts.reshape(-1, len(ids), len(labels))[chosen.any(axis=1)]


def _adjusted(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """The index of each table (n, ids, labels), (n,), by counts of ordered pairs of patches."""
    total = tables.sum(axis=(1, 2))
    both = np.square(tables).sum(axis=(1, 2))
    first = np.square(tables.sum(axis=2)).sum(axis=1) - both
    second = np.square(tables.sum(axis=1)).sum(axis=1) - both
    same, neither = both - total, total**2 - first - second - both
    most = (same + first) * (first + neither) + (same + second) * (second + neither)
    # Equal partitions have nothing to correct, and may leave 0 below the line.
    equal = (first == 0) & (second == 0)
    found = 2 * (same * neither - first * second) / np.where(equal, 1.0, most)
    return np.where(equal, 1.0, found)
