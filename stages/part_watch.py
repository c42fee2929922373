"""A watch over parts while they are learned: one that dies is told of at once.

Ours.  It only looks: no loss, weight or random number hangs on it, so it is not kept in checkpoints
and begins anew where a run is resumed.

Legend of shapes: B images, P channels of the part map, h w patches.
"""

import sys

import torch
from torch import Tensor

STEPS = 50
"""Batches that the running share of a part goes over, about; none is told of before them."""

DEAD = 0.001
"""Share of the patches below which a part counts as dead."""

ALIVE = 2 * DEAD
"""Share from which a dead part counts as back; above `DEAD`, or one in between would be told of
again and again."""


class PartWatch:
    """Running share of the patches that each part owns.

    Args:
        every: Optimiser steps between two looks; reading figures off a GPU waits for it.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._batches, self._steps = 0, 0
        self._shares: Tensor | None = None
        self._dead: set[int] = set()

    @torch.no_grad()
    def count(self, maps: Tensor) -> Tensor:
        """Count the patches that each part owns in a batch.

        Args:
            maps: (B, P, h, w), soft part maps.

        Returns:
            The smallest share of this batch, a scalar on the device of ``maps``.  Not of the
            running shares: a resumed run would log other figures.
        """
        owner = maps.argmax(dim=1).flatten()
        ids = torch.arange(maps.shape[1], device=maps.device)
        # Neither bincount nor one_hot: both may wait for the GPU.
        shares = (owner[:, None] == ids).sum(dim=0) / len(owner)
        self._batches += 1
        if self._shares is None:
            self._shares = torch.zeros_like(shares)
        self._shares = self._shares.lerp(shares, 1 / min(self._batches, STEPS))
        return shares.min()

    def after_step(self, progress: float) -> None:
        """Tell of parts that died, or came back, on standard error; each once.

        Args:
            progress: Share of the run's steps that are done, 0 to 1.
        """
        self._steps += 1
        if self._steps % self._every or self._batches < STEPS or self._shares is None:
            return
        for part, share in enumerate(self._shares.tolist()):
            if part not in self._dead and share < DEAD:
                self._dead.add(part)
                print(
                    f"part {part} owns {share:.2%} of the patches of the last {STEPS} batches, "
                    f"{progress:.0%} into the run: try fewer --num-parts, another "
                    "--diversity-weight, or another --seed",
                    file=sys.stderr,
                )
            elif part in self._dead and share >= ALIVE:
                self._dead.remove(part)
                print(
                    f"part {part} is back: it owns {share:.2%} of the patches, {progress:.0%} "
                    "into the run",
                    file=sys.stderr,
                )
