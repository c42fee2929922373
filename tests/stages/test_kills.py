"""An extraction killed at any moment: before, within and after every single thing that it does to a
disk, and while it decodes."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from semmae.pipeline import image_loading
from semmae.pipeline.decoding import decode_image
from semmae.pipeline.image_loading import LoadedImage
from semmae.stages import extraction_identity, extraction_worker, shard_images
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.networks import open_learner
from semmae.storage.image_cache import ImageCacheWriter
from semmae.tests.world import World, lasting_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Quick(ExtractionWorker):
    """A worker whose part maps are a plain function of the pixels, so that it takes no time."""

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        made, grid = self._nothing(), self.identity.grid
        pixels = self._batch(loaded)[:, :: 32 // grid[0], :: 32 // grid[1], 0]
        made["labels"] = pixels[:, : grid[0], : grid[1]] % self.identity.parts
        return made


@pytest.fixture
def run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], dict[str, Any]]:
    """Extracts 34 images, a bad one among them, into a store of two shards with an image cache."""
    data = tmp_path / "images"
    data.mkdir()
    for number, image in enumerate(sorted(Path(world.data, "train").rglob("*.png"))[:34]):
        cut = 100 if number == 3 else None
        (data / f"{number:02d}.png").write_bytes(image.read_bytes()[:cut])
    # What a killed process wrote stands; only a machine that fails would lose it.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    trained = open_learner(world.learner)
    for module in (extraction_identity, extraction_worker):
        monkeypatch.setattr(module, "open_learner", lambda path: trained)

    def extract(output: Path) -> dict[str, Any]:
        options = ExtractPartsOptions(
            data=str(data),
            learner=world.learner,
            output=output,
            cache_images=24,
            batch_size="16",
            decode_timeout=0,
            device="cpu",
        )
        return extract_parts(options, Quick)

    return extract


def dies_at(moment: int, work: Callable[[], object]) -> bool:
    """Do work in a child that kills itself at its n-th act; whether it was killed.

    Acts are what is done to the disk, in halves where bytes are written, and some of the decodings.
    They come from several threads, so which one is the n-th may differ from time to time.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def act() -> None:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def watched(real: Any, every: int = 1) -> Any:
            calls = 0

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if calls % every == 0:
                    act()
                calls += 1
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
            image_loading.decode_image = watched(decode_image, every=8)  # type: ignore[attr-defined]
            ImageCacheWriter._write = watched(ImageCacheWriter._write, every=8)  # type: ignore[method-assign]
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


def test_extract_parts__killed_at_any_moment_is_made_good_by_running_again(
    run: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Each act of set-up, shards and completion in turn is the last one."""
    record = run(tmp_path / "whole")
    assert (record["ok"], record["bad"]) == (33, 1)
    whole = lasting_bytes(tmp_path / "whole")
    assert {"images/00000.jpeg", "commits/00001.json", "complete.json"} <= whole.keys()
    moment, killed = 0, True
    while killed:
        path = tmp_path / str(moment)
        killed = dies_at(moment, lambda path=path: run(path))  # type: ignore[misc]
        run(path)
        assert lasting_bytes(path) == whole, moment
        moment += 1
    assert moment > 80


def test_extract_parts__killed_while_it_makes_good_is_made_good_in_turn(
    run: Callable[[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed ever again, and the disk loses something meanwhile."""
    # Its images are not looked through for one that kills, in processes that take long to start.
    monkeypatch.setattr(shard_images, "TRIES", 1000)
    run(tmp_path / "whole")
    path = tmp_path / "store"
    for moment in range(2, 110, 9):
        dies_at(moment, lambda: run(path))
        place = path / f"parts.zarr/labels/c/{moment % 2}/0/0"
        if place.exists() and not (path / "complete.json").exists():
            place.write_bytes(place.read_bytes()[:-1])
    run(path)
    assert lasting_bytes(path) == lasting_bytes(tmp_path / "whole")
