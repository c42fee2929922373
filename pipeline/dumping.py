"""What is dumped of a step whose loss or gradients were not finite."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage.checkpoints import checkpoints
from ..storage.dumps import write_dump
from . import ranks
from .feeding import Batch, Named
from .gradients import Computed, norms_of
from .options import TrainingOptions, plain_options
from .parallel import Parallel
from .schedule import Schedule, indices
from .tasks import Task

SMALL = 4096
"""Bytes of a sample up to which an array of a batch is dumped: masks are, pixels are not."""


class Step(NamedTuple):
    """A step that was computed, until it is known whether it counts.

    Attributes:
        number: From 1, as the logs count.
        computed: What it found.
        scalars: Means over all processes, on the device, the gradient's norm among them.
        norms: Of each gradient, float32 (gradients,), on the device.
        names: Of these gradients.
    """

    number: int
    computed: Computed
    scalars: dict[str, Tensor]
    norms: Tensor
    names: Sequence[str]


def arrays_of(batch: Batch) -> dict[str, NDArray[Any]]:
    """What is dumped of a batch, or of a part of one.

    Returns:
        Its small arrays; of larger ones, under their name with ``.crc32``, the CRC-32 of each
        sample, uint32 (B,), which tell whether it was made again to the bit.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, tensor in batch.items():
        array = np.ascontiguousarray(tensor.numpy())
        if not array.nbytes or array.nbytes // len(array) <= SMALL:
            found[name] = array
        else:
            sums = [zlib.crc32(sample) for sample in array]
            found[f"{name}.crc32"] = np.array(sums, dtype=np.uint32)
    return found


def dump(
    step: Step,
    first: int,
    buffers: Mapping[str, Tensor],
    task: Task,
    options: TrainingOptions,
    schedule: Schedule,
    parallel: Parallel,
    parts: range,
    facts: Mapping[str, Any],
) -> Path | None:
    """Dump a step; all processes must do it together, before a weight is changed.

    Args:
        step: The step.
        first: First of the row of skipped steps that it is in.
        buffers: Those of the model before the step, by name.
        task: What trains.
        options: Of the run.
        schedule: Of the run.
        parallel: The task's model.
        parts: Which parts of the batch this process computed; they are made again.
        facts: What else to say of how it was computed.

    Returns:
        The dump; None in other processes than the first.
    """
    computed, weights = step.computed, dict(task.model.named_parameters())
    with torch.no_grad():
        magnitudes = norms_of(weights).tolist()
    state = task.model.state_dict()
    state = parallel.gathered({name: buffers.get(name, value) for name, value in state.items()})
    before, per_epoch = step.number - 1, schedule.steps_per_epoch
    draws = schedule.draws(before, schedule.permutation(options.seed, before // per_epoch))
    size = len(draws) // (len(parts) * ranks.count())
    made = [
        arrays_of(task.data.__getitems__(draws[part * size : (part + 1) * size])) for part in parts
    ]
    mine = {name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]}
    shares = ranks.of_all((mine, computed.losses.tolist()))
    if ranks.rank() != 0:
        return None
    drawn = indices(draws)
    found = checkpoints(options.output)
    record = {
        "kind": task.kind,
        "step": step.number,
        "epoch": before // per_epoch + 1,
        "learning_rate": schedule.learning_rate(before),
        "seed": options.seed,
        "losses": [loss for _, losses in shares for loss in losses],
        "scalars": {name: float(value) for name, value in step.scalars.items()},
        "gradient_norms": dict(zip(step.names, step.norms.tolist(), strict=True)),
        "weight_norms": dict(zip(weights, magnitudes, strict=True)),
        "samples": task.data.names(drawn) if isinstance(task.data, Named) else drawn.tolist(),
        "newest_checkpoint": found[-1][1].name if found else None,
        "processes": ranks.count(),
        **facts,
        "options": plain_options(options),
        "architecture": task.architecture,
        "data": task.data.fingerprint,
    }
    arrays = {name: np.concatenate([share[name] for share, _ in shares]) for name in mine}
    tensors = {name: tensor.cpu().numpy() for name, tensor in state.items()}
    return write_dump(options.output, step.number, first, record, arrays, tensors)
