"""Workers for shards of work: this process alone, or actors of a Ray on this machine or a cluster.

A worker is made once an actor by a factory, so that this module knows no network; with no workers
asked the caller's own process does the work and Ray is not imported.  Nor is torch imported with
this module, so that an actor waits for no more than its worker needs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from .placement import Placement, Share
from .ray_cluster import cluster_for
from .ray_shards import ShardActors
from .shard_worker import OneBehind, ShardWorker
from .watching import Watch, telling


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
        """What a function returns, called in the process of a worker to be."""

    def refuse_hidden(self, paths: Sequence[str | Path]) -> None:
        """See that paths are there wherever a worker may be.

        Args:
            paths: Absolute paths, which this process sees.

        Raises:
            MissingError: A node of the cluster does not see one of them.
        """


@contextlib.contextmanager
def open_workers(placement: Placement) -> Iterator[Workers]:
    """Workers as they are asked for; Ray is started, or joined, only where it is needed.

    Args:
        placement: How many, and where.

    Raises:
        SettingError: The machine or the cluster cannot place that many workers, or there is no
            cluster at the address, or it asks for another token.
        MissingError: semmae is not installed on a node of the cluster.
        MismatchError: A node has another version of semmae or torch.
        UserError: Ray cannot be started on this machine; raised when it is needed first.
    """
    if placement.workers == 0:
        yield _Here(placement)
        return
    with cluster_for(placement) as there, contextlib.closing(ShardActors(there)) as actors:
        yield actors


@contextlib.contextmanager
def joined(placement: Placement) -> Iterator[Share]:
    """A Ray that there is room in, for those who start their own processes by it.

    Args:
        placement: How many processes, at least one, and where.

    Yields:
        What one of them takes.

    Raises:
        SettingError, MissingError, MismatchError: As `open_workers`.
    """
    with cluster_for(placement) as there:
        there.start()
        yield there.share


class _Here:
    """This process as the only worker."""

    def __init__(self, placement: Placement) -> None:
        from .options import choose_device

        on_gpu = choose_device(placement.device).type == "cuda"
        self.device_type: Literal["cuda", "cpu"] = "cuda" if on_gpu else "cpu"

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        worker = OneBehind(make_worker())
        try:
            for shard in shards:
                for _, record in worker.do(shard, telling(watch, shard)):
                    yield dict(record)
            for _, record in worker.finish():
                yield dict(record)
        finally:
            worker.wait()

    def once(self, work: Callable[[], Any]) -> Any:
        return work()

    def refuse_hidden(self, paths: Sequence[str | Path]) -> None:
        pass
