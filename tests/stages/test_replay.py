import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from semmae import cli
from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.pipeline import dumping
from semmae.pipeline.feeding import Batch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.training import fit
from semmae.stages.pretrain import Pretraining, pretrain
from semmae.stages.replay import ReplayOptions, replay, replayed
from semmae.storage.dumps import read_dump
from semmae.tests.pipeline.tiny import PoisonedTask
from semmae.tests.world import World, pretrain_options


@pytest.fixture(scope="module")
def overflowing(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of dumps of a run whose second step overflows, since its first was too large."""
    run = tmp_path_factory.mktemp("overflowing") / "run"
    options = partial(pretrain_options, world, run, masking="semantic", parts=world.store)
    with pytest.raises(DamageError, match="in 2 steps in a row, to step 3 "):
        pretrain(options(base_learning_rate=1e31, micro_batch=4, skip_at_most=1))
    return run / "non-finite"


def test_replay__gives_the_same_loss_that_is_not_finite(overflowing: Path) -> None:
    for step in (2, 3):
        path = overflowing / f"step-{step:08d}.json"
        dump = read_dump(path)
        assert not all(math.isfinite(float(loss)) for loss in dump.record["losses"])
        found = replayed(dump, ReplayOptions(dump=path, device="cpu"))
        then = np.array([float(loss) for loss in dump.record["losses"]])
        np.testing.assert_array_equal(np.array(found.losses), then)
        told = replay(ReplayOptions(dump=path, device="cpu"))
        assert told["the same to the bit"] == "yes"
        assert told["images"] == 16
        assert found.broken is not None
        assert told["first output not finite"] == found.broken


def test_replay__finds_the_part_and_the_gradients(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three parts the finite losses and norms, too, are those of the run to the bit."""
    loss = Pretraining.loss

    def poisoned(task: Pretraining, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, scalars = loss(task, batch)
        if (batch["index"] == 11).any() and 0 < batch["alpha"].min() < 0.4:
            value = value + (task.model.get_parameter("decoder_pred.bias") * 0).sqrt().sum()
            value = value + math.inf * (batch["index"][0] >= 0)
        return value, scalars

    monkeypatch.setattr(Pretraining, "loss", poisoned)
    monkeypatch.setattr(dumping, "SMALL", 1000)  # as with larger crops, pixels are not kept
    options = partial(pretrain_options, world, tmp_path / "run", masking="semantic")
    path = pretrain(options(parts=world.store, micro_batch=4, epochs=2, predicted_share=0.5))
    assert path.exists()
    (written,) = (tmp_path / "run" / "non-finite").glob("*.json")
    dump = read_dump(written)
    assert dump.arrays.keys() == {"images.crc32", "mask", "alpha", "index", "parts", "predicted"}
    found = replayed(dump, ReplayOptions(dump=written, device="cpu"))
    assert sum(math.isinf(loss) for loss in found.losses) == 1
    assert found.losses == [float(loss) for loss in dump.record["losses"]]
    bad = [name for name, norm in found.norms.items() if not math.isfinite(norm)]
    assert bad == ["decoder_pred.bias"]
    norms = {name: float(norm) for name, norm in dump.record["gradient_norms"].items()}
    assert norms.keys() == found.norms.keys()
    np.testing.assert_array_equal([*norms.values()], [found.norms[name] for name in norms])
    part = [math.isinf(loss) for loss in found.losses].index(True)
    assert 11 in dump.arrays["index"][4 * part : 4 * part + 4]
    assert dump.record["samples"] == [
        sorted(
            p.relative_to(world.data).as_posix() for p in Path(world.data, "train").rglob("*.*")
        )[index]
        for index in dump.arrays["index"]
    ]


def test_replay__goes_by_images_and_weights_alone(overflowing: Path, world: World) -> None:
    """Weights that were finite again give a finite loss: nothing is read off the dump's result."""
    path = overflowing / "step-00000002.json"
    dump = read_dump(path)
    small = {name: array * np.float32(1e-32) for name, array in dump.weights.items()}
    found = replayed(dump._replace(weights=small), ReplayOptions(dump=path, device="cpu"))
    assert all(math.isfinite(loss) for loss in found.losses)
    assert found.broken is None


def moved(world: World, to: Path) -> Path:
    return Path(shutil.copytree(world.data, to / "images"))


def test_replay__takes_images_that_were_moved(
    overflowing: Path, world: World, tmp_path: Path
) -> None:
    data = str(moved(world, tmp_path))
    path = overflowing / "step-00000002.json"
    told = replay(ReplayOptions(dump=path, data=data, parts=world.store, device="cpu"))
    assert told["the same to the bit"] == "yes"


def test_replay__names_an_image_that_is_another_now(
    overflowing: Path, world: World, tmp_path: Path
) -> None:
    path = overflowing / "step-00000002.json"
    data = moved(world, tmp_path)
    key = read_dump(path).record["samples"][6]
    image = Image.open(data / key)
    size = (data / key).stat().st_size
    image.putpixel((16, 16), (1, 2, 3))
    image.save(data / key, compress_level=9)
    written = (data / key).read_bytes()
    (data / key).write_bytes(written.ljust(size, b"\0"))  # the plan knows the size
    with pytest.raises(MismatchError, match=f"images of {key} differ from those that step 2 saw"):
        replay(ReplayOptions(dump=path, data=str(data), device="cpu"))


def test_replay__refuses_what_it_cannot_compute(
    overflowing: Path, world: World, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 4, "device": "cpu", "loader_workers": 0}
    fit(PoisonedTask(3), TrainingOptions(output=tmp_path, **settings))
    with pytest.raises(SettingError, match="step of a 'tiny' run"):
        replay(ReplayOptions(dump=tmp_path / "non-finite" / "step-00000003.json"))
    with pytest.raises(MissingError, match="there is no record"):
        replay(ReplayOptions(dump=tmp_path / "step-00000003.json"))
    with pytest.raises(DamageError, match="is no dump"):
        replay(ReplayOptions(dump=overflowing.parent / "options.json"))
    few = moved(world, tmp_path)
    next(few.joinpath("train").rglob("*.*")).unlink()
    with pytest.raises(MismatchError, match="are others now"):
        replay(ReplayOptions(dump=overflowing / "step-00000002.json", data=str(few)))


def test_replay__is_a_command(
    overflowing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = overflowing / "step-00000003.json"
    argv = ["semmae", "stage2", "replay", str(path), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    told = capsys.readouterr().out
    assert f"step                     {json.loads(path.read_text())['step']}" in told
    assert "the same to the bit      yes" in told


def test_pretrain__goes_on_past_a_step_that_is_not_finite(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Pretraining.loss, []

    def poisoned(task: Pretraining, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(1)
        value, scalars = loss(task, batch)
        return value * (math.nan if len(calls) == 3 else 1.0), scalars

    monkeypatch.setattr(Pretraining, "loss", poisoned)
    path = pretrain(pretrain_options(world, tmp_path, epochs=2))
    state = torch.load(path, weights_only=True)
    assert state["guard"]["skipped"] == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_pretrain__takes_no_skipped_step_into_the_losses_by_alpha(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are huge, but finite: the gradients alone are not."""
    real, calls = Pretraining.loss, []

    def poisoned(task: Pretraining, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(1)
        if len(calls) != 3:  # the second step's first part
            return real(task, batch)
        with monkeypatch.context() as patched:
            losses = task._patch_losses
            patched.setattr(
                task, "_patch_losses", lambda *given: (losses(*given)[0] * 1e20, losses(*given)[1])
            )
            value, scalars = real(task, batch)
        return value + (task.model.get_parameter("decoder_pred.bias") * 0).sqrt().sum(), scalars

    monkeypatch.setattr(Pretraining, "loss", poisoned)
    options = partial(pretrain_options, world, tmp_path, masking="semantic", parts=world.store)
    pretrain(options(epochs=2, micro_batch=8, log_steps=100))
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] == 1
    by = [value for line in lines for name, value in line.items() if "loss_by_" in name]
    assert len(by) > 4
    assert max(by) < 1e6
