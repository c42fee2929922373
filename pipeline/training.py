"""The one trainer: it serves encoder, part learner, pretraining and evaluation heads.

A `Task` gives the modules, the data and the loss; `fit` gives precision, accumulation, schedules,
logs, checkpoints and resume.  What a step computes is a function of the weights before it and of
(seed, step) alone: the order of an epoch is one global permutation, each sample is made from its
`Draw`, and torch's generators are seeded afresh from (seed, step).  So a run that was interrupted
and resumed goes through the same batches, masks and losses, to the bit, as one that was not, and a
checkpoint needs to hold no generator state.
"""

import abc
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from ..errors import DamageError, MismatchError, SettingError
from ..storage.checkpoints import (
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ..storage.files import read_json, write_json
from .progress import Progress
from .randomness import Purpose, streams

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of a run, as the sampler hands it to a loader worker.

    Attributes:
        index: Index of the sample in the data.
        epoch: Epoch, from 0.
        progress: Samples seen before this one over the samples of the whole run, in [0, 1].
    """

    index: int
    epoch: int
    progress: float


class TrainingData(Protocol):
    """Data that a task trains on; it is pickled or forked into loader workers."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data change; checked on resume."""
        ...

    def __len__(self) -> int:
        """Samples in an epoch."""
        ...

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """The samples of a batch, each a function of the run's seed and of its draw alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every training command takes."""

    output: Annotated[Path, "Folder of the run: checkpoints, logs, pictures."]
    epochs: Annotated[int, "Passes over the data."] = 100
    batch_size: Annotated[int, "Images an optimiser step."] = 256
    accumulation: Annotated[int, "Parts that a batch is computed in, one after another."] = 1
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 1.5e-4
    warmup_epochs: Annotated[float, "Epochs of linear warm-up; a cosine to 0 follows."] = 0.0
    weight_decay: Annotated[float, "AdamW's weight decay; none on biases and norms."] = 0.05
    clip_gradients: Annotated[float, "Largest gradient norm; 0 does not clip."] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], "Of the forward pass; auto is bf16 on GPUs, fp32 on CPUs."
    ] = "auto"
    device: Annotated[str, "cuda, cpu, ...; auto takes a GPU where there is one."] = "auto"
    loader_workers: Annotated[int, "Processes that decode images; 0 decodes in the trainer."] = 2
    seed: Annotated[int, "Of weights, order, crops and masks."] = 0
    resume: Annotated[bool, "Go on from the newest checkpoint in the output folder."] = True
    checkpoint_epochs: Annotated[int, "Epochs between checkpoints."] = 1
    checkpoint_steps: Annotated[int, "Steps between further checkpoints; 0 writes none."] = 0
    keep_checkpoints: Annotated[int, "Newest checkpoints kept; 0 keeps all."] = 2
    log_steps: Annotated[int, "Steps between two points of the logs."] = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range; the message names it and its value.
        """
        for name in ("epochs", "batch_size", "accumulation", "checkpoint_epochs", "log_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "warmup_epochs",
            "weight_decay",
            "clip_gradients",
            "loader_workers",
            "seed",
            "checkpoint_steps",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.base_learning_rate > 0, "base_learning_rate", self.base_learning_rate, "> 0")
        require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"a divisor of batch_size {self.batch_size}",
        )


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a `SettingError` that names the option, unless the condition holds."""
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise SettingError(f"{flag} is {value}: expected {expected}")


FREE_ON_RESUME = frozenset(
    {
        "output",
        "data",
        "device",
        "loader_workers",
        "resume",
        "checkpoint_epochs",
        "checkpoint_steps",
        "keep_checkpoints",
        "log_steps",
        "accumulation",
    }
)
"""Options that may differ when a run goes on: what is computed does not follow from them (data
are compared by fingerprint)."""


class Task(abc.ABC):
    """What is trained, on what, by which loss.

    Attributes:
        kind: Name of the task; written into checkpoints.
        model: Everything that trains, and everything that a checkpoint holds.
        data: Where the batches come from.
        architecture: Plain data from which the model can be built again; written into checkpoints.
    """

    kind: str
    model: nn.Module
    data: TrainingData
    architecture: dict[str, Any]

    @abc.abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and further scalars to log.

        Args:
            batch: What ``data`` made, on the training device.

        Returns:
            A scalar tensor to minimise, and detached scalar tensors by name.
        """

    def place(self, device: torch.device) -> None:
        """Move what trains, and what the loss needs beside it, to the device."""
        self.model.to(device)

    def optimizer(self, learning_rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
        """AdamW, betas (0.9, 0.95), as MAE and SemMAE pretrain; a task may choose another."""
        groups = decay_groups(self.model, options.weight_decay)
        fused = next(self.model.parameters()).device.type == "cuda"
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)

    def finish_epoch(self, epoch: int, run: "Run") -> dict[str, float]:
        """Called after each epoch (from 1): draw pictures, validate; figures go into the log."""
        return {}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases, norms and single tokens do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [p for p in trained if p.squeeze().ndim <= 1]
    matrices = [p for p in trained if p.squeeze().ndim > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Schedule:
    """Steps of a run and the learning rate at each.

    The last images of an epoch that do not fill a batch are left out of it; the next epoch's
    order is another one.
    """

    images: int
    batch_size: int
    epochs: int
    warmup_epochs: float
    peak: float

    def __post_init__(self) -> None:
        if self.images < self.batch_size:
            raise SettingError(
                f"--batch-size is {self.batch_size}, but there are {self.images} images: "
                "expected at most as many as there are images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.images // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.steps_per_epoch * self.epochs

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to 0, by step; the first step's rate is not 0."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(self.steps - warmup, 1)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def permutation(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The one order of all images in an epoch, (images,)."""
        key = int(streams(seed, Purpose.ORDER, epoch, 0))
        return np.random.default_rng(key).permutation(self.images)


class _Batches:
    """Batch sampler of the rest of a run: lists of draws, from ``start`` on, ``parts`` a step."""

    def __init__(self, schedule: Schedule, seed: int, start: int, parts: int) -> None:
        self._schedule, self._seed, self._start, self._parts = schedule, seed, start, parts

    def __len__(self) -> int:
        return (self._schedule.steps - self._start) * self._parts

    def __iter__(self) -> Iterator[list[Draw]]:
        schedule, size = self._schedule, self._schedule.batch_size
        micro = size // self._parts
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self._start, schedule.steps):
            if step // schedule.steps_per_epoch != epoch:
                epoch = step // schedule.steps_per_epoch
                order = schedule.permutation(self._seed, epoch)
            first = (step % schedule.steps_per_epoch) * size
            for part in range(first, first + size, micro):
                before = epoch * schedule.steps_per_epoch * size
                yield [
                    Draw(int(order[i]), epoch, (before + i) / (schedule.steps * size))
                    for i in range(part, part + micro)
                ]


class Run:
    """Folder of a run and its logs: TensorBoard scalars and pictures, one JSON line an epoch."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step
        self._truncate_log()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    @property
    def log_path(self) -> Path:
        """``RUN/log.jsonl``."""
        return self.folder / "log.jsonl"

    def _truncate_log(self) -> None:
        """Drop lines of epochs that the checkpoint does not hold: they will be done again."""
        if self.log_path.exists():
            lines = self.log_path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= self.step]
            self.log_path.write_text("".join(kept))

    def scalars(self, values: Mapping[str, float]) -> None:
        """Write scalars of the current step to TensorBoard."""
        for name, value in values.items():
            self.board.add_scalar(name, value, self.step)

    def picture(self, name: str, image: NDArray[np.uint8]) -> None:
        """Write a picture, uint8 (H, W, 3), to TensorBoard at the current step."""
        self.board.add_image(name, image, self.step, dataformats="HWC")

    def line(self, record: Mapping[str, float]) -> None:
        """Append one JSON line to the log."""
        with self.log_path.open("a") as opened:
            opened.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def plain_options(options: object) -> dict[str, Any]:
    """The fields of an options dataclass as plain JSON data."""
    return {
        field.name: _plain(getattr(options, field.name))
        for field in fields(options)  # type: ignore[arg-type]
    }


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        SettingError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"--device is {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"--device is {name}, but no CUDA device is to be had here: use cpu")
    return device


def _refuse_difference(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise unless two configurations compute the same."""
    names = sorted((old.keys() | new.keys()) - FREE_ON_RESUME)
    differing = [name for name in names if old.get(name) != new.get(name)]
    if differing:
        said = "; ".join(
            f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing
        )
        raise MismatchError(
            f"the {kind} in this folder was started otherwise: {said}; "
            "take the old values, or another --output for a new run"
        )


def _resume(task: Task, optimizer: torch.optim.Optimizer, options: TrainingOptions) -> int:
    """Load the newest checkpoint into task and optimiser; the steps done, 0 for a new run."""
    found = checkpoints(options.output)
    if not found:
        return 0
    step, path = found[-1]
    state = load_checkpoint(path)
    if state.get("kind") != task.kind:
        raise MismatchError(
            f"{options.output} holds a run of kind {state.get('kind')!r}, this is {task.kind!r}: "
            "choose another --output"
        )
    _refuse_difference(task.kind, state["options"], plain_options(options))
    _refuse_difference(task.kind, state["architecture"], task.architecture)
    if state["data"] != task.data.fingerprint:
        raise MismatchError(
            f"the run in {options.output} was started on other data: {state['images']} images with "
            f"fingerprint {state['data'][:12]}, now {len(task.data)} with "
            f"{task.data.fingerprint[:12]}; restore the data or choose another --output"
        )
    task.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step


def _autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _loader(
    task: Task, schedule: Schedule, options: TrainingOptions, start: int
) -> DataLoader[Batch]:
    workers = options.loader_workers
    return DataLoader(
        task.data,  # type: ignore[arg-type]
        batch_sampler=_Batches(schedule, options.seed, start, options.accumulation),
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _as_is(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


class _Meter:
    """Sums of scalars that stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def on_device(self) -> dict[str, Tensor]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def means(self) -> dict[str, float]:
        return {name: float(mean) for name, mean in self.on_device().items()}


def _require_finite(means: Mapping[str, float], step: int, options: TrainingOptions) -> None:
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise DamageError(
            f"{', '.join(broken)} is not finite within the {options.log_steps} steps before step "
            f"{step}: nothing was saved since the last checkpoint in {options.output}; go on with "
            "a lower --base-learning-rate, --clip-gradients 1 or --precision fp32 in a new --output"
        )


def fit(task: Task, options: TrainingOptions) -> Path:
    """Train a task to its end, or on from where an earlier call was interrupted.

    Args:
        task: What is trained.
        options: How; written to ``RUN/options.json``.

    Returns:
        The last checkpoint: a dict with ``format, kind, architecture, model, optimizer, step,
        samples_seen, options, data, images``.

    Raises:
        SettingError: A setting cannot be, such as a batch larger than the data.
        MismatchError: The folder holds a run with another configuration or other data.
        DamageError: The loss is no longer finite.
    """
    device = choose_device(options.device)
    peak = options.base_learning_rate * options.batch_size / 256
    schedule = Schedule(
        len(task.data), options.batch_size, options.epochs, options.warmup_epochs, peak
    )
    task.place(device)
    optimizer = task.optimizer(peak, options)
    if checkpoints(options.output) and not options.resume:
        raise SettingError(
            f"{options.output} holds a run already: drop --no-resume to go on with it, "
            "or choose another --output"
        )
    start = _resume(task, optimizer, options)
    _write_options(task, options)
    run = Run(options.output, start)
    try:
        _train(task, options, schedule, optimizer, run)
    finally:
        run.board.close()
    return checkpoints(options.output)[-1][1]


def _write_options(task: Task, options: TrainingOptions) -> None:
    record = {"kind": task.kind, "options": plain_options(options), "model": task.architecture}
    path = options.output / "options.json"
    if not path.exists() or read_json(path) != record:
        write_json(path, record)


def _train(
    task: Task,
    options: TrainingOptions,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    run: Run,
) -> None:
    """The loop over the steps that are left."""
    device = next(task.model.parameters()).device
    batches = iter(_loader(task, schedule, options, run.step))
    per_epoch, size = schedule.steps_per_epoch, options.batch_size
    meter, epoch_meter = _Meter(), _Meter()
    began, waited, counted = time.monotonic(), 0.0, 0
    done = run.step * size
    with Progress(f"{task.kind}", schedule.steps * size, "image", done) as progress:
        while run.step < schedule.steps:
            rate = schedule.learning_rate(run.step)
            scalars, wait = _step(task, options, optimizer, batches, rate, run.step, device)
            run.step += 1
            waited, counted = waited + wait, counted + size
            meter.add(scalars)
            epoch_meter.add(scalars)
            figures: dict[str, float] = {}
            ends_epoch = run.step % per_epoch == 0
            saves = bool(options.checkpoint_steps) and run.step % options.checkpoint_steps == 0
            if run.step % options.log_steps == 0 or ends_epoch or saves:
                figures = meter.means()
                _require_finite(figures, run.step, options)
                run.scalars({f"train/{name}": value for name, value in figures.items()})
                run.scalars({"train/learning_rate": rate, "train/epoch": run.step / per_epoch})
                meter = _Meter()
            progress.update(size, **figures)
            if ends_epoch:
                seconds = time.monotonic() - began
                _end_epoch(
                    task, run, per_epoch, epoch_meter.means(), rate, counted, seconds, waited
                )
                epoch_meter, began, waited, counted = _Meter(), time.monotonic(), 0.0, 0
                saves = saves or run.step // per_epoch % options.checkpoint_epochs == 0
            if saves or run.step == schedule.steps:
                _save(task, options, optimizer, schedule, run)


def _step(
    task: Task,
    options: TrainingOptions,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    rate: float,
    step: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], float]:
    """One optimiser step; its scalars, and the seconds that it waited for data."""
    torch.manual_seed(int(streams(options.seed, Purpose.TRAINING, 0, step)) >> 1)
    task.model.train()
    meter, waited = _Meter(), 0.0
    for _ in range(options.accumulation):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with _autocast(options, device):
            loss, scalars = task.loss(batch)
        (loss / options.accumulation).backward()  # type: ignore[no-untyped-call]
        meter.add({"loss": loss, **scalars})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, options.clip_gradients or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**meter.on_device(), "gradient_norm": norm}, waited


def _end_epoch(
    task: Task,
    run: Run,
    per_epoch: int,
    means: Mapping[str, float],
    rate: float,
    images: int,
    seconds: float,
    waited: float,
) -> None:
    epoch = run.step // per_epoch
    task.model.eval()
    extra = task.finish_epoch(epoch, run)
    run.scalars({f"epoch/{name}": value for name, value in extra.items()})
    run.line(
        {
            "epoch": epoch,
            "step": run.step,
            **means,
            **extra,
            "learning_rate": rate,
            "images_per_second": images / max(seconds, 1e-9),
            "data_wait": waited / max(seconds, 1e-9),
            "seconds": seconds,
        }
    )


def _save(
    task: Task,
    options: TrainingOptions,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    run: Run,
) -> None:
    save_checkpoint(
        options.output,
        run.step,
        {
            "kind": task.kind,
            "architecture": task.architecture,
            "model": task.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": run.step,
            "samples_seen": run.step * schedule.batch_size,
            "options": plain_options(options),
            "data": task.data.fingerprint,
            "images": len(task.data),
        },
    )
    if options.keep_checkpoints:
        prune_checkpoints(options.output, options.keep_checkpoints)


def indices(draws: Sequence[Draw]) -> NDArray[np.int64]:
    """The indices of some draws, (B,)."""
    return np.array([draw.index for draw in draws], dtype=np.int64)
