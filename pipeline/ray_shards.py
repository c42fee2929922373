"""Shards of work over the actors of a Ray: shard numbers go out, small records come back."""

import contextlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .ray_cluster import RayCluster, cause_of
from .shard_worker import ShardActor, ShardWorker, sound
from .watching import Tally, Watch, watched

MOST_DEATHS = 8
"""Deaths an actor, in the mean, without one shard done between them."""

NODES_SECONDS = 60.0
"""Seconds without an answer after which it is looked whether any actor is alive."""


class ShardActors:
    """Actors that are given shards, one after another; `cluster.Workers` says what they do.

    Args:
        cluster: The Ray that they run on.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._there: list[Any] = []

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        """What each actor computes on."""
        return self._cluster.share.device_type

    def refuse_hidden(self, paths: Sequence[str | Path]) -> None:
        """As `cluster.Workers.refuse_hidden`."""
        self._cluster.refuse_hidden(paths)

    def map(
        self,
        make_worker: Callable[[], ShardWorker],
        shards: Sequence[int],
        watch: Watch | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `cluster.Workers.map`."""
        self._cluster.start()
        import ray

        tally: Any = ray.remote(num_cpus=0, max_restarts=-1)(Tally).remote()

        def ask(actor: Any, shard: int) -> Any:
            # Not tried again by Ray: another actor may be free.
            return actor.record.options(max_task_retries=0).remote(make_worker, tally, shard)

        with contextlib.ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watched(lambda: _told(tally), watch))
            try:
                for record in self._records(ask, shards):
                    yield sound(json.loads(record), self._cluster.placement.address)
            except ray.exceptions.RayError as error:
                raise cause_of(error) from error
            finally:
                self.close()

    def _records(self, ask: Callable[[Any, int], Any], shards: Sequence[int]) -> Iterator[str]:
        """Records of shards: actors that are free are asked for one after another.

        A shard whose actor dies goes to the next free one, and the actor counts as free again when
        Ray has started it anew; so a node that is lost holds nothing up.
        """
        import ray

        waiting, left, deaths = deque(map(int, shards)), len(shards), 0
        free: list[Any] = []
        asked: dict[Any, tuple[Any, int | None]] = {
            actor.ready.remote(): (actor, None) for actor in self._actors(len(shards))
        }
        while left:
            answers, _ = ray.wait(list(asked), num_returns=1, timeout=NODES_SECONDS)
            if not answers:
                if all(shard is None for _, shard in asked.values()):
                    print("no worker is up: waiting for room on the cluster", file=sys.stderr)
                continue
            actor, shard = asked.pop(answers[0])
            record = None
            try:
                record = ray.get(answers[0])
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                deaths += 1
                if shard is None:  # it cannot be started again
                    raise
                if deaths > MOST_DEATHS * len(self._there):
                    raise UserError(
                        f"workers died {deaths} times and did not one shard: see whether memory "
                        "runs out when the learner is loaded, and use fewer --workers"
                    ) from error
                print(f"a worker died at shard {shard}, which goes to the next", file=sys.stderr)
                waiting.appendleft(shard)
                asked[actor.ready.remote()] = (actor, None)
            else:
                free.append(actor)
            while free and waiting:
                actor, shard = free.pop(), waiting.popleft()
                asked[ask(actor, shard)] = (actor, shard)
            if record is not None:
                left, deaths = left - 1, 0
                yield record

    def _actors(self, shards: int) -> list[Any]:
        """As many actors as can be of use; those that are there already are among them."""
        import ray

        kind: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **self._cluster.share.options)
        while len(self._there) < min(self._cluster.placement.workers, shards):
            self._there.append(kind(ShardActor).remote())
        return self._there

    def once(self, work: Callable[[], Any]) -> Any:
        """As `cluster.Workers.once`."""
        self._cluster.start()
        import ray

        try:
            return ray.get(self._actors(1)[0].call.options(max_task_retries=3).remote(work))
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def close(self) -> None:
        """End the actors, which leave their GPUs or CPUs to others."""
        import ray

        while self._there:
            with contextlib.suppress(ray.exceptions.RayError):  # of a cluster that is lost
                ray.kill(self._there.pop())


def _told(tally: Any) -> dict[int, int]:
    import ray

    told: dict[int, int] = ray.get(tally.told.remote())
    return told
