"""Shards of work over the actors of a Ray: shard numbers go out, small records come back."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .ray_cluster import RayCluster, cause_of
from .shard_worker import ShardActor, ShardWorker, written_shards
from .watching import Tally, Told, Watch, watched

MOST_DEATHS = 8
"""Deaths an actor, in the mean, without one shard done between them."""

NODES_SECONDS = 60.0
"""Seconds without an answer after which it is looked whether any actor is alive."""


@dataclass(eq=False)
class _Actor:
    """An actor, as the driver knows it."""

    handle: Any
    held: list[int] = field(default_factory=list)
    """Shards that it was given and has not told the end of."""

    @property
    def holds(self) -> str:
        return f"shard {' and '.join(map(str, self.held))}"


class ShardActors:
    """Actors that are given shards, one after another; `cluster.Workers` says what they do.

    Args:
        cluster: The Ray that they run on.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._there: list[_Actor] = []

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

        def ask(actor: Any, shard: int | None) -> Any:
            # Not tried again by Ray: another actor may be free.
            return actor.work.options(max_task_retries=0).remote(make_worker, tally, shard)

        with contextlib.ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watched(lambda: _told(tally), watch))
            try:
                yield from self._records(ask, shards)
            except ray.exceptions.RayError as error:
                raise cause_of(error) from error
            finally:
                self.close()

    def _records(
        self, ask: Callable[[Any, int | None], Any], shards: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Records of shards: actors that are free are asked for one after another.

        An actor is free when it can begin a shard, though it may still be writing the one before;
        none is given a shard to lie in wait, so the last ones go to whoever can begin them first.
        The shards of an actor that dies go to the next free one, and it counts as free again when
        Ray has started it anew; so a node that is lost holds nothing up.
        """
        import ray

        waiting, left, deaths = deque(map(int, shards)), len(shards), 0
        free: list[_Actor] = []
        asked = {actor.handle.ready.remote(): actor for actor in self._actors(len(shards))}
        while left:
            answers, _ = ray.wait(list(asked), num_returns=1, timeout=NODES_SECONDS)
            if not answers:
                if not any(actor.held for actor in asked.values()):
                    print("no worker is up: waiting for room on the cluster", file=sys.stderr)
                continue
            actor = asked.pop(answers[0])
            written = []
            try:
                reply = ray.get(answers[0])
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as error:
                deaths += 1
                if not actor.held:  # it cannot be started again
                    raise
                if deaths > MOST_DEATHS * len(self._there):
                    raise UserError(
                        f"workers died {deaths} times and did not one shard: see whether memory "
                        "runs out when the learner is loaded, and use fewer --workers"
                    ) from error
                print(f"a worker died at {actor.holds}, to be done by the next", file=sys.stderr)
                waiting.extendleft(reversed(actor.held))
                actor.held.clear()
                asked[actor.handle.ready.remote()] = actor
            else:
                written = written_shards(reply, self._cluster.placement.address) if reply else []
                actor.held = [s for s in actor.held if s not in dict(written)]
                free.append(actor)
            while free and waiting:
                actor, shard = free.pop(), waiting.popleft()
                actor.held.append(shard)
                asked[ask(actor.handle, shard)] = actor
            for actor in [actor for actor in free if actor.held]:
                free.remove(actor)
                asked[ask(actor.handle, None)] = actor
            for _, record in written:
                left, deaths = left - 1, 0
                yield record

    def _actors(self, shards: int) -> list["_Actor"]:
        """As many actors as can be of use; those that are there already are among them."""
        import ray

        kind: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **self._cluster.share.options)
        while len(self._there) < min(self._cluster.placement.workers, shards):
            self._there.append(_Actor(kind(ShardActor).remote()))
        return self._there

    def once(self, work: Callable[[], Any]) -> Any:
        """As `cluster.Workers.once`."""
        self._cluster.start()
        import ray

        try:
            return ray.get(self._actors(1)[0].handle.call.options(max_task_retries=3).remote(work))
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error

    def close(self) -> None:
        """End the actors, which leave their GPUs or CPUs to others."""
        import ray

        while self._there:
            with contextlib.suppress(ray.exceptions.RayError):  # of a cluster that is lost
                ray.kill(self._there.pop().handle)


def _told(tally: Any) -> dict[int, Told]:
    import ray

    told: dict[int, Told] = ray.get(tally.told.remote())
    return told
