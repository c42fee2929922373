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
    loss, share = np.stack(losses), np.stack(shares)
    expected = {
        "by/0-0.2": loss[share < 0.2].mean(),
        "by/0.2-0.4": loss[(share >= 0.2) & (share < 0.4)].mean(),
        "by/0.4-1": loss[share >= 0.4].mean(),
    }
    assert bins.read() == pytest.approx(expected, rel=1e-5)
    assert bins.read() == {}


def test_loss_bins__leave_out_empty_bins_and_losses_that_are_not_finite() -> None:
    bins = LossBins("by", EDGES)
    assert bins.read() == {}
    bins.add(torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([0.2, 0.2, 1.0, 0.0]))
    assert bins.read() == {"by/0.2-0.4": 1.0, "by/0.4-1": 3.0}


def test_part_shares__is_the_size_of_each_patch_s_part() -> None:
    parts = torch.tensor([[0, 3, 3, 254], [7, 7, 7, 7]], dtype=torch.uint8)
    assert part_shares(parts).tolist() == [[0.25, 0.5, 0.5, 0.25], [1.0] * 4]
