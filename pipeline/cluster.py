"""The one place that knows Ray: shards of work over actors, on this machine or on a cluster.

Ray carries shard numbers out and small records back, never pixels.  A worker is made once an actor
by a factory, so that this module knows no network; with no workers asked the caller's own process
does the work and Ray is not imported.
"""

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ..errors import SettingError, UserError
from .options import choose_device

Tell = Callable[[int], None]
"""Says how many images of its shard a worker has done so far."""

Watch = Callable[[Mapping[int, int]], None]
"""Takes how many images of each shard are done; called now and then, from another thread."""

WATCH_SECONDS = 2.0
"""Seconds between two calls of a `Watch`."""


class ShardWorker(Protocol):
    """Does the work of one shard after another."""

    def __call__(self, shard: int, tell: Tell) -> Mapping[str, Any]:
        """Do one shard; returns a small record of plain data."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where shards are worked on.

    Attributes:
        workers: Actors; 0 works in this process.
        workers_per_gpu: Actors that share a GPU, where there are any.
        address: Of a running Ray cluster; None starts Ray on this machine for the time of the call.
        device: ``cuda`` places actors on GPUs, ``cpu`` on processors; ``auto`` takes GPUs where the
            machine or the cluster has any.
    """

    workers: int
    workers_per_gpu: int = 1
    address: str | None = None
    device: str = "auto"


class Workers(Protocol):
    """Workers that can be given shards; `open_workers` makes them."""

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        """What each worker computes on."""

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Do the work of some shards and yield their records as they are done, in any order.

        Args:
            make_worker: Makes the worker, once in each actor; pickled with cloudpickle.
            shards: Which shards.
            watch: Told how far each shard is.

        Yields:
            What the worker returned for each shard.

        Raises:
            UserError: What a worker raised, if it was one of these; it is the user's to mend.
        """

    def once(self, work: Callable[[], Any]) -> Any:
        """What a function returns, called once where a worker would be."""


@contextlib.contextmanager
def open_workers(placement: Placement) -> Iterator[Workers]:
    """Workers as they are asked for; Ray is started, or joined, only where it is needed.

    Args:
        placement: How many, and where.

    Raises:
        SettingError: The machine or the cluster cannot place that many workers, or there is no
            cluster at the address.
    """
    if placement.workers == 0:
        yield _Here(placement)
        return
    there = _ThisMachine(placement) if placement.address is None else _OnRay(placement)
    try:
        yield there
    finally:
        there.close()


class _Here:
    """This process as the only worker."""

    def __init__(self, placement: Placement) -> None:
        self.device_type = _kind(choose_device(placement.device).type)

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        worker = make_worker()
        for shard in shards:
            tell = _tell_nobody if watch is None else _telling(watch, shard)
            yield dict(worker(shard, tell))

    def once(self, work: Callable[[], Any]) -> Any:
        return work()


class _OnRay:
    """Actors of a Ray cluster that is there."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._join()
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._place(resources.get("GPU", 0), resources.get("CPU", 0))

    def _place(self, gpus: float, cpus: float) -> None:
        self.device_type, self._resources = _resources(self._placement, gpus, cpus)

    def _join(self) -> None:
        """Join the cluster, or start one on this machine, quietly."""
        # Ray's own niceness of 15 starves its workers beside any other work on the machine (seen:
        # 5 images/s instead of 138).
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Without it Ray begins with a notice.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = self._placement.address
        try:
            if address is None:
                ray.init(include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address is None:
                raise
            raise SettingError(
                f"--address is {address}: no Ray cluster answers there "
                f"({str(error).splitlines()[0]}); expected host:port of `ray start --head`, with "
                "RAY_AUTH_MODE=token in the environment where the cluster asks for a token"
            ) from error

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        import ray

        tally: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Tally).remote()
        with contextlib.ExitStack() as stack:
            if watch is not None:
                stack.enter_context(_watched(lambda: _told(tally), watch))
            try:
                yield from self._over_actors(make_worker, shards, tally)
            except ray.exceptions.RayError as error:
                raise _cause(error) from error

    def _over_actors(
        self, make_worker: Callable[[], ShardWorker], shards: Sequence[int], tally: Any
    ) -> Iterator[dict[str, Any]]:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        found = ray.data.from_items(
            [{"shard": int(shard)} for shard in shards], override_num_blocks=len(shards)
        ).map_batches(
            _ShardActor,
            fn_constructor_kwargs={"make_worker": make_worker, "tally": tally},
            batch_size=1,
            # One task an actor: at the end no shard waits behind another while an actor is idle.
            compute=ray.data.ActorPoolStrategy(
                size=min(self._placement.workers, len(shards)), max_tasks_in_flight_per_actor=1
            ),
            **self._resources,
        )
        for row in found.iter_rows():
            yield json.loads(row["record"])

    def once(self, work: Callable[[], Any]) -> Any:
        import ray

        def called() -> Any:
            return work()

        try:
            return ray.get(ray.remote(**self._resources)(called).remote())
        except ray.exceptions.RayError as error:
            raise _cause(error) from error

    def close(self) -> None:
        """Leave the cluster; ends Ray where it was started for this call."""
        import ray

        ray.shutdown()


class _ThisMachine(_OnRay):
    """Actors of a Ray that is started for the time of the call, when it is needed first."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._place(torch.cuda.device_count(), os.cpu_count() or 1)
        self._started = False

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._join()

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        self._start()
        yield from super().map(make_worker, shards, watch)

    def once(self, work: Callable[[], Any]) -> Any:
        self._start()
        return super().once(work)

    def close(self) -> None:
        if self._started:
            super().close()


class _ShardActor:
    """A worker as Ray Data calls it: batches of one shard in, batches of one record out."""

    def __init__(self, make_worker: Callable[[], ShardWorker], tally: Any) -> None:
        self._worker, self._tally = make_worker(), tally

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"record": [json.dumps(self._record(int(shard))) for shard in batch["shard"]]}

    def _record(self, shard: int) -> dict[str, Any]:
        record = self._worker(shard, lambda images: self._tally.tell.remote(shard, images))
        return {**record, "worker": f"{socket.gethostname()}:{os.getpid()}"}


class _Tally:
    """How far the workers are; an actor of its own, so that telling never holds a worker up."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def tell(self, shard: int, images: int) -> None:
        """Keep what a worker says of its shard."""
        self._done[shard] = images

    def told(self) -> dict[int, int]:
        """Images done, by shard."""
        return self._done


def _told(tally: Any) -> dict[int, int]:
    import ray

    told: dict[int, int] = ray.get(tally.told.remote())
    return told


@contextlib.contextmanager
def _watched(told: Callable[[], Mapping[int, int]], watch: Watch) -> Iterator[None]:
    """Call ``watch`` with what was told, now and then, while the block runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(WATCH_SECONDS):
            # Whatever befalls the tally, the work goes on; it is for the eye alone.
            with contextlib.suppress(Exception):
                watch(told())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2 * WATCH_SECONDS)


def _telling(watch: Watch, shard: int) -> Tell:
    return lambda images: watch({shard: images})


def _tell_nobody(images: int) -> None:
    pass


def _kind(device_type: str) -> Literal["cuda", "cpu"]:
    return "cuda" if device_type == "cuda" else "cpu"


def _resources(
    placement: Placement, gpus: float, cpus: float
) -> tuple[Literal["cuda", "cpu"], dict[str, Any]]:
    """What each actor computes on and takes; refuses more actors than there is room for."""
    place = placement.address or "this machine"
    kind = placement.device.partition(":")[0]
    on_gpu = gpus > 0 if kind == "auto" else kind == "cuda"
    if on_gpu and not gpus:
        raise SettingError(
            f"--device is {placement.device}, but {place} has no GPU: use --device cpu"
        )
    resources: dict[str, Any]
    if on_gpu:
        room, share = int(gpus * placement.workers_per_gpu), 1 / placement.workers_per_gpu
        resources, unit = {"num_gpus": share, "num_cpus": 0.0}, f"{gpus:.0f} GPUs"
    else:
        room, resources, unit = int(cpus), {"num_cpus": 1.0}, f"{cpus:.0f} CPUs"
    if placement.workers > room:
        more = "; --workers-per-gpu puts several on one" if on_gpu else ""
        raise SettingError(
            f"--workers is {placement.workers}, but {place} has {unit}, room for {room}: "
            f"expected at most {room}{more}"
        )
    return "cuda" if on_gpu else "cpu", resources


def _cause(error: BaseException) -> Exception:
    """The user's mistake inside what Ray raised, or a plain sentence of what broke."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return UserError(f"a worker failed: {str(error).strip().splitlines()[-1]}")
