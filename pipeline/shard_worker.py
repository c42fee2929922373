"""What works on shards, and how what it returns or raises travels from an actor to the caller."""

import functools
import json
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from .. import errors
from ..errors import UserError
from .load_clock import heed_end_signal
from .watching import Tell

Record = Mapping[str, Any]
"""What a worker says of a shard that is done; plain data."""

_LOST, _FULL, _REFUSED, _BROKEN = "lost", "full", "refused", "broken"
"""Keys of a reply that stands for what a worker raised: another worker's to mend (the second one
where memory ran out), the user's, or ours."""


class WorkerLostError(UserError):
    """The process of a worker can do nothing more, though another one might."""


class WorkerFullError(WorkerLostError):
    """The memory of a worker's process ran out: its shard may be to blame, its GPU is not."""


class ShardWorker(Protocol):
    """Does the work of one shard after another."""

    def __call__(self, shard: int, tell: Tell) -> Record | Future[Record]:
        """Do one shard.

        A future says that the shard is still being written, behind the worker's back, which can be
        given another meanwhile.  It waits for that one before it writes again, and what went wrong
        with it is raised by the call that is under way then.

        Args:
            shard: Its number.
            tell: Told how many of its images are done.

        Returns:
            A small record of plain data.
        """


class OneBehind:
    """Gives shards to a worker, which may be writing one while it works on the next.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: ShardWorker) -> None:
        self._worker = worker
        self._ended: deque[tuple[int, Record | Future[Record]]] = deque()

    def do(self, shard: int, tell: Tell) -> list[tuple[int, Record]]:
        """Do a shard, but for its writing; the shards that are written, this one or the one before.

        Args:
            shard: Its number.
            tell: Told how many of its images are done.

        Returns:
            Number and record of each.
        """
        self._ended.append((shard, self._worker(shard, tell)))
        written = self._taken(len(self._ended) - 1)
        return written + ([] if _is_under_way(self._ended[0][1]) else self._taken(1))

    def finish(self) -> list[tuple[int, Record]]:
        """Wait for the shard that is being written, if there is one; as `do` returns it."""
        return self._taken(len(self._ended))

    def _taken(self, count: int) -> list[tuple[int, Record]]:
        taken = []
        for _ in range(count):
            shard, end = self._ended.popleft()
            taken.append((shard, end.result() if isinstance(end, Future) else end))
        return taken

    def wait(self) -> None:
        """See that nothing is being written any more, however that ended."""
        wait([end for _, end in self._ended if isinstance(end, Future)])


def _is_under_way(end: Record | Future[Record]) -> bool:
    return isinstance(end, Future) and not end.done()


class ShardActor:
    """The process of a worker, which it makes when it is given its first shard."""

    _worker: OneBehind | None = None
    _lost = False

    def __init__(self) -> None:
        heed_end_signal()

    def ready(self) -> None:
        """Returns as soon as the process is up, which ends for another one if it is lost."""
        if self._lost:
            os._exit(1)

    def call(self, work: Callable[[], Any]) -> Any:
        """What a function returns."""
        return work()

    def work(self, make_worker: Callable[[], ShardWorker], tally: Any, shard: int | None) -> str:
        """Do a shard, or wait until what was done is written; a reply for `written_shards`.

        What the worker raises is a reply too: Ray would hand on its text alone.

        Args:
            make_worker: Makes the worker, if there is none yet.
            tally: Handle of the actor that is told how many images are done.
            shard: Number of the shard; None if there is none to do.
        """
        return json.dumps(self._reply(make_worker, tally, shard))

    def _reply(self, make_worker: Callable[[], ShardWorker], tally: Any, shard: int | None) -> Any:
        host = socket.gethostname()
        name = f"{host}:{os.getpid()}"
        try:
            self._worker = self._worker or OneBehind(make_worker())
            if shard is None:
                written = self._worker.finish()
            else:
                told = functools.partial(tally.tell.remote, shard)
                written = self._worker.do(shard, lambda images: told(images, name))
        except (WorkerLostError, MemoryError) as error:
            self._lost = True
            if self._worker is not None:
                self._worker.wait()
            kind = _LOST if isinstance(error, WorkerLostError) else _FULL
            return {kind: str(error), "host": host}
        except UserError as error:
            return {_REFUSED: type(error).__name__, "message": str(error), "host": host}
        except OSError as error:
            place = f" {error.filename}" if error.filename else ""
            message = f"the system refused{place}: {error.strerror or error}"
            return {_REFUSED: "UserError", "message": message, "host": host}
        except Exception:
            return {_BROKEN: traceback.format_exc()}
        return [(number, {**record, "worker": name}) for number, record in written]


def written_shards(reply: str, address: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Number and record of each shard in an actor's reply, or raises what its worker raised.

    Args:
        reply: As `ShardActor.work` gave it.
        address: Of the cluster, where the host is told too; None on this machine.

    Raises:
        WorkerLostError: The actor must not be given shards before it is `ShardActor.ready` again;
            a `WorkerFullError` where its memory ran out.
    """
    told = json.loads(reply)
    if isinstance(told, list):
        return [(shard, record) for shard, record in told]
    where = "" if address is None or _BROKEN in told else f"on {told['host']}: "
    if _LOST in told:
        raise WorkerLostError(f"{where}{told[_LOST]}")
    if _FULL in told:
        reason = f" ({told[_FULL]})" if told[_FULL] else ""
        raise WorkerFullError(f"{where}memory ran out{reason}: fewer --workers need less of it")
    if _REFUSED in told:
        raise getattr(errors, told[_REFUSED])(f"{where}{told['message']}")
    raise RuntimeError(f"a worker failed:\n{told[_BROKEN]}")
