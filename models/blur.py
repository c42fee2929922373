"""Gaussian blur of maps over a grid of patches."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian(deviation: float) -> Tensor:
    """A one-dimensional Gaussian that sums to 1, cut at two deviations (at least one place)."""
    reach = max(int(2 * deviation + 0.5), 1) if deviation > 0 else 0
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (places / max(deviation, 1e-6)) ** 2)
    return weights / weights.sum()


def blurred(maps: Tensor, kernel: Tensor) -> Tensor:
    """Each map blurred down and across; the border goes on outside, so that sums stay.

    Args:
        maps: (B, P, h, w).
        kernel: From `gaussian`.
    """
    if len(kernel) == 1:
        return maps
    channels, reach = maps.shape[1], len(kernel) // 2
    row = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(padded, row, groups=channels)
    return F.conv2d(across, row.transpose(2, 3), groups=channels)
