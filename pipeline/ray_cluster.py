"""The Ray that workers run on: started on this machine, or a cluster that is there and is joined.

A cluster that grows by itself is waited for until all workers fit; any other refuses them.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import SettingError, UserError, first_line
from .cluster_fitness import joining_refusal, node_report, refuse_address, refuse_unfit
from .placement import Placement, Share, refuse_crowd, room_for, share_of

GROWTH_SECONDS = 10.0
"""Seconds between two lines that tell of a growing cluster."""

_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's driver, AMD's, and either's under Windows."""


@contextlib.contextmanager
def cluster_for(placement: Placement) -> Iterator["RayCluster"]:
    """A Ray with room for some workers, which is left in the end.

    Args:
        placement: How many, at least one, and where.

    Raises:
        SettingError, MissingError, MismatchError: As `cluster.open_workers`.
    """
    there = _OwnRay(placement) if placement.address is None else RayCluster(placement)
    try:
        there.open()
        yield there
    finally:
        there.close()


class RayCluster:
    """A Ray cluster that is there."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._joined = False

    def start(self) -> None:
        """Join the cluster, if that was put off."""

    @property
    def share(self) -> Share:
        """What one actor takes; known once it is open."""
        return self._share

    def open(self) -> None:
        """Join the cluster and see that all workers can work there."""
        if self.placement.address is not None:
            refuse_address(self.placement.address)
        self._join()
        import ray

        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._share = share_of(self.placement, there.get("GPU", 0))
        try:
            refuse_crowd(self.placement, self._share, there)
        except SettingError as refusal:
            self._wait_for_growth(refusal)
        self.refuse_hidden([])

    def _wait_for_growth(self, refusal: SettingError) -> None:
        """Wait until all workers fit, or raise the refusal if the cluster will not grow to that.

        The autoscaler is asked by a placement group: unlike a request for resources, it goes with
        this process, however that ends, and nodes are not paid for any longer.
        """
        import ray

        scaling = _autoscaling_state()
        if scaling is None:
            raise refusal
        wanted = [{self._share.unit: self._share.amount}] * self.placement.workers
        group = ray.util.placement_group(wanted)
        told = float("-inf")
        try:
            while not group.wait(1):
                state = _autoscaling_state()
                refused = state.infeasible_gang_resource_requests if state is not None else []
                if any(request.details.startswith(group.id.hex()) for request in refused):
                    raise SettingError(
                        f"--workers is {self.placement.workers}, but {self.placement.address} "
                        f"does not grow to room for as many: expected fewer, or more in the "
                        "cluster's max_workers"
                    ) from refusal
                if time.monotonic() - told >= GROWTH_SECONDS:
                    told = time.monotonic()
                    room = room_for(self._share, ray.cluster_resources())  # type: ignore[no-untyped-call]
                    print(
                        f"waiting for {self.placement.address} to grow: room for {room} of "
                        f"{self.placement.workers} workers",
                        file=sys.stderr,
                    )
        finally:
            ray.util.remove_placement_group(group)

    def _join(self) -> None:
        """Join the cluster, or start one on this machine, quietly."""
        # Ray's own niceness of 15 starves its workers beside any other work on the machine (seen:
        # 5 images/s instead of 138).
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Its core warns that restarted actors need their arguments, which this process keeps.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # It tries for 20 s to give a wrong token, or none; that something answers is known.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
        # Without it Ray begins with a notice.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        import ray

        if ray.is_initialized():
            raise SettingError(
                "this process has joined a Ray already, which is not touched: leave it first, or "
                "work without --workers"
            )
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = self.placement.address
        ended_by = signal.getsignal(signal.SIGTERM)
        try:
            with _silent():
                if address is None:
                    # Not a Ray that happens to run here; and with the room that was counted on.
                    cpus = os.cpu_count() or 1
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
                else:
                    ray.init(address=address, **quiet)
        except Exception as error:
            if address is None:
                raise UserError(
                    f"Ray cannot be started on this machine ({first_line(error)}): see whether its "
                    "memory, /dev/shm and the folder of temporary files have room, or work without "
                    "--workers"
                ) from error
            raise joining_refusal(address, error) from error
        with contextlib.suppress(ValueError, TypeError):  # another thread, or a handler in C
            signal.signal(signal.SIGTERM, ended_by)  # Ray has put its own there, which prints
        self._joined = True
        # Prints what befalls workers, whatever Ray is told; `ray_shards` tells it.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None

    def refuse_hidden(self, paths: Sequence[str | Path]) -> None:
        """As `cluster.Workers.refuse_hidden`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        report: Any = ray.remote(node_report([str(path) for path in paths]))
        found = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"] and node["Resources"].get(self._share.unit):
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                found.append(report.options(num_cpus=0, scheduling_strategy=there).remote())
        try:
            refuse_unfit(ray.get(found))
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def close(self) -> None:
        """Leave the cluster, if it was joined; ends Ray where it was started for this call."""
        if self._joined:
            self._leave()

    def _leave(self) -> None:
        import ray

        ray.shutdown()


class _OwnRay(RayCluster):
    """A Ray of this machine that is started when it is needed first."""

    def open(self) -> None:
        there = {"GPU": float(_gpus()), "CPU": float(os.cpu_count() or 1)}
        self._share = share_of(self.placement, there["GPU"])
        refuse_crowd(self.placement, self._share, there)

    def start(self) -> None:
        if not self._joined:
            self._join()

    def refuse_hidden(self, paths: Sequence[str | Path]) -> None:
        pass


def _gpus() -> int:
    """GPUs of this machine; where there is no device file of one, torch is not imported to ask."""
    if sys.platform == "linux" and not any(map(os.path.exists, _GPU_FILES)):
        return 0
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches standard error while the block runs.

    Ray's core writes there by itself that it was told to log less; its errors are exceptions.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _autoscaling_state() -> Any | None:
    """What the cluster's autoscaler last said; None where nothing grows.

    Ray has no public word for it.  Its second autoscaler, which `ray up` and KubeRay start, says
    what it can never place, and so does the one of a cluster that cannot grow at all; the first
    one says nothing of the kind, so its clusters count as fixed.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    reply = GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    reply.ParseFromString(GcsClient(address=address).get_cluster_status())
    state = reply.autoscaling_state
    return state if state.autoscaler_state_version else None


def cause_of(error: BaseException) -> Exception:
    """The user's mistake inside what Ray raised, or a plain sentence of what broke."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return UserError(f"a worker failed: {str(error).strip().splitlines()[-1]}")
