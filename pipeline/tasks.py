"""What the trainer is told of a thing to train."""

import abc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .feeding import Batch, TrainingData
from .options import TrainingOptions
from .runs import Run


class Task(abc.ABC):
    """What is trained, on what, by which loss.

    Attributes:
        kind: Name of the task; written into checkpoints.
        model: Everything that trains, and everything that a checkpoint holds; the loss of every
            batch gives each parameter that requires one a gradient (DDP on GPUs waits for all).
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

        Of a step that is skipped (`guard`), buffers of the model that this changed are put back.

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
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def begin(self, folder: Path) -> None:  # noqa: B027 (most tasks have nothing to do)
        """Called once the folder is found fit for the run, before its first step."""

    def after_step(self, progress: float, kept: Tensor) -> None:  # noqa: B027 (as above)
        """Called after each optimiser step.

        Args:
            progress: Share of the run's steps that are done, above 0, at most 1.
            kept: 1, or 0 where loss or gradients are not finite and nothing may change; a float32
                scalar on the device, which would be waited for if it were read.
        """

    def flops(self, images: int) -> int | None:
        """FLOPs (`pipeline.flops`) of the loss of so many images and of its gradients.

        None: they are counted while the first ones are computed.  A network that is compiled, or
        that computes anything twice, should tell.
        """
        return None

    def figures(self) -> dict[str, float]:
        """Called at each point of the logs: further figures since the last one.

        Where several processes train, each calls it.
        """
        return {}

    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Called after each epoch (from 1): draw pictures, validate; figures go into the log.

        Where several processes train, each calls it; only the first one's ``run`` is kept.
        """
        return {}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases, norms and single tokens do not.

    Ours: the released code lets the class and the mask token decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [p for p in trained if _directions(p) <= 1]
    matrices = [p for p in trained if _directions(p) > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _directions(parameter: nn.Parameter) -> int:
    return sum(size > 1 for size in parameter.shape)
