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
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.checkpoints import checkpoints, prune_checkpoints, save_checkpoint
from ..storage.dumps import dumps_folder
from . import ranks
from .averaging import Average
from .dumping import Step, dump
from .feeding import Batch, batches_of
from .gradients import Gradients, norms_of
from .guard import Guard, refuse_broken
from .options import TrainingOptions, choose_device, settled
from .parallel import Parallel
from .progress import Progress
from .resuming import (
    load_state,
    refuse_foreign_folder,
    state_of,
    state_to_resume,
    write_options,
)
from .run_images import keep_images
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
        samples_seen, options, data, images, meter, guard``, and ``ema`` if it is kept.

    Raises:
        SettingError: A setting cannot be, such as a batch larger than the data, or the folder
            holds a run and ``options.resume`` is ``never``.
        MismatchError: The folder holds a run with another configuration or other data, or the
            processes that train together see different ones.
        DamageError: Too many steps in a row had a loss or gradients that are not finite, weights
            are not, or the newest checkpoint cannot be read.
    """
    ranks.refuse_strangers(task.kind)
    refuse_missing_wandb(options)
    device, options = choose_device(options.device), settled(options)
    schedule = options.schedule(len(task.data))
    parts = options.batch_parts(ranks.count())
    refuse_foreign_folder(options.output, task.kind)
    state = state_to_resume(task, options)
    step = state["step"] if state else 0
    ranks.refuse_disagreement(
        {"images": len(task.data), "data": task.data.fingerprint, "newest checkpoint": step}
    )
    if state is not None:
        load_state(task.model.load_state_dict, state["model"], task, options.output)
    task.place(device)
    parallel = Parallel(task.model, device, options.sharding)
    optimizer = task.optimizer(options.peak_learning_rate, options)
    if state is not None:
        load = partial(parallel.load_optimizer, optimizer)
        load_state(load, state["optimizer"], task, options.output)
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
            if state is None:
                keep_images(folder, task.data)
            task.begin(folder)
            boards = wandb_boards(task, options)
        else:  # the logs of other processes are the first one's once more
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = stack.enter_context(Run(folder, step, boards))
        training = _Training(task, options, schedule, parts, parallel, optimizer, run, device)
        if state is not None:
            load_state(training.load_state, state, task, options.output)
        state = None  # as large as the run's own, and of no more use
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
    device, options = choose_device(options.device), settled(options)
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
        state = state_of(task, options, 0, task.model.state_dict(), {}, {"meter": {}})
        save_checkpoint(options.output, 0, state)
    ranks.wait()
    return checkpoints(options.output)[-1][1]


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
        precision = options.precision_on(device)
        self._throughput = Throughput(
            device,
            schedule.batch_size,
            mine,
            task.flops(schedule.batch_size // parts),
            peak_of(device, precision, options.peak_tflops),
        )
        self._gradients = Gradients(
            task, parallel, self._mine, options.seed, precision, device, self._throughput
        )
        folder = dumps_folder(options.output)
        self._guard = Guard(task.model, optimizer, device, options.skip_at_most, folder)
        self._average = Average(task.model, options.ema) if options.ema else None
        self._unsettled: Step | None = None
        facts = {"precision": precision, "device": device.type}
        self._dump = partial(
            dump,
            task=task,
            options=options,
            schedule=schedule,
            parallel=parallel,
            parts=self._mine,
            facts=facts,
        )
        names = {id(p): name for name, p in task.model.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._trained = {names[id(p)]: p for p in trained}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose weights and optimiser are loaded already."""
        self.epoch_meter.load_state(state["meter"], self._device)
        self._guard.load_state(state["guard"])
        if self._average is not None:
            self._average.load_state(state["ema"], self._parallel)

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
                kept = self._step(batches, rate)
                run.step += 1
                self._task.after_step(run.step / schedule.steps, kept)
                progress.update(size, **self._after_step(rate))

    def _step(self, batches: Iterator[Batch], rate: float) -> Tensor:
        """One optimiser step; 1 on the device, or 0 where it is skipped."""
        self._task.model.train()
        self._guard.remember()
        computed = self._gradients.of_step(batches, self._run.step)
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        norms = norms_of(gradients)
        norm = torch.linalg.vector_norm(norms)
        scalars = {**ranks.means(computed.scalars), "gradient_norm": norm}
        self._settle()  # while the weights are still those that the step before began with or left
        if self._options.clip_gradients:
            clip = self._options.clip_gradients
            nn.utils.clip_grads_with_norm_(self._trained.values(), clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        kept = self._guard.step(scalars["loss"], norm)
        self._optimizer.zero_grad(set_to_none=True)
        self._unsettled = Step(self._run.step + 1, computed, scalars, norms, list(gradients))
        return kept

    def _settle(self) -> None:
        """Count the last step, unless that was done; the host waits for its flag, not the device.

        A step that was skipped changed no weight, so it is dumped with those it was computed with.
        """
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        guard = self._guard
        if not guard.count():
            self._meter.add(step.scalars)
            self.epoch_meter.add(step.scalars)
            if self._average is not None:
                self._average.follow(step.number - guard.skipped)
            return
        if guard.dumps_next():
            first = step.number + 1 - guard.in_a_row
            path = self._dump(step, first, guard.before)
            print(f"step {step.number} is skipped, see {path}", file=sys.stderr)
        guard.refuse_more(step.number)

    def _after_step(self, rate: float) -> dict[str, float]:
        """Log, finish the epoch and save, each where it is due; the figures that were read."""
        options, run, per_epoch = self._options, self._run, self._schedule.steps_per_epoch
        epoch, within = divmod(run.step, per_epoch)
        saves = bool(options.checkpoint_steps) and run.step % options.checkpoint_steps == 0
        if within and not saves and run.step % options.log_steps:
            return {}
        self._settle()
        figures = self._meter.means()
        figures |= {"learning_rate": rate, "weight_norm": self._weight_norm()}
        figures["skipped"] = float(self._guard.skipped)
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

    @torch.no_grad()
    def _weight_norm(self) -> float:
        """Of all weights that train, as one vector."""
        return float(torch.linalg.vector_norm(norms_of(self._trained)))

    def _end_epoch(self, epoch: int, rate: float) -> None:
        run = self._run
        means = {**self.epoch_meter.means(), "learning_rate": rate, "skipped": self._guard.skipped}
        means |= self._throughput.epoch_figures(run.step)
        extra = self._parallel.examine(partial(self._task.finish_epoch, epoch, run))
        run.end_epoch(epoch, means, extra)
        self.epoch_meter = Meter()
        self._throughput.begin_epoch(run.step)

    def _save(self) -> None:
        task, run, options = self._task, self._run, self._options
        model, optimizer = self._parallel.states(self._optimizer)
        average = self._average.state(self._parallel) if self._average else None
        if ranks.rank() != 0:
            return
        refuse_broken(model, run.step, options.output)
        counts = {"meter": self.epoch_meter.state(), "guard": self._guard.state()}
        if average is not None:
            counts["ema"] = {**model, **average}
        state = state_of(task, options, run.step, model, optimizer, counts)
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
