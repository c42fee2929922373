from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semmae.errors import MismatchError, SettingError
from semmae.pipeline.training import fit
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.tests.pipeline.tiny import PER_EPOCH, STEPS, KilledError, TinyTask, averages, options

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY: dict[str, Any] = {"checkpoint_steps": 1, "keep_checkpoints": 0}


def states_of(run: Path) -> list[dict[str, Any]]:
    return [load_checkpoint(path) for _, path in checkpoints(run)]


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_fit__averages_weights_with_a_warm_up(decay: float, tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in TinyTask().model.state_dict().items()}
    fit(TinyTask(), options(tmp_path, ema=decay, **EVERY))
    states = states_of(tmp_path)
    for state, expected in zip(states, averages(start, states, decay), strict=True):
        assert state["ema"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state["ema"][name].double(), value, rtol=1e-5, atol=1e-6)
    last = states[-1]
    assert not torch.equal(last["ema"]["0.weight"], last["model"]["0.weight"])


def test_fit__averages_nothing_that_does_not_train(tmp_path: Path) -> None:
    class Partly(TinyTask):
        def __init__(self) -> None:
            super().__init__()
            self.first.bias.requires_grad_(False)
            self.model.append(nn.BatchNorm1d(1))

    fit(Partly(), options(tmp_path, ema=0.9))
    state = load_checkpoint(checkpoints(tmp_path)[-1][1])
    assert state["ema"].keys() == state["model"].keys()
    alike = {
        name for name, value in state["ema"].items() if torch.equal(value, state["model"][name])
    }
    assert alike == {"0.bias", "4.running_mean", "4.running_var", "4.num_batches_tracked"}


def test_fit__training_is_the_same_with_an_average(tmp_path: Path) -> None:
    plain = load_checkpoint(fit(TinyTask(), options(tmp_path / "plain")))
    averaged = load_checkpoint(fit(TinyTask(), options(tmp_path / "averaged", ema=0.99)))
    assert "ema" not in plain
    assert all(torch.equal(averaged["model"][name], w) for name, w in plain["model"].items())


def test_fit__refuses_another_decay_on_resume(tmp_path: Path) -> None:
    task = TinyTask()
    task.fails_at = PER_EPOCH + 1
    with pytest.raises(KilledError):
        fit(task, options(tmp_path))
    with pytest.raises(MismatchError, match=r"--ema was 0.0, is 0.9"):
        fit(TinyTask(), options(tmp_path, ema=0.9))
    fit(TinyTask(), options(tmp_path))
    assert checkpoints(tmp_path)[-1][0] == STEPS


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_training_options__refuse_a_decay_that_cannot_be(ema: float, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--ema is .*: expected from 0 to below 1"):
        options(tmp_path, ema=ema)
