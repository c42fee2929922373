"""Shards that are written while the next one is made."""

import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from semmae.errors import UserError
from semmae.pipeline.image_loading import LoadedImage
from semmae.stages import shard_writing
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.store_filling import commit_shard
from semmae.storage.part_tries import begin_try
from semmae.tests.world import World, lasting_bytes

LONG = 20.0
"""Seconds after which what is waited for counts as never coming."""

Log = list[tuple[str, int]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What happens, in order: ``encode``, ``write`` and ``written`` of each shard, of batches of 32
    images, which are whole shards here."""
    happened: Log = []
    encode = ExtractionWorker._encode_all

    def encode_all(self: ExtractionWorker, made: shard_writing.MadeShard, tell: Any) -> None:
        happened.append(("encode", made.shard))
        encode(self, made, tell)
        happened.append(("encoded", made.shard))

    monkeypatch.setattr(ExtractionWorker, "_encode_all", encode_all)
    return happened


def watched_commit(
    log: Log, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]
) -> None:
    """Calls ``before`` when a shard is to be committed."""

    def commit(output: Path, shard: int, *rest: Any, **arrays: Any) -> dict[str, Any]:
        log.append(("write", shard))
        before(shard)
        record = commit_shard(output, shard, *rest, **arrays)
        log.append(("written", shard))
        return record

    monkeypatch.setattr(shard_writing, "commit_shard", commit)


def options_for(world: World, output: Path) -> ExtractPartsOptions:
    return ExtractPartsOptions(data=world.data, learner=world.learner, output=output)


def until(log: Log, what: tuple[str, int]) -> None:
    """Wait until something has happened."""
    waited = threading.Event()
    for _ in range(int(LONG / 0.01)):
        if what in log:
            return
        waited.wait(0.01)
    raise AssertionError(f"{what} never came after {log}")


def test_extract_parts__a_shard_is_written_while_the_next_is_made(
    world: World, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shard 0 is written only once shard 1 is made, and shard 1 once shard 2 is.
    watched_commit(
        log, monkeypatch, lambda shard: until(log, ("encoded", shard + 1)) if shard < 2 else None
    )
    extract_parts(options_for(world, tmp_path / "store"))
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)
    # No more than one made shard waits for another that is being written.
    assert log.index(("written", 0)) < log.index(("encode", 2))


def test_extract_parts__a_shard_that_cannot_be_written_ends_the_next_one(
    world: World, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: int) -> None:
        until(log, ("encode", 1))
        raise UserError("cannot write it: No space left on device")

    class Waits(ExtractionWorker):
        def _encode(self, loaded: list[LoadedImage], precision: str = "") -> Any:
            if ("encode", 1) in log:
                assert self._writer._under_way is not None
                wait([self._writer._under_way], LONG)
            return super()._encode(loaded, precision)

    watched_commit(log, monkeypatch, full)
    with pytest.raises(UserError, match="No space left on device"):
        extract_parts(options_for(world, tmp_path / "store"), Waits)
    # Found between two batches of shard 1, not at its end.
    assert log == [("encode", 0), ("encoded", 0), ("write", 0), ("encode", 1)]
    assert not (tmp_path / "store/commits").exists()


def test_extract_parts__broken_off_leaves_nothing_being_written(
    world: World, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(ExtractionWorker):
        def _encode(self, loaded: list[LoadedImage], precision: str = "") -> Any:
            if ("encode", 1) in log:
                raise KeyboardInterrupt
            return super()._encode(loaded, precision)

    watched_commit(log, monkeypatch, lambda shard: until(log, ("encode", 1)))
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options_for(world, tmp_path / "store"), Breaks)
    assert log[-1] == ("written", 0)
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_extract_parts__a_shard_begun_before_is_begun_when_nothing_is_being_written(
    world: World, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an image that kills costs no other shard a try."""
    begin_try(tmp_path / "store", 1, "earlier")
    watched_commit(log, monkeypatch, lambda shard: None)
    extract_parts(options_for(world, tmp_path / "store"))
    assert log.index(("written", 0)) < log.index(("encode", 1))
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)


def test_extract_parts__a_shard_that_another_committed_meanwhile_is_not_made_again(
    world: World, tmp_path: Path, log: Log
) -> None:
    class Late(ExtractionWorker):
        """A worker that has a double which does shard 1 first."""

        def __call__(self, shard: int, tell: Any = print) -> Any:
            if shard == 0:
                begin_try(self._settings.output, 1, "other")
                ExtractionWorker(self._settings)(1).result()
            return super().__call__(shard, tell)

    record = extract_parts(options_for(world, tmp_path / "store"), Late)
    assert [shard for what, shard in log if what == "encode"] == [1, 0, 2]
    assert record["ok"] == 72
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)
    assert not any((tmp_path / "store/runs/tries").iterdir())


def test_shard_writer__holds_what_one_shard_needs(world: World, tmp_path: Path) -> None:
    """Once a shard is written its arrays are gone."""
    import gc
    import weakref

    made: list[weakref.ref[Any]] = []

    class Marks(ExtractionWorker):
        def _encode_all(self, shard: shard_writing.MadeShard, tell: Any) -> None:
            super()._encode_all(shard, tell)
            made.append(weakref.ref(shard))

        def _encode(
            self, loaded: list[LoadedImage], precision: str = ""
        ) -> dict[str, torch.Tensor]:
            if len(made) == 2:
                gc.collect()
                assert made[0]() is None
            return super()._encode(loaded, precision)

    extract_parts(options_for(world, tmp_path / "store"), Marks)
    assert len(made) == 3
