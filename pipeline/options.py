"""What every training command takes, and how options are checked, compared and recorded."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from ..errors import MismatchError, SettingError
from ..storage.remote_path import RemotePath
from .schedule import Schedule

if TYPE_CHECKING:
    import torch

O = TypeVar("O", bound="TrainingOptions")  # noqa: E741


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise a `SettingError` that names the option, unless the condition holds."""
    if not holds:
        raise SettingError(f"{_flag(name)} is {value}: expected {expected}")


def require_finite(options: object) -> None:
    """Raise a `SettingError` that names the first option that is NaN or infinite."""
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        require(not isinstance(value, float) or math.isfinite(value), field.name, value, "finite")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every training command takes."""

    output: Annotated[Path, "Folder of the run: checkpoints, logs, pictures."]
    epochs: Annotated[int, "Passes over the data."] = 100
    batch_size: Annotated[int, "Images an optimiser step."] = 256
    micro_batch: Annotated[
        int, "Most images that a device computes at once; 0: its whole share of the batch."
    ] = 0
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 1.5e-4
    warmup_epochs: Annotated[float, "Epochs of linear warm-up; a cosine to 0 follows."] = 0.0
    weight_decay: Annotated[float, "AdamW's weight decay; none on biases and norms."] = 0.05
    clip_gradients: Annotated[float, "Largest gradient norm; 0 does not clip."] = 0.0
    skip_at_most: Annotated[
        int, "Steps in a row that may be skipped, where loss or gradients are not finite."
    ] = 10
    ema: Annotated[
        float, "Decay of a moving average of the weights, such as 0.9999; 0 keeps none."
    ] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], "Of the forward pass; auto is bf16 on GPUs, fp32 on CPUs."
    ] = "auto"
    device: Annotated[str, "cuda, cpu, ...; auto takes a GPU where there is one."] = "auto"
    loader_workers: Annotated[int, "Processes that decode images; 0 decodes in the trainer."] = 2
    seed: Annotated[int, "Of weights, order, crops and masks."] = 0
    resume: Annotated[
        Literal["auto", "never"],
        "auto: go on from the newest checkpoint in the output folder, if there is one; never: "
        "refuse a folder that holds a run.",
    ] = "auto"
    checkpoint_epochs: Annotated[int, "Epochs between checkpoints."] = 1
    checkpoint_steps: Annotated[int, "Steps between further checkpoints; 0 writes none."] = 0
    keep_checkpoints: Annotated[int, "Newest checkpoints kept; 0 keeps all."] = 2
    keep_every: Annotated[
        int, "Every how many checkpoints one is kept for good, beside the newest; 0: none is."
    ] = 0
    log_steps: Annotated[int, "Steps between two points of the logs."] = 20
    wandb: Annotated[
        str | None, "Project of Weights & Biases that the logs go to, too (extra wandb)."
    ] = None
    peak_tflops: Annotated[
        float,
        "What a device can do at most, TFLOP/s, for its utilisation in the logs; 0: what is known "
        "of its kind, if anything.",
    ] = 0.0
    launcher: Annotated[
        Literal["auto", "ray"],
        "auto: this process, or those that torchrun started; ray: --workers processes, by Ray "
        "Train.",
    ] = "auto"
    workers: Annotated[int, "Processes of --launcher ray, one GPU (or CPU) each."] = 0
    address: Annotated[
        str | None, "Of a running Ray cluster; by default Ray starts on this machine."
    ] = None
    sharding: Annotated[
        Literal["none", "fsdp"],
        "Of weights and optimiser over the processes: none: each holds all; fsdp: each a share.",
    ] = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range; the message names it and its value.
        """
        require_finite(self)
        for name in ("epochs", "batch_size", "checkpoint_epochs", "log_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "loader_workers",
            "seed",
            "checkpoint_steps",
            "keep_checkpoints",
            "keep_every",
            "micro_batch",
            "skip_at_most",
            "workers",
        ):
            require(0 <= getattr(self, name) < 2**63, name, getattr(self, name), "0 to 2**63 - 1")
        for name in ("warmup_epochs", "weight_decay", "clip_gradients", "peak_tflops"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.ema < 1, "ema", self.ema, "from 0 to below 1")
        rate = self.base_learning_rate
        require(rate > 0, "base_learning_rate", rate, "above 0")
        expected = "auto, fp32 or bf16"
        require(self.precision in ("auto", "fp32", "bf16"), "precision", self.precision, expected)
        if self.launcher == "ray":
            require(self.workers >= 1, "workers", self.workers, "at least 1 with --launcher ray")
        elif self.workers or self.address is not None:
            raise SettingError(
                "--workers and --address are for --launcher ray: expected that flag too, or "
                "`torchrun --nproc-per-node N -m semmae ...` in their place"
            )
        self.batch_parts(self.workers or 1)

    def batch_parts(self, processes: int) -> int:
        """How many equal parts each batch is computed in, those of all processes together.

        A part holds ``micro_batch`` images, whatever the number of processes, unless a process's
        share of the batch is smaller or no multiple of it: then the next divisor of that share.

        Raises:
            SettingError: The batch cannot be shared out like that, or in parts of less than half
                of what was asked for only.
        """
        share, left = divmod(self.batch_size, processes)
        expected = f"a multiple of the {processes} processes"
        require(share > 0 and not left, "batch_size", self.batch_size, expected)
        most = min(self.micro_batch or share, share)
        size = next(size for size in range(most, 0, -1) if share % size == 0)
        if 2 * size < most:
            each = f"the {share} images of each process" if processes > 1 else "--batch-size"
            whole = f"--batch-size is {self.batch_size}"
            raise SettingError(
                f"--micro-batch is {most} and {whole}: expected a divisor of {each}, of which "
                f"{size} is the largest below; 0 computes all of a device's images at once"
            )
        return self.batch_size // size

    def precision_on(self, device: "torch.device") -> Literal["fp32", "bf16"]:
        """The precision of the forward pass there."""
        if self.precision == "auto":
            return "bf16" if device.type == "cuda" else "fp32"
        return self.precision

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.base_learning_rate * self.batch_size / 256

    def schedule(self, images: int) -> Schedule:
        """The steps of a run over so many images.

        Raises:
            SettingError: They do not fill one batch.
        """
        return Schedule(
            images, self.batch_size, self.epochs, self.warmup_epochs, self.peak_learning_rate
        )


FREE_ON_RESUME = frozenset(
    {
        "output",
        "data",
        "parts",
        "device",
        "loader_workers",
        "resume",
        "checkpoint_epochs",
        "checkpoint_steps",
        "keep_checkpoints",
        "log_steps",
        "wandb",
        "peak_tflops",
        "recompute",
        "micro_batch",
        "keep_every",
        "launcher",
        "workers",
        "address",
        "sharding",
        "skip_at_most",
    }
)
"""Options that may differ when a run goes on: what is computed does not follow from them (images
and part store are compared by fingerprint, so they may have moved)."""


def training_settings(options: object) -> dict[str, Any]:
    """The fields of `TrainingOptions` that the options of a command have."""
    names = [field.name for field in fields(TrainingOptions)]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def plain_options(options: object) -> dict[str, Any]:
    """The fields of an options dataclass as plain JSON data."""
    return {
        field.name: _plain(getattr(options, field.name))
        for field in fields(options)  # type: ignore[arg-type]
    }


def refuse_difference(
    run: Path, kind: str, old: Mapping[str, Any], new: Mapping[str, Any], *, options: bool
) -> None:
    """Refuse to go on with a run by another configuration.

    Args:
        run: Folder of the run.
        kind: What it trains, for the message.
        old: Plain data that the run was started with.
        new: The same of now.
        options: Whether these are options of a command, of which some are free
            (`FREE_ON_RESUME`); else the shapes of a network, of which none is.

    Raises:
        MismatchError: They differ; the message names each difference, old and new.
    """
    names = sorted((old.keys() | new.keys()) - (FREE_ON_RESUME if options else frozenset()))
    differing = [
        f"{_flag(name) if options else name} was {old.get(name)}, is {new.get(name)}"
        for name in names
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise MismatchError(
            f"the {kind} run in {run} was started otherwise: {'; '.join(differing)}; "
            "take the old values, or another --output for a new run"
        )


def parse_sides(option: int | str) -> tuple[int, int]:
    """(down, across) of the side of a square, such as 14, or of two such as ``"14x20"``.

    Args:
        option: Numbers may come as text.

    Returns:
        (-1, -1) where it is neither.
    """
    match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*x\s*([0-9]{1,5}))?\s*", str(option))
    return (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)


def choose_device(name: str) -> "torch.device":
    """The device of a name; ``auto`` is a GPU where there is one.

    Where a launcher started several processes, each has the GPU of its number on its machine, by
    index, as NCCL wants it.

    Raises:
        SettingError: There is no such device here.
    """
    import torch

    from .ranks import asked

    several = asked() > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if several and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"--device is {name}: expected auto, cpu, cuda or cuda:N")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        advice = "start as many processes, or use cpu" if several else "use auto or cpu"
        if several and there == 1:
            advice = f"use cuda:0 where the launcher gives each process its own, else {advice}"
        raise SettingError(f"--device is {name}, but the CUDA devices here are {there}: {advice}")
    return device


def settled(options: O) -> O:
    """The options as a run keeps and compares them: with the precision that ``auto`` is here.

    Raises:
        SettingError: There is no such device here.
    """
    return replace(options, precision=options.precision_on(choose_device(options.device)))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(value: object) -> object:
    if isinstance(value, Path | RemotePath):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
