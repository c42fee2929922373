"""`semmae stage2 replay`: a step whose loss or gradients were not finite, computed once more.

A dump holds the weights of its step, which the step did not change, and says which images, crops
and masks it saw.  These are made again, found to be the same, and go forward and backward as they
did in the run, part by part: no step is done and nothing is written.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, SettingError
from ..models.autoencoder import MaskedAutoencoder
from ..pipeline.dumping import arrays_of
from ..pipeline.feeding import Batch
from ..pipeline.gradients import Gradients, norms_of
from ..pipeline.loaders import PretrainingData
from ..pipeline.options import choose_device
from ..pipeline.parallel import Parallel
from ..pipeline.schedule import BatchSampler
from ..pipeline.throughput import Throughput
from ..storage.dumps import Dump, read_dump
from ..storage.store_paths import StorePath, store_path
from .pretrain import Pretraining, PretrainOptions, pretraining_data

NAMED = 3
"""Tensors that are named of those that are not finite."""


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Settings of `replay`."""

    dump: Annotated[Path, "Dump of a step: RUN/non-finite/step-*.json."]
    data: Annotated[str | None, "The run's images, if they lie elsewhere now."] = None
    parts: Annotated[StorePath | None, "Its part store, likewise."] = None
    device: Annotated[str, "cuda, cpu; auto takes a GPU where there is one."] = "auto"


@dataclass(frozen=True)
class Replayed:
    """What a step gave when it was computed again.

    Attributes:
        losses: Of each part of its batch.
        norms: Of each gradient, by name.
        broken: The first module whose output was not finite, None if all were.
    """

    losses: list[float]
    norms: dict[str, float]
    broken: str | None


def replay(options: ReplayOptions) -> dict[str, Any]:
    """Compute the step of a dump again.

    Args:
        options: The settings.

    Returns:
        What it gave beside what it gave in the run, to be printed.

    Raises:
        SettingError: The dump is of another command's run.
        MismatchError: Images or masks are no longer those of the step.
        MissingError: Dump, images or store are not there.
        DamageError: The dump is not what was written.
    """
    dump = read_dump(options.dump)
    record, again = dump.record, replayed(dump, options)
    then = [float(loss) for loss in record["losses"]]
    norms = {name: float(norm) for name, norm in record["gradient_norms"].items()}
    now = [again.norms[name] for name in norms]
    same = _same(then, again.losses) and _same(list(norms.values()), now)
    return {
        "step": record["step"],
        "images": len(record["samples"]),
        "loss in the run": _means(then),
        "loss now": _means(again.losses),
        "gradients in the run": _broken(norms),
        "gradients now": _broken(again.norms),
        "first output not finite": again.broken or "none",
        "the same to the bit": "yes" if same else "no",
    }


def _same(one: list[float], other: list[float]) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def _means(losses: list[float]) -> str:
    broken = sum(not math.isfinite(loss) for loss in losses)
    return f"{np.mean(losses):.6g}; not finite in {broken} of {len(losses)} parts of the batch"


def _broken(norms: dict[str, float]) -> str:
    found = [name for name, norm in norms.items() if not math.isfinite(norm)]
    named = f": {', '.join(found[:NAMED])}{', ...' if len(found) > NAMED else ''}" if found else ""
    return f"{len(found)} of {len(norms)} not finite{named}"


def replayed(dump: Dump, options: ReplayOptions) -> Replayed:
    """Compute the step of a dump again; raises as `replay`."""
    record = dump.record
    if record["kind"] != Pretraining.kind:
        raise SettingError(
            f"{options.dump} is a step of a {record['kind']!r} run: expected one of `semmae stage2 "
            "pretrain`; other runs go through it again from their newest checkpoint"
        )
    settings = _settings(record["options"], options)
    data = pretraining_data(settings)
    if data.fingerprint != record["data"]:
        raise MismatchError(
            f"the images or part store of {options.dump} are others now: restore them, or say by "
            "--data and --parts where they are"
        )
    model = MaskedAutoencoder(settings.architecture(), settings.normalise_target)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in dump.weights.items()})
    task, device = Pretraining(model, data, settings), choose_device(options.device)
    task.place(device)
    model.train()
    parts, before = range(len(record["losses"])), record["step"] - 1
    parallel = Parallel(model, device, "none")
    unwatched = Throughput(device, settings.batch_size, len(parts), flops=0)
    precision = record["precision"]
    gradients = Gradients(task, parallel, parts, settings.seed, precision, device, unwatched)
    broken: list[str] = []
    _watch(model, broken)
    losses = gradients.of_step(_batches(dump, data, settings, len(parts)), before).losses
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = dict(zip(found, norms_of(found).tolist(), strict=True))
    return Replayed(losses.tolist(), norms, broken[0] if broken else None)


def _settings(recorded: dict[str, Any], options: ReplayOptions) -> PretrainOptions:
    """The options of the run as they stand in the dump, its data where they are now."""
    parts = options.parts or (store_path(recorded["parts"]) if recorded["parts"] else None)
    known = {field.name for field in dataclasses.fields(PretrainOptions)}
    taken = {name: value for name, value in recorded.items() if name in known}
    taken |= {"output": Path(recorded["output"]), "parts": parts}
    # One process, and uncompiled: the outputs of modules are looked at.
    taken |= {"launcher": "auto", "workers": 0, "address": None, "sharding": "none"}
    taken |= {"compile": False}
    return PretrainOptions(**taken | {"data": options.data or recorded["data"]})


def _batches(
    dump: Dump, data: PretrainingData, settings: PretrainOptions, parts: int
) -> Iterator[Batch]:
    """The parts of the batch, made again, each found to be what the run saw."""
    before = dump.record["step"] - 1
    sampler = BatchSampler(settings.schedule(len(data)), settings.seed, before, parts)
    size = settings.batch_size // parts
    for part, draws in zip(range(parts), sampler, strict=False):
        batch = data.__getitems__(draws)
        seen = slice(part * size, (part + 1) * size)
        for name, made in arrays_of(batch).items():
            per_sample = (made == dump.arrays[name][seen]).reshape(size, -1).all(axis=1)
            if not per_sample.all():
                key = dump.record["samples"][part * size + int(np.argmin(per_sample))]
                raise MismatchError(
                    f"{name.partition('.')[0]} of {key} differ from those that step "
                    f"{dump.record['step']} saw: expected the same file, decoded by the same "
                    "libraries"
                )
        yield batch


def _watch(model: nn.Module, broken: list[str]) -> None:
    """Have every module put its name down when its output is not finite."""

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            broken.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name or "loss": look(name, output))
