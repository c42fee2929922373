"""The one trainer: it serves encoder, part learner, pretraining and evaluation heads.

A `Task` gives the modules, the data and the loss; `fit` gives precision, accumulation, schedules,
logs, checkpoints and resume.  What a step computes is a function of the weights before it and of
(seed, step) alone: the order of an epoch is one global permutation, each sample is made from its
`Draw`, and torch's generators are seeded afresh from (seed, step).  So a run that was interrupted
and resumed goes through the same batches, masks and losses, to the bit, as one that was not, and a
checkpoint needs to hold no generator state.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DamageError, MismatchError, SettingError, UserError
from ..storage.checkpoints import (
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ..storage.files import read_json, write_json
from .feeding import Batch, batches_of
from .options import TrainingOptions, choose_device, plain_options, refuse_difference
from .progress import Progress
from .randomness import Purpose, streams
from .runs import Meter, Run
from .schedule import BatchSampler, Schedule
from .tasks import Task


def fit(task: Task, options: TrainingOptions) -> Path:
    """Train a task to its end, or on from where an earlier call was interrupted.

    Nothing in the folder is touched before everything there was found to belong to this run.

    Args:
        task: What is trained.
        options: How; written to ``RUN/options.json``.

    Returns:
        The last checkpoint: a dict with ``format, kind, architecture, model, optimizer, step,
        samples_seen, options, data, images, meter``.

    Raises:
        SettingError: A setting cannot be, such as a batch larger than the data, or the folder
            holds a run and ``options.resume`` is off.
        MismatchError: The folder holds a run with another configuration or other data.
        DamageError: Loss, gradients or weights are no longer finite, or the newest checkpoint
            cannot be read.
    """
    device = choose_device(options.device)
    schedule = options.schedule(len(task.data))
    refuse_foreign_folder(options.output, task.kind)
    state = _state_to_resume(task, options)
    task.place(device)
    optimizer = task.optimizer(options.peak_learning_rate, options)
    if state is not None:
        _load(task, optimizer, state, options.output)
    if options.warmup_epochs > options.epochs:
        print(
            f"--warmup-epochs {options.warmup_epochs:g} is more than --epochs {options.epochs}: "
            "the learning rate will not reach its peak",
            file=sys.stderr,
        )
    _write_options(task, options)
    task.begin(options.output)
    run = Run(options.output, state["step"] if state else 0)
    with contextlib.closing(run):
        training = _Training(task, options, schedule, optimizer, run, device)
        if state is not None:
            training.epoch_meter.load_state(state["meter"], device)
        training.to_the_end()
    return checkpoints(options.output)[-1][1]


def keep(task: Task, options: TrainingOptions) -> Path:
    """Write a task that needs no training as a run of no steps, where `fit` would train it.

    Args:
        task: What is kept.
        options: Its settings; written to ``RUN/options.json``.

    Returns:
        The checkpoint, as of `fit`.

    Raises:
        SettingError, MismatchError, DamageError: As `fit`, for what the folder holds already.
    """
    device = choose_device(options.device)
    refuse_foreign_folder(options.output, task.kind)
    if _state_to_resume(task, options) is None:
        task.place(device)
        _write_options(task, options)
        task.begin(options.output)
        with contextlib.closing(Run(options.output, 0)) as run:
            task.model.eval()
            run.line({"epoch": 0, **task.finish_epoch(0, run)})
        save_checkpoint(options.output, 0, _state_of(task, options, 0, {}, {}))
    return checkpoints(options.output)[-1][1]


def _state_of(
    task: Task,
    options: TrainingOptions,
    step: int,
    optimizer: Mapping[str, Any],
    meter: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "kind": task.kind,
        "architecture": task.architecture,
        "model": task.model.state_dict(),
        "optimizer": optimizer,
        "step": step,
        "samples_seen": step * options.batch_size,
        "options": plain_options(options),
        "data": task.data.fingerprint,
        "images": len(task.data),
        "meter": meter,
    }


def _state_to_resume(task: Task, options: TrainingOptions) -> dict[str, Any] | None:
    """The newest checkpoint, found to be one of this very run; None for a new run."""
    found = checkpoints(options.output)
    if found and not options.resume:
        raise SettingError(
            f"{options.output} holds a run already: drop --no-resume to go on with it, "
            "or choose another --output"
        )
    if not found:
        return None
    path = found[-1][1]
    try:
        state = load_checkpoint(path)
    except DamageError as error:
        before = f"go on from {found[-2][1].name}" if len(found) > 1 else "begin again"
        raise DamageError(f"{error}; remove that file to {before}") from error
    _refuse_kind(str(state.get("kind")), task.kind, options.output)
    now = plain_options(options)
    refuse_difference(options.output, task.kind, state["options"], now, options=True)
    architecture = state["architecture"]
    refuse_difference(options.output, task.kind, architecture, task.architecture, options=False)
    if state["data"] != task.data.fingerprint:
        raise MismatchError(
            f"the run in {options.output} was started on other data: {state['images']} images with "
            f"fingerprint {state['data'][:12]}, now {len(task.data)} with "
            f"{task.data.fingerprint[:12]}; restore the data or choose another --output"
        )
    return state


def refuse_foreign_folder(folder: Path, kind: str) -> None:
    """Refuse to train into a folder that holds something else.

    Args:
        folder: Where a run is to go; it may be absent, empty, or hold a run of this kind.
        kind: Of the task.

    Raises:
        MismatchError: It holds a run of another kind.
        SettingError: It is a file, or holds things that are no run.
    """
    if folder.is_file():
        raise SettingError(f"{folder} is a file: name a folder as --output")
    if checkpoints(folder):
        return
    options: Mapping[str, Any] = {}
    with contextlib.suppress(UserError):
        options = read_json(folder / "options.json")
    if "kind" in options:
        _refuse_kind(str(options["kind"]), kind, folder)
    held = [entry.name for entry in folder.glob("*") if not entry.name.startswith(".")]
    if held and "options.json" not in held:
        raise SettingError(
            f"{folder} is not empty and holds no run ({', '.join(sorted(held)[:3])}...): "
            "name a new or empty folder as --output"
        )


def _refuse_kind(kind: str, wanted: str, folder: Path) -> None:
    if kind != wanted:
        raise MismatchError(
            f"{folder} holds a run of kind {kind!r}, this is {wanted!r}: choose another --output"
        )


def _load(
    task: Task, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], folder: Path
) -> None:
    try:
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise MismatchError(
            f"the newest checkpoint in {folder} holds other weights than this {task.kind} run "
            "trains: go on with the version of semmae that wrote it, or choose another --output"
        ) from error


def _write_options(task: Task, options: TrainingOptions) -> None:
    record = {"kind": task.kind, "options": plain_options(options), "model": task.architecture}
    path = options.output / "options.json"
    with contextlib.suppress(UserError):
        if read_json(path) == record:
            return
    write_json(path, record)


class _Training:
    """A run under way."""

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        run: Run,
        device: torch.device,
    ) -> None:
        self._task, self._options, self._schedule = task, options, schedule
        self._optimizer, self._run, self._device = optimizer, run, device
        self._meter, self.epoch_meter = Meter(), Meter()
        precision = options.precision
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "fp32"
        self._autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
        )

    def to_the_end(self) -> None:
        """The loop over the steps that are left."""
        schedule, options, run = self._schedule, self._options, self._run
        if run.step == schedule.steps:
            return
        sampler = BatchSampler(schedule, options.seed, run.step, options.accumulation)
        batches = batches_of(self._task.data, sampler, options.loader_workers, self._device)
        self._begin_timing()
        size = schedule.batch_size
        with (
            contextlib.closing(batches),
            Progress(self._task.kind, schedule.steps * size, "image", run.step * size) as progress,
        ):
            while run.step < schedule.steps:
                rate = schedule.learning_rate(run.step)
                scalars = self._step(batches, rate)
                run.step += 1
                self._task.after_step(run.step / schedule.steps)
                self._meter.add(scalars)
                self.epoch_meter.add(scalars)
                progress.update(size, **self._after_step(rate))

    def _begin_timing(self) -> None:
        self._began, self._waited, self._began_step = time.monotonic(), 0.0, self._run.step

    def _step(self, batches: Iterator[Batch], rate: float) -> dict[str, Tensor]:
        """One optimiser step; its scalars, on the device."""
        task, options = self._task, self._options
        task.model.train()
        meter = Meter()
        for part in range(options.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - asked
            batch = {
                name: value.to(self._device, non_blocking=True) for name, value in batch.items()
            }
            # After the batch was fetched: that a loader starts takes random numbers too.
            seed = streams(options.seed, Purpose.TRAINING, part, self._run.step)
            torch.manual_seed(int(seed) >> 1)
            with self._autocast:
                loss, scalars = task.loss(batch)
            (loss / options.accumulation).backward()  # type: ignore[no-untyped-call]
            meter.add({"loss": loss, **scalars})
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if options.clip_gradients:
            nn.utils.clip_grads_with_norm_(parameters, options.clip_gradients, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {**meter.on_device(), "gradient_norm": norm}

    def _after_step(self, rate: float) -> dict[str, float]:
        """Log, finish the epoch and save, each where it is due; the figures that were read."""
        options, run, per_epoch = self._options, self._run, self._schedule.steps_per_epoch
        epoch, within = divmod(run.step, per_epoch)
        saves = bool(options.checkpoint_steps) and run.step % options.checkpoint_steps == 0
        if within and not saves and run.step % options.log_steps:
            return {}
        figures = self._meter.means()
        self._require_finite(figures)
        run.scalars({f"train/{name}": value for name, value in figures.items()})
        run.scalars({"train/learning_rate": rate, "train/epoch": run.step / per_epoch})
        self._meter = Meter()
        if not within:
            self._end_epoch(epoch, rate)
            saves = saves or epoch % options.checkpoint_epochs == 0
        if saves or run.step == self._schedule.steps:
            self._save()
        return figures

    def _require_finite(self, means: Mapping[str, float]) -> None:
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            options = self._options
            raise DamageError(
                f"{', '.join(broken)} is not finite within the {options.log_steps} steps before "
                f"step {self._run.step}: nothing was saved since the last checkpoint in "
                f"{options.output}; go on with a lower --base-learning-rate, --clip-gradients 1 or "
                "--precision fp32 in a new --output"
            )

    def _end_epoch(self, epoch: int, rate: float) -> None:
        run, seconds = self._run, max(time.monotonic() - self._began, 1e-9)
        images = (run.step - self._began_step) * self._schedule.batch_size
        self._task.model.eval()
        extra = self._task.finish_epoch(epoch, run)
        run.scalars({f"epoch/{name}": value for name, value in extra.items()})
        run.line(
            {
                "epoch": epoch,
                "step": run.step,
                **self.epoch_meter.means(),
                **extra,
                "learning_rate": rate,
                "images_per_second": images / seconds,
                "data_wait": self._waited / seconds,
                "seconds": seconds,
            }
        )
        self.epoch_meter = Meter()
        self._begin_timing()

    def _save(self) -> None:
        task, run, options = self._task, self._run, self._options
        state = _state_of(
            task, options, run.step, self._optimizer.state_dict(), self.epoch_meter.state()
        )
        self._require_finite(_largest(state["model"]))
        save_checkpoint(options.output, run.step, state)
        if options.keep_checkpoints:
            prune_checkpoints(options.output, options.keep_checkpoints)


def _largest(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude among all weights, NaN if one is."""
    norms = [w.detach().float().abs().max() for w in weights.values() if w.numel()]
    return {"weights": float(torch.stack(norms).max())} if norms else {}
