"""Means of a loss by a share in [0, 1] that each value goes with, such as alpha."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import ranks


class LossBins:
    """Sums of losses in bins of a share; they stay on the device until they are read.

    Args:
        name: Of the figures.
        edges: Where one bin ends and the next begins, ascending, within (0, 1); an edge belongs to
            the bin above it.
    """

    def __init__(self, name: str, edges: Sequence[float]) -> None:
        ends = [0.0, *edges, 1.0]
        self._names = [f"{name}/{a:g}-{b:g}" for a, b in pairwise(ends)]
        self._given = edges
        self._edges = self._numbers = self._sums = self._counts = torch.empty(0)

    def add(self, losses: Tensor, shares: Tensor) -> None:
        """Count losses, of any shape; those that are not finite are left out.

        Args:
            losses: float32, detached.
            shares: float32 of the same shape, in [0, 1].
        """
        if not len(self._sums) or self._sums.device != losses.device:
            self._edges = torch.tensor(self._given, device=losses.device)
            self._numbers = torch.arange(len(self._names), device=losses.device)
            self._sums = torch.zeros(len(self._names), device=losses.device)
            self._counts = torch.zeros_like(self._sums, dtype=torch.int64)
        finite = losses.isfinite()
        bins = torch.bucketize(shares, self._edges, right=True)
        # Sums of masked copies: nothing is scattered, so their order is the same every time.
        belongs = (bins.flatten() == self._numbers[:, None]) & finite.flatten()
        self._sums += losses.where(finite, 0.0).flatten().mul(belongs).sum(dim=1)
        self._counts += belongs.sum(dim=1)

    def read(self) -> dict[str, float]:
        """The mean of each bin that holds anything, since the last call; waits for the device.

        All processes must ask together, and have the means over all.
        """
        if not len(self._sums):
            return {}
        sums, counts = (ranks.sum_of(t).tolist() for t in (self._sums, self._counts))
        self._sums.zero_()
        self._counts.zero_()
        return {
            name: total / count
            for name, total, count in zip(self._names, sums, counts, strict=True)
            if count
        }


def part_shares(parts: Tensor) -> Tensor:
    """How large the part of each patch is.

    Args:
        parts: uint8 (B, L), part id of each patch.

    Returns:
        float32 (B, L): patches of the image's part over L.
    """
    index = parts.long()
    sizes = torch.zeros(len(parts), 256, device=parts.device)
    sizes.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    return sizes.gather(1, index) / parts.shape[1]
