"""The moving average of a run's weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .parallel import Parallel


class Average:
    """Exponential moving average of the weights that train; each process has that of its share.

    The n-th step moves it by 1 - m towards the weights, m = min(decay, (1 + n) / (10 + n)): so it
    forgets the random start, and it is of the last tenth of the run until the decay is reached.

    Ours, since torch's ``AveragedModel`` reads its count from the device at every step, has no
    such warm-up, and copies a model as a whole.

    Args:
        model: On its device, sharded already.
        decay: Above 0, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Move towards the weights of now.

        Args:
            steps: n, from 1: how often it was moved, this time among them.
        """
        momentum = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(_shares(self._averages), _shares(self._weights), 1 - momentum)

    def state(self, parallel: Parallel) -> dict[str, Any]:
        """Whole averages by name, where `Parallel.gathered` gives them."""
        return parallel.gathered(self._averages)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], parallel: Parallel) -> None:
        """Go on from what `state` gave; other tensors are passed over."""
        for name, average in self._averages.items():
            average.copy_(parallel.shared_out(state[name], average))


def _shares(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process holds of each tensor."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
