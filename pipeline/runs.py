"""The folder of a run and its logs, and the sums of scalars that they are made from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..storage.files import write_atomically


class Run:
    """Folder of a run and its logs: TensorBoard scalars and pictures, one JSON line an epoch.

    Lines of epochs after ``step`` are dropped: they will be done, and logged, again.

    Args:
        folder: Of the run; made if absent.
        step: Optimiser steps done.

    Attributes:
        folder: Of the run.
        step: Optimiser steps done so far.
        board: The TensorBoard writer; `close` it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step
        self._truncate_log()
        # The checkpoint is written after the points of its own step.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @property
    def log_path(self) -> Path:
        """``RUN/log.jsonl``."""
        return self.folder / "log.jsonl"

    def _truncate_log(self) -> None:
        if self.log_path.exists():
            lines = self.log_path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= self.step]
            if kept != lines:
                write_atomically(self.log_path, b"".join(kept))

    def scalars(self, values: Mapping[str, float]) -> None:
        """Write scalars of the current step to TensorBoard."""
        for name, value in values.items():
            self.board.add_scalar(name, value, self.step)

    def picture(self, name: str, image: NDArray[np.uint8]) -> None:
        """Write a picture, uint8 (H, W, 3), to TensorBoard at the current step."""
        self.board.add_image(name, image, self.step, dataformats="HWC")

    def line(self, record: Mapping[str, float]) -> None:
        """Append one JSON line to the log; what is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with self.log_path.open("a") as opened:
            opened.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        self.board.close()


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Meter:
    """Means of scalars over steps; the sums stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one more value of each scalar, tensors of one element."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def on_device(self) -> dict[str, Tensor]:
        """The mean of each scalar, float32, without waiting for the device."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The mean of each scalar; waits for the device."""
        return {name: float(mean) for name, mean in self.on_device().items()}

    def state(self) -> dict[str, Any]:
        """Sums and counts, for a checkpoint in the middle of an epoch."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])
