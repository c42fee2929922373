"""A task of two layers on made-up data, for tests of the trainer."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from semmae.pipeline.feeding import Batch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.randomness import Purpose, streams, uniforms
from semmae.pipeline.schedule import Draw
from semmae.pipeline.tasks import Task
from semmae.storage.checkpoints import checkpoints, load_checkpoint

IMAGES, BATCH, EPOCHS = 22, 4, 4
PER_EPOCH = IMAGES // BATCH
STEPS = PER_EPOCH * EPOCHS


class KilledError(RuntimeError):
    pass


class TinyData:
    def __init__(self, seed: int = 0, images: int = IMAGES) -> None:
        self.seed, self.images, self.fingerprint = seed, images, f"{images:064d}"
        self.fails_at: int | None = None
        self.error: Exception = KilledError("data")
        self.warmed = 0

    def __len__(self) -> int:
        return self.images

    def warm(self) -> None:
        self.warmed += 1

    def __getitems__(self, draws: list[Draw]) -> Batch:
        index = np.array([draw.index for draw in draws])
        epoch = np.array([draw.epoch for draw in draws])
        progress = np.array([draw.progress for draw in draws])
        if self.fails_at is not None and progress[0] * STEPS >= self.fails_at - 1e-9:
            raise self.error
        x = uniforms(streams(self.seed, Purpose.CROP, epoch, index), 6)
        return {
            "x": torch.from_numpy(x).float(),
            "index": torch.from_numpy(index),
            "epoch": torch.from_numpy(epoch),
            "progress": torch.from_numpy(progress),
        }


class TinyTask(Task):
    kind = "tiny"

    def __init__(self, data: TinyData | None = None, dropout: float = 0.3, width: int = 8) -> None:
        torch.manual_seed(0)
        self.first = nn.Linear(6, width)
        self.model: nn.Sequential = nn.Sequential(
            self.first, nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1)
        )
        self.data: TinyData = data or TinyData()
        self.architecture = {"width": width, "shape": (6, width)}
        self.seen: list[tuple[list[tuple[int, int, float]], float]] = []
        self.fails_at: int | None = None
        self.poison_at: int | None = None
        self.calls = 0
        self.losses: list[Tensor] = []

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.calls == self.fails_at:
            raise KilledError("loss")
        value = (self.model(batch["x"]).squeeze(1) - batch["x"].sum(1)).float().square().mean()
        if self.calls == self.poison_at:
            value = value * math.nan
        self.calls += 1
        columns = (batch[name].tolist() for name in ("index", "epoch", "progress"))
        self.seen.append((list(zip(*columns, strict=True)), float(value.detach())))
        return value, {"draw_mean": batch["index"].float().mean()}


def options(output: Path, **changes: Any) -> TrainingOptions:
    settings: dict[str, Any] = {
        "output": output,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "base_learning_rate": 0.5,
        "warmup_epochs": 1.0,
        "device": "cpu",
        "loader_workers": 0,
        "log_steps": 3,
    }
    return TrainingOptions(**{**settings, **changes})


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value}


def same(one: Path, other: Path, but: tuple[str, ...] = ("options",)) -> bool:
    first, second = (
        flat({k: v for k, v in load_checkpoint(p).items() if k not in but}) for p in (one, other)
    )
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )


TIMINGS = {
    "seconds",
    "data_wait",
    "images_per_second",
    "tflops_per_second",
    "mfu",
    "host_gib",
    "loader_gib",
}
"""Names in the logs that two equal runs need not share."""


def lines_of(run: Path, file: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def log_of(run: Path, *without: str, file: str = "log.jsonl") -> list[dict[str, Any]]:
    left_out = {*TIMINGS, *without}
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines_of(run, file)]


def points_of(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@dataclasses.dataclass
class Whole:
    run: Path
    path: Path
    task: TinyTask


def step_of(batch: Batch) -> int:
    """The step that a batch belongs to, from 1."""
    return int(batch["progress"][0] * STEPS + 1e-6) + 1


def poisoned(value: Tensor, weight: Tensor, how: str) -> Tensor:
    """A loss that is not finite, or one whose gradients alone are not."""
    if how == "gradients":
        return value + (weight * 0).sqrt().sum()
    return value + (math.inf if how == "loss" else math.nan * weight.sum())


class PoisonedTask(TinyTask):
    """A task some of whose steps are not finite, whenever they are computed.

    Args:
        steps: Which, from 1.
        how: ``loss``, ``gradients`` or ``both`` are not finite.
        optimizer: ``fused``, or one that knows of no flag.
    """

    def __init__(self, *steps: int, how: str = "both", optimizer: str = "fused") -> None:
        super().__init__()
        self.steps, self.how, self.optimizer_kind = steps, how, optimizer

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, scalars = super().loss(batch)
        if step_of(batch) in self.steps:
            value = poisoned(value, self.first.weight, self.how)
        return value, scalars

    def optimizer(self, learning_rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
        if self.optimizer_kind == "fused":
            return super().optimizer(learning_rate, options)
        return torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9)


def at(run: Path, step: int) -> Path:
    return dict(checkpoints(run))[step]


def dumped(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "non-finite").glob("*"))


def weighs_as(one: Path, other: Path) -> bool:
    """Whether weights, optimiser and average are the same, to the bit."""
    first, second = (
        flat({**state["model"], "mean": state.get("ema"), "moments": state["optimizer"]["state"]})
        for state in map(load_checkpoint, (one, other))
    )
    assert first.keys() == second.keys()
    return all(
        torch.equal(value, second[name]) for name, value in first.items() if value is not None
    )


def averages(
    start: dict[str, Tensor], states: list[dict[str, Any]], decay: float
) -> list[dict[str, Tensor]]:
    """The average after each step, computed in float64 from the weights of the checkpoints."""
    average, found = {name: value.double() for name, value in start.items()}, []
    for count, state in enumerate(states, start=1):
        kept = min(decay, (1 + count) / (10 + count))
        average = {
            name: kept * value + (1 - kept) * state["model"][name].double()
            for name, value in average.items()
        }
        found.append(average)
    return found
