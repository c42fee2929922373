"""The guard of a run's steps: one whose loss or gradients are not finite changes nothing.

It is decided on the device, so the host need not wait for a step before it prepares the next.  What
the host does about it (count, dump, stop) it does a step later, when the flag has long arrived.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DamageError

MOST_DUMPS = 10
"""Skipped steps that a run dumps; further ones are only counted."""


class Guard:
    """Lets the optimiser step where all is finite, and keeps count of where it is not.

    Args:
        model: What trains.  Its buffers are put back after a step that is skipped: running
            statistics of a batch norm are taken in the forward pass.
        optimizer: Of its weights.
        device: Of both.
        most: Steps in a row that may be skipped.
        folder: Of the dumps, for messages.

    Attributes:
        skipped: Steps skipped since the run began.
        in_a_row: Those of them since the last step that was not.
        dumps: Those of them that were dumped.
        before: The buffers by name as `remember` noted them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        most: int,
        folder: Path,
    ) -> None:
        self._optimizer, self._most, self._folder = optimizer, most, folder
        self._flag = _Flag(device)
        self._buffers = dict(model.named_buffers())
        self.before: dict[str, Tensor] = {}
        self.skipped = self.in_a_row = self.dumps = 0

    def remember(self) -> None:
        """Note the buffers; called before the forward pass."""
        self.before = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def step(self, *figures: Tensor) -> Tensor:
        """Step the optimiser, unless one of these is not finite.

        Fused optimisers of torch look at the flag on the device.  For others the host waits for
        it, as torch's own gradient scaler does.

        Args:
            figures: Scalars on the device, the same in all processes.

        Returns:
            A scalar on the device, float32: 1, or 0 where the step is skipped.
        """
        bad = ~torch.stack(figures).isfinite().all()
        skipped = bad.float()
        self._flag.send(skipped)
        optimizer = self._optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
        elif not self._flag.read():
            optimizer.step()
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.where(bad, self.before[name], buffer))
        return 1 - skipped

    def count(self) -> bool:
        """Whether the last step was skipped; counted once."""
        bad = self._flag.read()
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return bad

    def dumps_next(self) -> bool:
        """Whether a skipped step is to be dumped; counted."""
        if self.dumps >= MOST_DUMPS:
            return False
        self.dumps += 1
        return True

    def refuse_more(self, step: int) -> None:
        """Stop a run that does nothing but skip.

        Args:
            step: The last step skipped, from 1.

        Raises:
            DamageError: More than were allowed were skipped in a row.
        """
        if self.in_a_row > self._most:
            steps = f"{self.in_a_row} steps in a row" if self._most else "a step"
            raise DamageError(
                f"loss or gradients are not finite in {steps}, to step {step} (--skip-at-most "
                f"{self._most}): {self._folder} says what was computed of what; begin anew in "
                "another --output with a lower --base-learning-rate, --clip-gradients 1 or "
                "--precision fp32, or go on with more to skip"
            )

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint; the last step must have been counted."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "dumps": self.dumps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.dumps = state["dumps"]


class _Flag:
    """One number on its way from the device to the host."""

    def __init__(self, device: torch.device) -> None:
        on_gpu, self._device = device.type == "cuda", device
        self._host = torch.zeros((), pin_memory=on_gpu)
        self._seen = self._host.numpy()  # read without asking torch, which would wait for a GPU
        self._arrived = torch.cuda.Event(blocking=True) if on_gpu else None  # type: ignore[no-untyped-call]

    def send(self, flag: Tensor) -> None:
        self._host.copy_(flag, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))

    def read(self) -> bool:
        """What was sent last; waits until it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._seen)


def refuse_broken(weights: Mapping[str, Tensor], step: int, run: Path) -> None:
    """Refuse to save weights that are not finite, such as after a step that was too large.

    Args:
        weights: Tensors by name.
        step: Steps done.
        run: Folder of the run, for the message.

    Raises:
        DamageError: One is not.
    """
    broken = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise DamageError(
            f"{len(broken)} of {len(weights)} weights are not finite after step {step}, "
            f"{broken[0]} first: nothing was saved since the last checkpoint in {run}; begin anew "
            "in another --output with a lower --base-learning-rate, --clip-gradients 1 or "
            "--precision fp32"
        )
