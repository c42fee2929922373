"""Where workers go: what each takes there, and what there is no room for."""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SettingError


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


@dataclass(frozen=True)
class Share:
    """What one actor takes of a machine or cluster.

    Attributes:
        device_type: What it computes on.
        amount: How much of a GPU or of the CPUs.
    """

    device_type: Literal["cuda", "cpu"]
    amount: float

    @property
    def unit(self) -> Literal["GPU", "CPU"]:
        """Ray's name of what is shared."""
        return "GPU" if self.device_type == "cuda" else "CPU"

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of a Ray actor or task."""
        if self.unit == "GPU":
            return {"num_gpus": self.amount, "num_cpus": 0.0}
        return {"num_cpus": self.amount}


def share_of(placement: Placement, gpus: float) -> Share:
    """What each actor takes.

    Args:
        placement: How the actors are asked for.
        gpus: GPUs of the machine or the cluster.
    """
    kind = placement.device.partition(":")[0]
    if gpus > 0 if kind == "auto" else kind == "cuda":
        return Share("cuda", 1 / placement.workers_per_gpu)
    return Share("cpu", 1.0)


def room_for(share: Share, there: dict[str, float]) -> int:
    """How many actors there is room for.

    Args:
        share: What each takes.
        there: ``GPU`` and ``CPU`` of the machine or the cluster; what is missing is 0.
    """
    return int(there.get(share.unit, 0) / share.amount + 1e-6)


def refuse_crowd(placement: Placement, share: Share, there: dict[str, float]) -> None:
    """Raise a `SettingError` if there is no room for all actors; arguments as of `room_for`."""
    place = placement.address or "this machine"
    count, room = there.get(share.unit, 0), room_for(share, there)
    if share.unit == "GPU" and not count:
        raise SettingError(
            f"--device is {placement.device}, but {place} has no GPU: use --device cpu"
        )
    if placement.workers > room:
        more = "; --workers-per-gpu puts several on one" if share.unit == "GPU" else ""
        raise SettingError(
            f"--workers is {placement.workers}, but {place} has {count:.0f} {share.unit}s, room "
            f"for {room}: expected at most {room}{more}"
        )
