import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from semmae.errors import MemoryFullError, UserError
from semmae.pipeline.feeding import Batch
from semmae.pipeline.launching import launch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.schedule import Draw
from semmae.pipeline.training import fit
from semmae.tests.pipeline.tiny import TinyData, TinyTask, options

pytestmark = pytest.mark.usefixtures("one_thread")


class FullTask(TinyTask):
    """A task whose third loss finds no memory."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.calls == 2:
            raise self.error
        return super().loss(batch)


def train(given: TrainingOptions, error: Exception) -> Path:
    return fit(FullTask(error), given)


def met(error: Exception, output: Path, **changes: Any) -> str:
    """What is said where a run meets an error."""
    with pytest.raises(MemoryFullError) as raised:
        launch(partial(train, error=error), options(output, **changes))
    assert isinstance(raised.value, UserError)
    return str(raised.value)


ON = "; the same command goes on from the newest checkpoint"
DEVICE = "the memory of the device ran out: --micro-batch is "


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("batch", "micro", "said"),
    [
        (4, 0, "0, so 4 images are computed at once; try --micro-batch 2"),
        (4, 2, "2; try --micro-batch 1"),
        (18, 6, "6; try --micro-batch 3"),
        (15, 0, "0, so 15 images are computed at once; try --micro-batch 5"),
        (4, 1, "1, and one image at a time is the least; take a smaller network"),
    ],
)
def test_memory_faults__of_a_device_name_the_micro_batch(
    error: Exception, batch: int, micro: int, said: str, tmp_path: Path
) -> None:
    assert met(error, tmp_path, batch_size=batch, micro_batch=micro) == DEVICE + said + ON


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_memory_faults__of_the_machine_name_the_loader_workers_too(
    error: Exception, tmp_path: Path
) -> None:
    said = met(error, tmp_path, loader_workers=0)
    assert said.startswith("the memory of the machine ran out: --micro-batch is 0, so 4 images")
    assert "or fewer --loader-workers than 0" in said


class KilledData(TinyData):
    """Data whose loader worker is killed at the fourth batch, as by a machine without memory."""

    def __getitems__(self, draws: list[Draw]) -> Batch:
        if draws[0].progress > 3 / 22:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(draws)


def train_on_killed(given: TrainingOptions) -> Path:
    return fit(TinyTask(KilledData()), given)


KILLED = (
    r"DataLoader worker \(pid.*\).* (killed by signal: Killed|exited unexpectedly).*: expected "
    r"memory for --loader-workers 2, which most likely ran out, if nothing else ended it; try 1, "
    r"and the same command"
)


def test_memory_faults__a_loader_worker_that_was_killed_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(MemoryFullError, match=KILLED):
        launch(train_on_killed, options(tmp_path, loader_workers=2))


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), EOFError()])
def test_memory_faults__a_loader_worker_whose_batch_cannot_be_fetched_is_told_of(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is killed between making a batch and handing it over."""

    def gone(loader: object) -> None:
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", gone)
    with pytest.raises(MemoryFullError, match=KILLED):
        launch(partial(train, error=error), options(tmp_path, loader_workers=2))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), ZeroDivisionError(), OSError(errno.EIO, "I/O")]
)
def test_memory_faults__other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised:
        launch(partial(train, error=error), options(tmp_path))
    assert raised.value is error
