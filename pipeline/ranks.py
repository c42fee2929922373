"""The processes that train one run together, or the one that trains alone.

A process's *rank* is its number from 0.  Each process computes a share of every batch; the first
one, of rank 0, also writes what lasts.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import MismatchError, SettingError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other."""

LONG_PATIENCE = timedelta(days=7)
"""How long they wait for work of the first one alone; one that is lost is noticed at once."""

_alone = ContextVar("alone", default=False)


def together() -> bool:
    """Whether this process belongs to a group."""
    return not _alone.get() and dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, this process counts as the only one: it trains a run without the others."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if together() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.barrier()


def asked() -> int:
    """How many processes the environment tells of.

    Raises:
        SettingError: It tells no number.
    """
    told = "1" if _alone.get() else os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal():
        raise SettingError(
            f"WORLD_SIZE is {told!r}: expected a number of processes, as torchrun sets it; set it "
            "right, or unset it"
        )
    return int(told)


def refuse_strangers(kind: str) -> None:
    """Refuse one of several processes that were not told of each other.

    Args:
        kind: What they would train, for the message.

    Raises:
        SettingError: The environment tells of several, and this one belongs to no group.
    """
    if asked() > 1 and not together():
        raise SettingError(
            f"WORLD_SIZE is {asked()}, but this {kind} run trains in one process: start the "
            "command without torchrun"
        )


def means(scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each scalar over the processes, which all have the same names."""
    if count() == 1 or not scalars:
        return dict(scalars)
    values = torch.stack([value.detach().float() for value in scalars.values()])
    dist.all_reduce(values)
    return dict(zip(scalars, (values / count()).unbind(), strict=True))


def largest(figures: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The largest of each figure over the processes, which all have the same names.

    Args:
        figures: Of this process.
        device: Of this process, where it sends from.
    """
    if count() == 1:
        return dict(figures)
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(figures, values.tolist(), strict=True))


def sum_of(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes; another tensor."""
    total = tensor.clone()
    if count() > 1:
        dist.all_reduce(total)
    return total


def of_all(value: T) -> list[T]:
    """What each process gives, by rank; it is pickled on the way."""
    found = [value] * count()
    if count() > 1:
        dist.all_gather_object(found, value)
    return found


def by_first(work: Callable[[], T]) -> T:
    """What the first process makes, alone, for all of them; it is pickled on the way.

    The others wait for as long as it takes; what it raises ends it, and so them.
    """
    if count() == 1:
        return work()
    # Processes that share GPUs' collectives wait for each other for `PATIENCE` at most.
    patient = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)
    sent: list[T | None] = [None]
    if rank() == 0:
        with alone():
            sent = [work()]
    dist.broadcast_object_list(sent, 0, group=patient)
    dist.destroy_process_group(patient)
    return sent[0]  # type: ignore[return-value]


def refuse_disagreement(seen: Mapping[str, object]) -> None:
    """Refuse processes that do not see the same, such as a folder that is not shared.

    Args:
        seen: What this process sees, by name.

    Raises:
        MismatchError: Another one sees something else; raised in all processes alike.
    """
    found = of_all(dict(seen))
    for name, first in found[0].items():
        for other, theirs in enumerate(found):
            if theirs[name] != first:
                raise MismatchError(
                    f"the processes of the run do not see the same {name}: {first} in process 0, "
                    f"{theirs[name]} in process {other}; expected data and output on storage that "
                    "all nodes share"
                )


def send_to_all(tensors: Mapping[str, Tensor]) -> None:
    """Give every process the tensors of the first one, in place."""
    if count() > 1:
        for tensor in tensors.values():
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)
