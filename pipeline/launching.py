"""How a command's processes begin and end together: alone, under torchrun, or under Ray Train.

torchrun (or any launcher that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``)
starts the whole command in each process; for Ray Train the command's own process starts workers
that call the same function.  Only the first process speaks, and whichever fails first says why.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..errors import SettingError, UserError, first_line
from . import ranks
from .memory_faults import memory_faults
from .options import TrainingOptions, choose_device

O = TypeVar("O", bound=TrainingOptions)  # noqa: E741


def launch(train: Callable[[O], Path], options: O) -> Path:
    """Train in this process, or in several together, as the options and the environment ask.

    Args:
        train: Calls `training.fit`, alike in each process; a function of a module, so that it can
            be sent to others.
        options: Its argument.

    Returns:
        What ``train`` returned in the first process.

    Raises:
        SettingError: The environment tells of several processes that do not meet.
        UserError: What one of the processes raised; or that one was lost, or memory ran out.
        SystemExit: Another process says why they end.
    """
    if ranks.together():
        return train(options)
    train = partial(_within_memory, train)
    if options.launcher == "ray":
        from .ray_training import train_on_ray

        return train_on_ray(train, options)
    if ranks.asked() > 1:
        return _with_peers(train, options)
    return train(options)


def _within_memory(train: Callable[[O], Path], options: O) -> Path:
    with memory_faults(options):
        return train(options)


@contextlib.contextmanager
def only_first_speaks(rank: int) -> Iterator[None]:
    """Within, nothing is printed unless ``rank`` is 0."""
    if rank == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _with_peers(train: Callable[[O], Path], options: O) -> Path:
    """Train as one of the processes that the environment tells of."""
    store, rank, count = _met()
    # torchrun's store outlives a restart, with the keys of the processes before (seen: a hang).
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ending = PrefixStore("ending", store)
    try:
        device = choose_device(options.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=count,
            timeout=ranks.PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        with only_first_speaks(rank):
            path = train(options)
    except UserError:
        if not _is_first_to_tell(ending, rank):
            raise SystemExit(1) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if not _is_first_to_tell(ending, rank):
            raise SystemExit(1) from None
        raise UserError(
            "another process of the run was lost: see what its launcher says of it; the same "
            "command goes on from the newest checkpoint"
        ) from error
    dist.destroy_process_group()
    return path


def _met() -> tuple[Store, int, int]:
    """A store that the processes share, this one's rank, and how many they are.

    Raises:
        SettingError: The environment does not say how to meet, or nobody is met there.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
    try:
        store, rank, count = next(rendezvous("env://", timeout=ranks.PATIENCE))
        if not 0 <= rank < count:
            raise ValueError(f"RANK is not from 0 to {count - 1}")
    except ValueError as error:
        raise SettingError(
            f"the environment tells of {ranks.asked()} processes, but not how they meet ({told}): "
            "expected all four as torchrun sets them; start the command by torchrun, or unset "
            "WORLD_SIZE for one process"
        ) from error
    except dist.DistError as error:
        raise SettingError(
            f"the processes of the run did not meet ({told}: {first_line(error)}): "
            "expected an address of process 0 that all reach, a port that is free there, and "
            f"{ranks.asked()} processes; take another MASTER_PORT, or start the command by torchrun"
        ) from error
    return store, rank, count


def _is_first_to_tell(ending: Store, rank: int) -> bool:
    """Whether this process is the one that says why all end."""
    try:
        return bool(ending.compare_set("told by", "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the process that kept the store is gone, and its message is out
        return False
