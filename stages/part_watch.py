"""A watch over parts while they are learned: one that dies is told of within 50 batches.

Ours.  It only looks: no loss, weight or random number hangs on it, so it is not kept in checkpoints
and begins anew where a run is resumed.

Legend of shapes: B images, P channels of the part map, h w patches.
"""

import sys

import torch
from torch import Tensor

WINDOW = 50
"""Batches, the last ones, that a part's share goes over; within an epoch none is told of before
them."""

DEAD = 0.001
"""Share of the patches below which a part counts as dead."""

ALIVE = 2 * DEAD
"""Share from which a dead part counts as back; above `DEAD`, or one in between would be told of
again and again."""


class PartWatch:
    """Share of the patches of the last `WINDOW` batches that each part owns.

    Args:
        every: Optimiser steps between two looks; reading figures off a GPU waits for it.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._batches, self._steps = 0, 0
        self._owned: Tensor | None = None  # patches by batch and part, a ring of batches
        self._patches = [0] * WINDOW  # of all parts, likewise
        self._dead: set[int] = set()

    @torch.no_grad()
    def count(self, maps: Tensor) -> Tensor:
        """Count the patches that each part owns in a batch.

        Args:
            maps: (B, P, h, w), soft part maps.

        Returns:
            The smallest share of this batch, a scalar on the device of ``maps``.  Not of the
            window: a resumed run would log other figures.
        """
        owner = maps.argmax(dim=1).flatten()
        ids = torch.arange(maps.shape[1], device=maps.device)
        # Neither bincount nor one_hot: both may wait for the GPU.
        owned = (owner[:, None] == ids).sum(dim=0)
        if self._owned is None:
            self._owned = owned.new_zeros(WINDOW, len(owned))
        place = self._batches % WINDOW
        self._owned[place], self._patches[place] = owned, len(owner)
        self._batches += 1
        return owned.min() / len(owner)

    def after_step(self, progress: float) -> None:
        """Look, where it is due and the window is full.

        Args:
            progress: Share of the run's steps that are done, 0 to 1.
        """
        self._steps += 1
        if self._steps % self._every == 0 and self._batches >= WINDOW:
            self.look(progress)

    def look(self, progress: float) -> None:
        """Tell of parts that died, or came back, on standard error; each once.

        Args:
            progress: As of `after_step`.
        """
        if self._owned is None:
            return
        patches = sum(self._patches)
        for part, owned in enumerate(self._owned.sum(dim=0).tolist()):
            share = owned / patches
            if part not in self._dead and share < DEAD:
                self._dead.add(part)
                batches = min(self._batches, WINDOW)
                print(
                    f"part {part} owns {share:.2%} of the patches of the last {batches} batches, "
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
