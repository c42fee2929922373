"""Extraction while workers die."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from semmae.errors import UserError
from semmae.stages import shard_images
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.shard_images import TRIES
from semmae.storage.part_store import PartStore
from semmae.storage.part_tries import begin_try
from semmae.tests.stages.poison import HANGING, POISON, poisoned_load
from semmae.tests.world import World, lasting_bytes


class PoisonedWorker(ExtractionWorker):
    load = staticmethod(poisoned_load)


def end_of(work: Callable[[], object]) -> int:
    """Do work in a child process; the signal that ended it, 0 if it ended well."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.fixture(scope="module")
def poisoned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the world with one that kills in the second of three shards."""
    data = tmp_path_factory.mktemp("poisoned") / "images"
    shutil.copytree(world.data, data)
    keys = PartStore.open(world.store).meta(["key"])["key"].to_pylist()
    (data / keys[40]).write_bytes(POISON + b" and more")
    return data


def options_for(world: World, data: Path, output: Path, workers: int = 0) -> ExtractPartsOptions:
    return ExtractPartsOptions(
        data=str(data), learner=world.learner, output=output, workers=workers
    )


@pytest.fixture(scope="module")
def quarantined(
    world: World, poisoned: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The store of the poisoned images, and how each run that made it ended."""
    output = tmp_path_factory.mktemp("quarantine") / "store"
    options = options_for(world, poisoned, output)
    ends = []
    while not (output / "complete.json").exists():
        ends.append(end_of(lambda: extract_parts(options, PoisonedWorker)))
    return output, ends


def test_poison__costs_its_shard_three_tries_and_ends_as_one_bad_row(
    world: World, quarantined: tuple[Path, list[int]]
) -> None:
    output, ends = quarantined
    assert ends == [signal.SIGKILL] * 3 + [0]
    meta = pd.read_parquet(output / "meta")
    bad = meta[meta["status"] == "bad"]
    assert bad["index"].tolist() == [40]
    assert bad["error_code"].tolist() == ["fatal"]
    assert "SIGKILL" in bad["error"].iloc[0]
    assert bad["crc32"].iloc[0] != 0
    assert not any((output / "runs" / "tries").iterdir())


def test_poison__leaves_the_maps_of_all_other_images_alone(
    world: World, quarantined: tuple[Path, list[int]]
) -> None:
    there, here = PartStore.open(quarantined[0]), PartStore.open(world.store)
    same = (there.labels() == here.labels()).all(axis=(1, 2))
    assert same.tolist() == [index != 40 for index in range(72)]


def test_poison__is_decoded_again_by_an_update(
    world: World, poisoned: Path, quarantined: tuple[Path, list[int]], tmp_path: Path
) -> None:
    options = options_for(world, poisoned, tmp_path / "new")
    extract_parts(replace(options, update=quarantined[0]))  # by a decoder that it does not kill
    (bad,) = PartStore.open(tmp_path / "new").meta(["status", "error_code"]).to_pylist()[40:41]
    assert bad["status"] == "bad"
    assert bad["error_code"] != "fatal"


@pytest.mark.xdist_group("ray")
def test_poison__under_ray_ends_as_the_same_store(
    world: World, poisoned: Path, quarantined: tuple[Path, list[int]], tmp_path: Path
) -> None:
    options = options_for(world, poisoned, tmp_path / "store", workers=2)
    for shard in (0, 1, 2) * (TRIES - 1):  # each death costs an actor's start
        begin_try(tmp_path / "store", shard, "earlier")
    extract_parts(options, PoisonedWorker)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(quarantined[0])


def test_hanging__ends_the_process_and_after_three_tries_is_one_bad_row(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "images", tmp_path / "store"
    shutil.copytree(world.data, data)
    keys = PartStore.open(world.store).meta(["key"])["key"].to_pylist()
    (data / keys[40]).write_bytes(HANGING + b" and more")
    options = replace(options_for(world, data, output), decode_timeout=4.0)
    assert end_of(lambda: extract_parts(options, PoisonedWorker)) == signal.SIGALRM
    assert f"decoding {keys[40]} does not end within --decode-timeout 4 s" in capfd.readouterr().err
    assert len([try_ for try_ in (output / "runs/tries").iterdir() if "00001." in try_.name]) == 1
    for _ in range(TRIES - 1):
        begin_try(output, 1, "earlier")
    extract_parts(options, PoisonedWorker)
    meta = pd.read_parquet(output / "meta")
    bad = meta[meta["status"] == "bad"]
    assert bad["index"].tolist() == [40]
    assert bad["error_code"].tolist() == ["hanging"]
    assert bad["error"].tolist() == ["decoding it does not end"]
    same = (PartStore.open(output).labels() == PartStore.open(world.store).labels()).all(
        axis=(1, 2)
    )
    assert same.tolist() == [index != 40 for index in range(72)]


def test_a_shard_that_ends_its_worker_for_no_image_is_given_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(world, Path(world.data), tmp_path / "store")
    with pytest.raises(ZeroDivisionError):
        extract_parts(options, lambda settings: 1 / 0)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(shard_images, "MOST_TRIES", 0)
    with pytest.raises(UserError, match=r"shard 0 of .* ended its worker 0 times"):
        extract_parts(options)
    monkeypatch.undo()
    extract_parts(options)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)
