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
from .shard_worker import (
    ShardActor,
    ShardWorker,
    WorkerFullError,
    WorkerLostError,
    written_shards,
)
from .watching import Tally, Told, Watch, watched

MOST_DEATHS = 8
"""Deaths an actor, in the mean, without one shard done between them."""

MOST_FAULTS = 3
"""Times in a row that the GPU of an actor fails, until it is left out, and keeps that GPU."""

NODES_SECONDS = 60.0
"""Seconds without an answer after which it is looked whether any actor is alive."""


@dataclass(eq=False)
class _Actor:
    """An actor, as the driver knows it."""

    handle: Any
    held: list[int] = field(default_factory=list)
    """Shards that it was given and has not told the end of."""
    asked: int | None = None
    """The one that it was asked for last, which it may still be writing when it answers."""
    faults: int = 0
    """Times that its GPU failed since it last did a shard."""


class _Given:
    """Which actor was given which shards.

    An actor is free when it can begin a shard, though it may still be writing the one before; none
    is given a shard to lie in wait, so the last ones go to whoever can begin them first.  The
    shards of an actor that dies go to the next free one, and it counts as free again when Ray has
    started it anew; so a node that is lost holds nothing up.

    Args:
        actors: All of them.
        shards: What is to be done.
        ask: Gives an actor a shard, or None to wait until all of its own are written.
    """

    def __init__(
        self,
        actors: list[_Actor],
        shards: Sequence[int],
        ask: Callable[[Any, int | None], Any],
    ) -> None:
        self._actors, self._ask = list(actors), ask
        self._waiting, self._deaths = deque(map(int, shards)), 0
        self._open = set(self._waiting)
        self._free: list[_Actor] = []
        self._asked = {actor.handle.ready.remote(): actor for actor in actors}

    def records(self, address: str | None) -> Iterator[dict[str, Any]]:
        """Records of the shards as they are done.

        Args:
            address: As of `shard_worker.written_shards`.
        """
        import ray

        while self._open:
            answers, _ = ray.wait(list(self._asked), num_returns=1, timeout=NODES_SECONDS)
            if not answers:
                if not any(actor.held for actor in self._asked.values()):
                    print("no worker is up: waiting for room on the cluster", file=sys.stderr)
                continue
            actor = self._asked.pop(answers[0])
            written = []
            try:
                reply = ray.get(answers[0])
                written = written_shards(reply, address) if reply else []
            except ray.exceptions.RayTaskError:
                raise
            except (ray.exceptions.RayError, WorkerLostError) as error:
                self._take_back(actor, error)
            else:
                actor.held = [s for s in actor.held if s not in dict(written)]
                # Ray has a call wait for the next process of an actor that died after its answer.
                gone = [s for s in actor.held if s != actor.asked]
                if gone:
                    self._give_back(actor, gone)
                self._free.append(actor)
            self._give()
            for shard, record in written:
                # An actor that could not be reached for a while lives, and tells what it did; its
                # shards were given to others, who tell of them too.
                if shard in self._open:
                    self._open.remove(shard)
                    self._deaths = actor.faults = 0
                    yield record

    def _give(self) -> None:
        """Give free actors shards, or wait for what they are writing if there are none."""
        while self._free and self._waiting:
            actor, shard = self._free.pop(), self._waiting.popleft()
            actor.held.append(shard)
            self._ask_for(actor, shard)
        for actor in [actor for actor in self._free if actor.held]:
            self._free.remove(actor)
            self._ask_for(actor, None)

    def _ask_for(self, actor: _Actor, shard: int | None) -> None:
        actor.asked = shard
        self._asked[self._ask(actor.handle, shard)] = actor

    def _give_back(self, actor: _Actor, shards: list[int], error: Exception | None = None) -> None:
        """Give shards to others that an actor's process died at."""
        self._deaths += 1
        if self._deaths > MOST_DEATHS * len(self._actors):
            raise UserError(
                f"workers died {self._deaths} times and did not one shard: see whether memory "
                "runs out when the learner is loaded, and use fewer --workers"
            ) from error
        told = f"{error}; " if isinstance(error, WorkerLostError) else ""
        named = " and ".join(map(str, shards))
        print(f"{told}a worker died at shard {named}, to be done by the next", file=sys.stderr)
        self._waiting.extendleft(reversed(shards))
        actor.held = [shard for shard in actor.held if shard not in shards]

    def _take_back(self, actor: _Actor, error: Exception) -> None:
        """Give the shards of an actor that died to others, and have it started anew."""
        if not actor.held:  # it cannot be started again
            raise error
        self._give_back(actor, actor.held, error)
        failed = isinstance(error, WorkerLostError) and not isinstance(error, WorkerFullError)
        actor.faults += failed
        if actor.faults < MOST_FAULTS:
            self._asked[actor.handle.ready.remote()] = actor
            return
        # Its process stays, idle: were its GPU given back, the next worker that is started anew
        # would be placed there, and fail in its turn.
        self._actors.remove(actor)
        if not self._actors:
            raise UserError(f"no worker is left whose GPU works: {error}") from error
        print(
            f"its GPU failed {actor.faults} times in a row: it is left out, {len(self._actors)} "
            "workers go on",
            file=sys.stderr,
        )


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
                given = _Given(self._actors(len(shards)), shards, ask)
                yield from given.records(self._cluster.placement.address)
            except ray.exceptions.RayError as error:
                raise cause_of(error) from error
            finally:
                self.close()

    def _actors(self, shards: int) -> list["_Actor"]:
        """As many actors as can be of use; those that are there already are among them."""
        import ray

        # With retries calls wait for an actor that restarts; without, Ray refuses them meanwhile.
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
