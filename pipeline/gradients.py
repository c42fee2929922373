"""The gradients of one optimiser step: every part of its batch forward and backward."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .feeding import Batch
from .parallel import Parallel, whole_tensor
from .randomness import Purpose, streams
from .runs import Meter
from .tasks import Task
from .throughput import Throughput


class Computed(NamedTuple):
    """What a step found, beside the gradients that the parameters hold.

    No part of the batch is kept: each holds open files of the loader's memory, or pinned memory.

    Attributes:
        losses: Of each part that this process computed, float32 (parts,), on the device.
        scalars: Means over them, on the device; ``loss`` among them.
    """

    losses: Tensor
    scalars: dict[str, Tensor]


class Gradients:
    """Computes gradients, which are functions of the weights, the batch and (seed, step) alone.

    Args:
        task: What trains; placed on the device.
        parallel: Its model.
        parts: Which parts of each batch this process computes.
        seed: Of the run.
        precision: Of the forward pass.
        device: Where it is computed.
        throughput: What counts the waits and the FLOPs.
    """

    def __init__(
        self,
        task: Task,
        parallel: Parallel,
        parts: range,
        seed: int,
        precision: Literal["fp32", "bf16"],
        device: torch.device,
        throughput: Throughput,
    ) -> None:
        self._task, self._parallel, self._parts = task, parallel, parts
        self._seed, self._device, self._throughput = seed, device, throughput
        self._autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
        )

    def of_step(self, batches: Iterator[Batch], step: int) -> Computed:
        """Take the next parts of a batch, and leave the means over them all in the parameters.

        Args:
            batches: From the loader, on the CPU.
            step: Steps done before, from 0.
        """
        meter, losses = Meter(), []
        for part in self._parts:
            with self._throughput.waiting():
                batch = next(batches)
            there = {
                name: value.to(self._device, non_blocking=True) for name, value in batch.items()
            }
            # After the batch was fetched: that a loader starts takes random numbers too.
            seed = streams(self._seed, Purpose.TRAINING, part, step)
            torch.manual_seed(int(seed) >> 1)
            last = part == self._parts[-1]
            with self._throughput.counted(), self._parallel.part_of_step(last):
                with self._autocast:
                    loss, scalars = self._parallel.run(partial(self._task.loss, there))
                (loss / len(self._parts)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach().float())
            meter.add({"loss": loss, **scalars})
        return Computed(torch.stack(losses), meter.on_device())


def norms_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The norm of each tensor, float32 (tensors,), whole where they are sharded.

    All processes must ask together.  Its own norm is torch's ``get_total_norm``, to the bit.
    """
    return whole_tensor(torch.stack(torch._foreach_norm(list(tensors.values()))))
