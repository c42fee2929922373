"""The one trainer: it serves encoder, part learner, pretraining and evaluation heads.

A `Task` gives the modules, the data and the loss; `fit` gives precision, accumulation, schedules,
logs, checkpoints and resume.  What a step computes is a function of the weights before it and of
(seed, step) alone: the order of an epoch is one global permutation, each sample is made from its
`Draw`, and torch's generators are seeded afresh from (seed, step).  So a run that was interrupted
and resumed goes through the same batches, masks and losses, to the bit, as one that was not, and a
checkpoint needs to hold no generator state.

Where a launcher started several processes (`launching`), each calls `fit` alike and computes its
parts of every batch; losses and gradients are the means over all.
"""

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DamageError, MismatchError
from ..storage.checkpoints import checkpoints, prune_checkpoints, save_checkpoint
from . import ranks
from .feeding import Batch, batches_of
from .options import TrainingOptions, choose_device, plain_options
from .parallel import Parallel, whole_tensor
from .progress import Progress
from .randomness import Purpose, streams
from .resuming import refuse_foreign_folder, state_to_resume, write_options
from .runs import Meter, Run
from .schedule import BatchSampler, Schedule
from .tasks import Task
from .throughput import Throughput, peak_of
from .wandb_log import refuse_missing_wandb, wandb_boards


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
            holds a run and ``options.resume`` is ``never``.
        MismatchError: The folder holds a run with another configuration or other data, or the
            processes that train together see different ones.
        DamageError: Loss, gradients or weights are no longer finite, or the newest checkpoint
            cannot be read.
    """
    ranks.refuse_strangers(task.kind)
    refuse_missing_wandb(options)
    device = choose_device(options.device)
    schedule = options.schedule(len(task.data))
    parts = options.batch_parts(ranks.count())
    refuse_foreign_folder(options.output, task.kind)
    state = state_to_resume(task, options)
    step = state["step"] if state else 0
    ranks.refuse_disagreement(
        {"images": len(task.data), "data": task.data.fingerprint, "newest checkpoint": step}
    )
    if state is not None:
        _load(task.model.load_state_dict, state["model"], task, options.output)
    task.place(device)
    parallel = Parallel(task.model, device, options.sharding)
    optimizer = task.optimizer(options.peak_learning_rate, options)
    if state is not None:
        held = state["optimizer"]
        _load(lambda s: parallel.load_optimizer(optimizer, s), held, task, options.output)
    if options.warmup_epochs > options.epochs:
        print(
            f"--warmup-epochs {options.warmup_epochs:g} is more than --epochs {options.epochs}: "
            "the learning rate will not reach its peak",
            file=sys.stderr,
        )
    with contextlib.ExitStack() as stack:
        folder, boards = options.output, []
        if ranks.rank() == 0:
            write_options(task, options)
            task.begin(folder)
            boards = wandb_boards(task, options)
        else:  # the logs of other processes are the first one's once more
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = stack.enter_context(Run(folder, step, boards))
        training = _Training(task, options, schedule, parts, parallel, optimizer, run, device)
        if state is not None:
            training.epoch_meter.load_state(state["meter"], device)
        training.to_the_end()
    ranks.wait()
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
    ranks.refuse_strangers(task.kind)
    refuse_missing_wandb(options)
    device = choose_device(options.device)
    refuse_foreign_folder(options.output, task.kind)
    state = state_to_resume(task, options)
    ranks.wait()
    if state is None and ranks.rank() == 0:
        task.place(device)
        write_options(task, options)
        task.begin(options.output)
        with Run(options.output, 0, wandb_boards(task, options)) as run:
            task.model.eval()
            run.end_epoch(0, {}, task.finish_epoch(0, run))
        save_checkpoint(
            options.output, 0, _state_of(task, options, 0, task.model.state_dict(), {}, {})
        )
    ranks.wait()
    return checkpoints(options.output)[-1][1]


def _state_of(
    task: Task,
    options: TrainingOptions,
    step: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    meter: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "kind": task.kind,
        "architecture": task.architecture,
        "model": model,
        "optimizer": optimizer,
        "step": step,
        "samples_seen": step * options.batch_size,
        "options": plain_options(options),
        "data": task.data.fingerprint,
        "images": len(task.data),
        "meter": meter,
    }


def _load(
    load: Callable[[Mapping[str, Any]], object], state: Mapping[str, Any], task: Task, folder: Path
) -> None:
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise MismatchError(
            f"the newest checkpoint in {folder} holds other weights than this {task.kind} run "
            "trains: go on with the version of semmae that wrote it, or choose another --output"
        ) from error


class _Training:
    """A run under way."""

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        schedule: Schedule,
        parts: int,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        run: Run,
        device: torch.device,
    ) -> None:
        self._task, self._options, self._schedule = task, options, schedule
        self._optimizer, self._run, self._device = optimizer, run, device
        self._parallel, self._parts = parallel, parts
        mine = parts // ranks.count()
        self._mine = range(ranks.rank() * mine, (ranks.rank() + 1) * mine)
        self._meter, self.epoch_meter = Meter(), Meter()
        precision = options.precision
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "fp32"
        self._autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
        )
        self._throughput = Throughput(
            device,
            schedule.batch_size,
            mine,
            task.flops(schedule.batch_size // parts),
            peak_of(device, precision, options.peak_tflops),
        )

    def to_the_end(self) -> None:
        """The loop over the steps that are left."""
        schedule, options, run = self._schedule, self._options, self._run
        if run.step == schedule.steps:
            return
        sampler = BatchSampler(schedule, options.seed, run.step, self._parts, self._mine)
        batches = batches_of(self._task.data, sampler, options.loader_workers, self._device)
        self._throughput.begin(run.step)
        self._throughput.begin_epoch(run.step)
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

    def _step(self, batches: Iterator[Batch], rate: float) -> dict[str, Tensor]:
        """One optimiser step; its scalars, on the device."""
        task, options = self._task, self._options
        task.model.train()
        meter = Meter()
        for part in self._mine:
            with self._throughput.waiting():
                batch = next(batches)
            batch = {
                name: value.to(self._device, non_blocking=True) for name, value in batch.items()
            }
            # After the batch was fetched: that a loader starts takes random numbers too.
            seed = streams(options.seed, Purpose.TRAINING, part, self._run.step)
            torch.manual_seed(int(seed) >> 1)
            last = part == self._mine[-1]
            with self._throughput.counted(), self._parallel.part_of_step(last):
                with self._autocast:
                    loss, scalars = self._parallel.run(partial(task.loss, batch))
                (loss / len(self._mine)).backward()  # type: ignore[no-untyped-call]
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
        return {**ranks.means(meter.on_device()), "gradient_norm": whole_tensor(norm)}

    def _after_step(self, rate: float) -> dict[str, float]:
        """Log, finish the epoch and save, each where it is due; the figures that were read."""
        options, run, per_epoch = self._options, self._run, self._schedule.steps_per_epoch
        epoch, within = divmod(run.step, per_epoch)
        saves = bool(options.checkpoint_steps) and run.step % options.checkpoint_steps == 0
        if within and not saves and run.step % options.log_steps:
            return {}
        figures = self._meter.means()
        self._require_finite(figures)
        figures |= {"learning_rate": rate, "weight_norm": self._weight_norm()}
        speed = self._throughput.figures(run.step)
        run.point(run.step / per_epoch, {**figures, **self._task.figures()}, speed)
        self._meter = Meter()
        if not within:
            self._end_epoch(epoch, rate)
            saves = saves or epoch % options.checkpoint_epochs == 0
        if saves or run.step == self._schedule.steps:
            self._save()
        self._throughput.begin(run.step)
        return {**figures, **speed}

    def _weight_norm(self) -> float:
        """Of all weights that train, as one vector."""
        trained = [p.detach() for group in self._optimizer.param_groups for p in group["params"]]
        return float(whole_tensor(nn.utils.get_total_norm(trained)))

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
        run = self._run
        means = {**self.epoch_meter.means(), "learning_rate": rate}
        means |= self._throughput.epoch_figures(run.step)
        extra = self._parallel.examine(partial(self._task.finish_epoch, epoch, run))
        run.end_epoch(epoch, means, extra)
        self.epoch_meter = Meter()
        self._throughput.begin_epoch(run.step)

    def _save(self) -> None:
        task, run, options = self._task, self._run, self._options
        model, optimizer = self._parallel.states(self._optimizer)
        if ranks.rank() != 0:
            return
        self._require_finite(_largest(model))
        state = _state_of(task, options, run.step, model, optimizer, self.epoch_meter.state())
        save_checkpoint(options.output, run.step, state)
        if options.keep_checkpoints:
            prune_checkpoints(options.output, options.keep_checkpoints, self._kept_for_good)

    def _kept_for_good(self, step: int) -> bool:
        options, due = self._options, self._schedule.checkpoints
        if not options.keep_every:
            return False
        every = options.checkpoint_epochs, options.checkpoint_steps
        number = due(step, *every)
        return number > due(step - 1, *every) and number % options.keep_every == 0


def _largest(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude among all weights, NaN if one is."""
    norms = [w.detach().float().abs().max() for w in weights.values() if w.numel()]
    return {"weights": float(torch.stack(norms).max())} if norms else {}
