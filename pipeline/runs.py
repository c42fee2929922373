"""The folder of a run and its logs, and the sums of scalars that they are made from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..storage.dumps import drop_dumps, dumps_folder
from ..storage.files import write_atomically
from ..storage.leftovers import sweep_folder


class Board(Protocol):
    """Where curves and pictures are looked at."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        ...

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Add a picture, uint8 (H, W, 3)."""
        ...

    def close(self, failed: bool) -> None:
        """Write out what is held back; ``failed``: the run was cut off."""
        ...


class TensorBoard:
    """The board in ``RUN/tensorboard``; points after ``step`` are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        # The checkpoint is written after the points of its own step.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As of `Board`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """As of `Board`."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """As of `Board`."""
        self._writer.close()


class Run:
    """Folder of a run and its logs; use as a context manager.

    ``log.jsonl`` has a JSON line an epoch, ``steps.jsonl`` one for each point between (every
    ``--log-steps``), and boards show the same.  What was written after ``step`` is dropped, dumps
    of skipped steps too: it will be done, and logged, again.  What killed writers left goes, too.

    Args:
        folder: Of the run; made if absent.
        step: Optimiser steps done.
        boards: Where curves and pictures go, beside `TensorBoard`; closed with the run.

    Attributes:
        folder: Of the run.
        step: Optimiser steps done so far.
    """

    def __init__(self, folder: Path, step: int, boards: Sequence[Board] = ()) -> None:
        self.folder = folder
        self.step = step
        for name in ("log.jsonl", "steps.jsonl"):
            _truncate(folder / name, step)
        drop_dumps(folder, step)
        for place in (folder / "checkpoints", dumps_folder(folder)):
            sweep_folder(place)
        self._boards: list[Board] = [TensorBoard(folder, step), *boards]

    def point(
        self, epochs: float, figures: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        """Log what happened since the last point.

        Args:
            epochs: Epochs done.
            figures: Of training; ``train/...`` on boards.
            speed: Of the machine; ``speed/...`` on boards.
        """
        train = {**figures, "epoch": epochs}
        self._scalars({f"train/{name}": value for name, value in train.items()})
        self._scalars({f"speed/{name}": value for name, value in speed.items()})
        self._line("steps.jsonl", {"step": self.step, "epoch": epochs, **figures, **speed})

    def end_epoch(self, epoch: int, means: Mapping[str, float], extra: Mapping[str, float]) -> None:
        """Log an epoch.

        Args:
            epoch: From 1; 0 where nothing is trained.
            means: Over the epoch.
            extra: What the task says at its end; ``epoch/...`` on boards.
        """
        self._scalars({f"epoch/{name}": value for name, value in extra.items()})
        self._line("log.jsonl", {"epoch": epoch, "step": self.step, **means, **extra})

    def picture(self, name: str, image: NDArray[np.uint8]) -> None:
        """Put a picture, uint8 (H, W, 3), on the boards at the current step."""
        for board in self._boards:
            board.picture(name, image, self.step)

    def _scalars(self, values: Mapping[str, float]) -> None:
        for board in self._boards:
            board.scalars(values, self.step)

    def _line(self, file: str, record: Mapping[str, float]) -> None:
        """Append one JSON line; what is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with (self.folder / file).open("a") as opened:
            opened.write(json.dumps(finite, allow_nan=False) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for board in self._boards:
            board.close(kind is not None)


def _truncate(log: Path, step: int) -> None:
    """Drop the lines of later steps, and one that is half there."""
    if log.exists():
        lines = log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
        if kept != lines:
            write_atomically(log, b"".join(kept))


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
