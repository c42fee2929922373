import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from semmae.errors import MismatchError, SettingError
from semmae.pipeline.options import (
    FREE_ON_RESUME,
    TrainingOptions,
    choose_device,
    plain_options,
    refuse_difference,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", -4),
        ("micro_batch", -1),
        ("base_learning_rate", 0.0),
        ("base_learning_rate", math.inf),
        ("base_learning_rate", math.nan),
        ("warmup_epochs", -0.5),
        ("warmup_epochs", math.nan),
        ("weight_decay", -1e-9),
        ("clip_gradients", math.inf),
        ("precision", "fp16"),
        ("loader_workers", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("checkpoint_epochs", 0),
        ("checkpoint_steps", -1),
        ("keep_checkpoints", -1),
        ("log_steps", 0),
    ],
)
def test_training_options__name_flag_and_value_of_what_cannot_be(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"output": Path("run"), name: value}
    with pytest.raises(SettingError) as raised:
        TrainingOptions(**settings)
    assert str(raised.value).startswith(f"--{name.replace('_', '-')} is {value}: expected ")


def test_training_options__take_the_ends_of_their_ranges() -> None:
    TrainingOptions(
        output=Path("run"), epochs=1, batch_size=1, warmup_epochs=0, seed=2**63 - 1, log_steps=1
    )


def test_free_on_resume__names_options_that_exist() -> None:
    names = set(plain_options(TrainingOptions(output=Path("run"))))
    assert FREE_ON_RESUME - {"data", "parts", "recompute"} <= names


def test_plain_options__are_json() -> None:
    @dataclass
    class Some:
        path: Path
        sizes: tuple[int, list[Path]]
        nothing: None = None

    plain = plain_options(Some(Path("a/b"), (1, [Path("c")])))
    assert plain == {"path": "a/b", "sizes": [1, ["c"]], "nothing": None}
    assert json.loads(json.dumps(plain)) == plain


def test_refuse_difference__names_old_and_new() -> None:
    old, new = {"a": 1, "gone": 2, "output": "x"}, {"a": 3, "fresh": None, "output": "y"}
    with pytest.raises(MismatchError, match="--a was 1, is 3; --gone was 2, is None; take"):
        refuse_difference(Path("run"), "tiny", old, new, options=True)
    with pytest.raises(MismatchError, match="; output was x, is y; take"):
        refuse_difference(Path("run"), "tiny", old, new, options=False)
    refuse_difference(Path("run"), "tiny", {"seed": 1}, {"seed": 1, "output": "z"}, options=True)


def test_choose_device__says_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "abacus", ""):
        with pytest.raises(SettingError, match=f"--device is {name}"):
            choose_device(name)


def test_choose_device__gives_each_process_of_a_machine_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("auto") == choose_device("cuda") == torch.device(f"cuda:{rank}")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingError, match="cuda:2, but the CUDA devices here are 2: start as"):
        choose_device("auto")


@pytest.mark.parametrize("local", [{}, {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_choose_device__has_an_index_in_one_process_a_node(
    local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == torch.device("cuda")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", **local}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")


def test_choose_device__names_the_one_gpu_that_each_process_may_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SettingError, match=r"cuda:3, but the .* here are 1: use cuda:0 where"):
        choose_device("auto")
    assert choose_device("cuda:0") == torch.device("cuda:0")
