"""The one place that knows Ray: shards of work over actors, on this machine or on a cluster.

Ray carries shard numbers out and small records back, never pixels.  A worker is made once an actor
by a factory, so that this module knows no network; with no workers asked the caller's own process
does the work and Ray is not imported.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SettingError, UserError

ShardWorker = Callable[[int], Mapping[str, Any]]
"""Does the work of one shard; returns a small record of plain data."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where shards are worked on.

    Attributes:
        workers: Actors; 0 works in this process.
        workers_per_gpu: Actors that share a GPU, where there are any.
        address: Of a running Ray cluster; None starts Ray on this machine for the time of the call.
    """

    workers: int
    workers_per_gpu: int = 1
    address: str | None = None


def map_shards(
    make_worker: Callable[[], ShardWorker], shards: Sequence[int], placement: Placement
) -> Iterator[dict[str, Any]]:
    """Do the work of some shards and yield their records as they are done, in any order.

    Args:
        make_worker: Makes the worker, once in each actor; pickled with cloudpickle.
        shards: Which shards.
        placement: Where.

    Yields:
        What the worker returned for each shard.

    Raises:
        SettingError: The machine or the cluster cannot place that many workers.
        UserError: What a worker raised, if it was one of these; it is the user's to mend.
    """
    if placement.workers == 0:
        worker = make_worker()
        yield from (dict(worker(shard)) for shard in shards)
        return
    # Ray's own niceness of 15 starves its workers beside any other work on the machine (seen: 5
    # images/s instead of 138).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without it Ray begins with a notice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    _connect(placement.address)
    try:
        yield from _over_actors(make_worker, shards, placement)
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine, quietly."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is None:
            raise
        raise SettingError(
            f"--address is {address}: no Ray cluster answers there ({str(error).splitlines()[0]}); "
            "expected host:port of `ray start --head`, with RAY_AUTH_MODE=token in the environment "
            "where the cluster asks for a token"
        ) from error


def _over_actors(
    make_worker: Callable[[], ShardWorker], shards: Sequence[int], placement: Placement
) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    resources = _resources(placement, there.get("GPU", 0), there.get("CPU", 0))
    found = ray.data.from_items(
        [{"shard": int(shard)} for shard in shards], override_num_blocks=len(shards)
    ).map_batches(
        _ShardActor,
        fn_constructor_kwargs={"make_worker": make_worker},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(placement.workers, len(shards)), max_tasks_in_flight_per_actor=2
        ),
        **resources,
    )
    for row in found.iter_rows():
        yield json.loads(row["record"])


class _ShardActor:
    """A worker as Ray Data calls it: batches of one shard in, batches of one record out."""

    def __init__(self, make_worker: Callable[[], ShardWorker]) -> None:
        self._worker = make_worker()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"record": [json.dumps(dict(self._worker(int(shard)))) for shard in batch["shard"]]}


def refuse_without_room(placement: Placement) -> None:
    """Refuse more workers than this machine has room for, before anything is started.

    What a cluster has is known, and checked, once it is joined.

    Raises:
        SettingError: There are more workers than GPUs (times workers a GPU), or than processors
            where there is no GPU.
    """
    if placement.workers and placement.address is None:
        _resources(placement, torch.cuda.device_count(), os.cpu_count() or 1)


def _resources(placement: Placement, gpus: float, cpus: float) -> dict[str, Any]:
    """What each actor takes; refuses more actors than there is room for."""
    resources: dict[str, Any]
    if gpus:
        room, share = int(gpus * placement.workers_per_gpu), 1 / placement.workers_per_gpu
        resources, unit = {"num_gpus": share, "num_cpus": 0.0}, f"{gpus:.0f} GPUs"
    else:
        room, resources, unit = int(cpus), {"num_cpus": 1.0}, f"{cpus:.0f} CPUs"
    if placement.workers > room:
        place = placement.address or "this machine"
        more = "; --workers-per-gpu puts several on one" if gpus else ""
        raise SettingError(
            f"--workers is {placement.workers}, but {place} has {unit}, room for {room}: "
            f"expected at most {room}{more}"
        )
    return resources


def _cause(error: BaseException) -> Exception:
    """The user's mistake inside what Ray raised, or a plain sentence of what broke."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return UserError(f"a worker failed: {str(error).strip().splitlines()[-1]}")
