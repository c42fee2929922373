"""Means of a loss by a share in [0, 1] that each value goes with, such as alpha."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import ranks


class LossBins:
    """Sums of losses in bins of a share; they stay on the device until they are read.

    What is added waits until `settle` says whether its step counts.

    Args:
        name: Of the figures.
        edges: Where one bin ends and the next begins, ascending, within (0, 1); an edge belongs to
            the bin above it.
    """

    def __init__(self, name: str, edges: Sequence[float]) -> None:
        ends = [0.0, *edges, 1.0]
        self._names = [f"{name}/{a:g}-{b:g}" for a, b in pairwise(ends)]
        self._given = edges
        self._edges = self._numbers = torch.empty(0)
        self._pending: list[Tensor] = []
        self._totals: list[Tensor] = []

    def add(self, losses: Tensor, shares: Tensor) -> None:
        """Take losses, of any shape, of a step or of a part of it.

        Args:
            losses: float32, detached.
            shares: float32 of the same shape, in [0, 1].
        """
        if not self._totals or self._edges.device != losses.device:
            self._edges = torch.tensor(self._given, device=losses.device)
            self._numbers = torch.arange(len(self._names), device=losses.device)
            sums = torch.zeros(len(self._names), device=losses.device)
            self._totals = [sums, torch.zeros_like(sums, dtype=torch.int64)]
            self._pending = [torch.zeros_like(total) for total in self._totals]
        bins = torch.bucketize(shares, self._edges, right=True)
        # Sums of masked copies: nothing is scattered, so their order is the same every time.
        belongs = bins.flatten() == self._numbers[:, None]
        self._pending[0] += losses.flatten().mul(belongs).sum(dim=1)
        self._pending[1] += belongs.sum(dim=1)

    def settle(self, kept: Tensor) -> None:
        """Count what was added since the last call, or forget it; the device is not waited for.

        Args:
            kept: A scalar on the device: above 0 where it counts.  A loss that is not finite is of
                a step that does not.
        """
        for total, pending in zip(self._totals, self._pending, strict=True):
            total += pending.where(kept > 0, 0)
            pending.zero_()

    def read(self) -> dict[str, float]:
        """The mean of each bin that holds anything, of what was settled since the last call.

        It waits for the device.  All processes must ask together, and have the means over all.
        """
        if not self._totals:
            return {}
        sums, counts = (ranks.sum_of(total).tolist() for total in self._totals)
        for total in self._totals:
            total.zero_()
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
