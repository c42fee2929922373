"""k-means."""

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits


def clustered(points: NDArray[np.float32], clusters: int, starts: int, seed: int) -> KMeans:
    """k-means, to the same bits whatever the number of processors.

    Three threads or more would add up the points of a cluster in whatever order they end.

    Args:
        points: (M, F), M no less than the clusters.
        clusters: How many.
        starts: Of which the best is taken.
        seed: Of the starts.
    """
    with threadpool_limits(1):
        return KMeans(clusters, n_init=starts, random_state=seed % 2**32).fit(points)
