"""k-means gives the same bits whatever the number of threads."""

from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info

from semmae.stages.clustering import clustered


def test_clustered__computes_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def fit(*given: Any) -> Any:
        threads.extend(library["num_threads"] for library in threadpool_info())
        return fitted(*given)

    fitted = KMeans.fit
    monkeypatch.setattr(KMeans, "fit", fit)
    points = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    found = clustered(points, 5, 2, 7)
    assert set(threads) == {1}
    assert np.bincount(found.labels_, minlength=5).min() > 0
