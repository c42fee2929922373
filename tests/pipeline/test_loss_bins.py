import math

import numpy as np
import pytest
import torch

from semmae.pipeline.loss_bins import LossBins, part_shares

EDGES = (0.2, 0.4)


def test_loss_bins__are_the_means_of_each_range() -> None:
    rng = np.random.default_rng(0)
    bins, losses, shares = LossBins("by", EDGES), [], []
    for _ in range(3):
        losses.append(rng.random((4, 7), dtype=np.float32))
        shares.append(rng.random((4, 7), dtype=np.float32))
        bins.add(torch.from_numpy(losses[-1]), torch.from_numpy(shares[-1]))
        bins.settle(torch.ones(()))
    loss, share = np.stack(losses), np.stack(shares)
    expected = {
        "by/0-0.2": loss[share < 0.2].mean(),
        "by/0.2-0.4": loss[(share >= 0.2) & (share < 0.4)].mean(),
        "by/0.4-1": loss[share >= 0.4].mean(),
    }
    assert bins.read() == pytest.approx(expected, rel=1e-5)
    assert bins.read() == {}


def test_loss_bins__leave_out_empty_bins_and_steps_that_are_skipped() -> None:
    bins = LossBins("by", EDGES)
    bins.settle(torch.ones(()))
    assert bins.read() == {}
    for kept, losses in enumerate(([1.0, math.nan, 3.0, math.inf], [1.0, 2.0, 3.0, 4.0])):
        for part in (slice(0, 2), slice(2, 4)):
            bins.add(torch.tensor(losses)[part], torch.tensor([0.2, 0.2, 1.0, 1.0])[part])
        assert bins.read() == {}
        bins.settle(torch.tensor(float(kept)))
    assert bins.read() == {"by/0.2-0.4": 1.5, "by/0.4-1": 3.5}


def test_part_shares__is_the_size_of_each_patch_s_part() -> None:
    parts = torch.tensor([[0, 3, 3, 254], [7, 7, 7, 7]], dtype=torch.uint8)
    assert part_shares(parts).tolist() == [[0.25, 0.5, 0.5, 0.25], [1.0] * 4]
