"""Which clusters of patch tokens are objects, without labels.

Legend of shapes: B images, L patches, C clusters.
"""

import sys

import numpy as np
from numpy.typing import NDArray

LEAST_AGREEMENT = 0.3
"""Least correlation, over clusters, of attention and absence from the border, for both to vote."""

AWAY_FROM_BORDER = 0.4
"""Standard deviations, over patches, below the mean of how much clusters lie on the border, from
which the border alone calls a cluster object."""


def objectness_of(
    assigned: NDArray[np.int64],
    attention: NDArray[np.float32],
    grid: tuple[int, int],
    clusters: int,
) -> NDArray[np.float64]:
    """How much clusters of patch tokens are object, without labels.

    Ours.  A cluster is object if the class token attends to it more than to the average patch by
    more than it lies on the border of the image more than the average patch does.  Where the
    attended clusters are not those away from the border, as with a class token that was never
    trained, the border alone votes.

    Args:
        assigned: Cluster of each patch, (B, L).
        attention: The class token's attention to each patch, mean over heads, (B, L).
        grid: (h, w).
        clusters: C.

    Returns:
        float64 (C,), above 0 for objects; a share of the average patch's attention or border.
    """
    rows, columns = np.divmod(np.arange(assigned.shape[1]), grid[1])
    border = (rows == 0) | (rows == grid[0] - 1) | (columns == 0) | (columns == grid[1] - 1)
    relative = attention / attention.mean(axis=1, keepdims=True)
    counts = np.maximum(np.bincount(assigned.ravel(), minlength=clusters), 1)
    attended = np.bincount(assigned.ravel(), relative.ravel(), clusters) / counts
    at_border = np.broadcast_to(border, assigned.shape).ravel()
    bordering = np.bincount(assigned.ravel(), at_border, clusters) / counts / border.mean()
    if _correlation(attended, bordering, counts) < -LEAST_AGREEMENT:
        return np.asarray(attended - bordering)
    print(
        "the class token's attention has nothing to do with what lies away from the border: the "
        "border alone votes for the background",
        file=sys.stderr,
    )
    # The mean over patches is 1.
    spread = np.sqrt(np.average((bordering - 1) ** 2, weights=counts))
    return np.asarray(1 - AWAY_FROM_BORDER * spread - bordering)


def _correlation(
    first: NDArray[np.float64], second: NDArray[np.float64], weights: NDArray[np.integer]
) -> float:
    """Of two figures of each cluster, weighted; 0 where one does not vary."""
    covariance = np.cov(first, second, aweights=weights)
    spread = float(np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return float(covariance[0, 1]) / spread if spread else 0.0
