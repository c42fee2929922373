"""Batches from loader workers to the trainer."""

import multiprocessing
import os
import socket
import sys
from collections import Counter
from collections.abc import Generator
from fractions import Fraction
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from . import ranks
from .schedule import BatchSampler, Draw

Batch = dict[str, Tensor]


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


@runtime_checkable
class Warming(Protocol):
    """Training data that forked workers can share what it keeps in memory."""

    def warm(self) -> None:
        """Load it; called once, before workers start."""
        ...


@runtime_checkable
class Named(Protocol):
    """Training data whose samples have names, to tell of them by."""

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """Of the samples of some indices."""
        ...


@runtime_checkable
class Sourced(Protocol):
    """Training data made of several things that can change each by itself."""

    @property
    def sources(self) -> dict[str, str]:
        """Their fingerprints by name, images among them."""
        ...


def sources_of(data: TrainingData) -> dict[str, str]:
    """What tells data from others, by name."""
    return data.sources if isinstance(data, Sourced) else {"images": data.fingerprint}


def batches_of(
    data: TrainingData, sampler: BatchSampler, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of the rest of a run, in order, on the CPU.

    Args:
        data: Where they come from.
        sampler: Which draws.
        workers: Processes that make them ahead of their use, at most one a processor, which is
            said where they are more; 0 makes them when asked.
        device: Where they go; for a GPU they are put into pinned memory.

    Yields:
        One batch a list of draws.  Close the generator to end the workers.

    Raises:
        UserError: What the data raised, in a worker too.
    """
    if isinstance(data, Warming):
        data.warm()
    most = _processors()
    if workers > most:  # they would only take turns
        print(
            f"--loader-workers is {workers}: {most} are started, as many as there are processors "
            "for each process that trains",
            file=sys.stderr,
        )
        workers = most
    # Forked workers share what lies in memory; elsewhere than on Linux a fork is not safe.
    context = multiprocessing.get_context("fork") if workers and sys.platform == "linux" else None
    loader: DataLoader[Any] = DataLoader(
        _Carrying(data),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_worker,
        multiprocessing_context=context,
    )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:
        # A batch is fetched from the worker that made it; torch looks only later whether it lives.
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error


def _processors() -> int:
    """How many processors this process may use, its share of those that other ranks may, too.

    All ranks must ask together.  Some launchers give each rank its own, others all to all.
    """
    everywhere = range(os.cpu_count() or 1)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(everywhere)
    machine = socket.gethostname()
    found = ranks.of_all((machine, mine))
    users = Counter(cpu for name, theirs in found if name == machine for cpu in theirs)
    return max(int(sum(Fraction(1, users[cpu]) for cpu in mine)), 1)


class _Carrying:
    """Hands the users' mistakes of a worker over as they are: torch would wrap a traceback."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, draws: list[Draw]) -> Batch | UserError:
        try:
            return self._data.__getitems__(draws)
        except UserError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    sys.excepthook = _but_for_a_trainer_that_ended


def _but_for_a_trainer_that_ended(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What hands batches over would tell of a trainer that ends meanwhile, which says so itself."""
    if not issubclass(kind, (ConnectionError, EOFError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
