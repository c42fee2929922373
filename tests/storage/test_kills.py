"""A writer killed at any moment: before, within and after every single thing it does to a disk."""

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from semmae.storage.part_check import committed_shards, complete_store, damaged_shards
from semmae.storage.part_tries import begin_try, forget_tries
from semmae.storage.part_writer import create_store, uncommit, write_shard

if TYPE_CHECKING:
    from .conftest import Example


@pytest.fixture(scope="module")
def small(example: "Example") -> "Example":
    """A store of two shards, the second one partial."""
    identity = replace(example.identity, images=11, probabilities=False)
    return replace(example, identity=identity, plan=example.plan.slice(0, 11))


def run(example: "Example", path: Path) -> None:
    """What a command does to a store, as `stages.store_filling` does it."""
    create_store(path, example.identity, example.plan, example.names)
    if not (path / "complete.json").exists():
        uncommit(path, damaged_shards(path))
    for shard in sorted(set(range(example.identity.shards)) - committed_shards(path)):
        begin_try(path, shard, "run")
        labels, meta, attention, _ = example.content(shard, example.identity)
        write_shard(path, shard, labels, meta, attention)
        forget_tries(path, shard)
    complete_store(path)


def dies_at(moment: int, work: Callable[[], None]) -> bool:
    """Do work in a child that kills itself at its n-th act on the disk; whether it was killed."""
    child = os.fork()
    if child == 0:
        count = 0

        def act() -> None:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def watched(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                act()
                return real(*args, **kwargs)

            return call

        def write_bytes(self: Path, data: bytes) -> int:
            with self.open("wb") as file:
                for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
                    act()
                    file.write(piece)
                    file.flush()
            return len(data)

        try:
            for name in ("replace", "unlink", "mkdir"):
                setattr(Path, name, watched(getattr(Path, name)))
            os.fsync = watched(os.fsync)
            Path.write_bytes = write_bytes  # type: ignore[method-assign,assignment]
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def lasting(example: "Example", path: Path) -> dict[str, str]:
    """Digests of a store without what killed writers and earlier runs leave beside it."""
    found = example.digests(path).items()
    return {k: v for k, v in found if not k.startswith("runs/") and not k.endswith(".tmp")}


def test_a_writer_killed_at_any_moment__is_made_good_by_running_again(
    small: "Example", tmp_path: Path
) -> None:
    """Each act of set-up, shards and completion in turn is the last one."""
    run(small, tmp_path / "whole")
    whole = lasting(small, tmp_path / "whole")
    moment, killed = 0, True
    while killed:
        path = tmp_path / str(moment)
        killed = dies_at(moment, lambda path=path: run(small, path))  # type: ignore[misc]
        run(small, path)
        assert lasting(small, path) == whole, moment
        moment += 1
    assert moment > 80


def test_a_writer_killed_while_it_makes_good__is_made_good_in_turn(
    small: "Example", tmp_path: Path
) -> None:
    """Killed ever again, and the disk loses something meanwhile."""
    run(small, tmp_path / "whole")
    path = tmp_path / "store"
    for moment in [*range(2, 120, 7)] * 2:
        dies_at(moment, lambda: run(small, path))
        place = path / f"parts.zarr/labels/c/{moment % 2}/0/0"
        if place.exists() and not (path / "complete.json").exists():
            place.write_bytes(place.read_bytes()[:-1])
    run(small, path)
    assert lasting(small, path) == lasting(small, tmp_path / "whole")
