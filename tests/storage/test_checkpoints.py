import argparse
import os
import pickle
import signal
import time
from collections import OrderedDict
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from semmae.errors import DamageError, MissingError, UserError
from semmae.storage.checkpoints import (
    FORMAT,
    checkpoints,
    file_hash,
    load_checkpoint,
    prune_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
    weight_file,
)


def state(step: int) -> dict[str, Any]:
    return {
        "kind": "tiny",
        "model": OrderedDict(weight=torch.arange(400.0) + step, half=torch.ones(3).bfloat16()),
        "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"lr": 0.1}]},
        "step": step,
        "options": {"output": "run", "sizes": [1, 2], "scale": (0.2, 1.0), "none": None},
    }


def test_save_checkpoint__comes_back_equal_with_weights_only(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, state(7))
    direct = torch.load(path, weights_only=True)
    for found in (load_checkpoint(path), direct):
        assert found["options"] == state(7)["options"]
        assert found["optimizer"]["param_groups"] == [{"lr": 0.1}]
        assert torch.equal(found["model"]["weight"], state(7)["model"]["weight"])
        assert found["model"]["half"].dtype == torch.bfloat16


@pytest.mark.parametrize("foreign", [np.float64(1), Path("a"), {1, 2}, argparse.Namespace()])
def test_save_checkpoint__refuses_what_would_not_load(tmp_path: Path, foreign: object) -> None:
    with pytest.raises(TypeError, match=r"state\.options\.deep\.1 is a"):
        save_checkpoint(tmp_path, 1, {**state(1), "options": {"deep": [0, foreign]}})
    assert checkpoints(tmp_path) == []


def test_weight_file__equal_states_have_equal_files_that_load_with_weights_only(
    tmp_path: Path,
) -> None:
    assert weight_file(state(7)) == weight_file(state(7)) != weight_file(state(8))
    (tmp_path / "a.pth").write_bytes(weight_file(state(7)))
    for found in (
        torch.load(tmp_path / "a.pth", weights_only=True),
        load_checkpoint(tmp_path / "a.pth"),
    ):
        assert torch.equal(found["model"]["weight"], state(7)["model"]["weight"])
    with pytest.raises(TypeError, match=r"state\.args is a Namespace"):
        weight_file({"args": argparse.Namespace()})


def test_checkpoints__are_in_order_of_steps(tmp_path: Path) -> None:
    steps = [100_000_000, 3, 20, 99_999_999]
    for step in steps:
        save_checkpoint(tmp_path, step, state(step))
    for stray in (".step-00000099.pt.abc.tmp", "step-00000098.pt.bak", "step-97.pt", "best.pt"):
        (tmp_path / "checkpoints" / stray).write_bytes(b"stray")
    assert [step for step, _ in checkpoints(tmp_path)] == sorted(steps)
    assert load_checkpoint(resolve_checkpoint(tmp_path))["step"] == 100_000_000
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("keep", [1, 2, 5, 9])
def test_prune_checkpoints__keeps_the_newest(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, state(step))
    prune_checkpoints(tmp_path, keep)
    assert [step for step, _ in checkpoints(tmp_path)] == list(range(1, 6))[-keep:]


def test_prune_checkpoints__keeps_all_at_0(tmp_path: Path) -> None:
    for step in range(1, 4):
        save_checkpoint(tmp_path, step, state(step))
    prune_checkpoints(tmp_path, 0)
    assert len(checkpoints(tmp_path)) == 3


@pytest.mark.parametrize("where", ["half-written", "replace", "refused"])
def test_save_checkpoint__leaves_the_older_one_when_killed(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, state(1))

    def half(data: object, opened: BinaryIO) -> None:
        opened.write(b"PK half")
        raise KeyboardInterrupt

    def refused(data: object, opened: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "replace":
            patched.setattr(Path, "replace", killed)
        else:
            patched.setattr(torch, "save", half if where == "half-written" else refused)
        with pytest.raises((KeyboardInterrupt, UserError)):
            save_checkpoint(tmp_path, 2, state(2))
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    assert load_checkpoint(resolve_checkpoint(tmp_path))["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


@pytest.mark.parametrize("room", [500, 1 << 16])
def test_save_checkpoint__tells_in_a_sentence_that_it_finds_no_room(
    tmp_path: Path, room: int
) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    larger = {**state(2), "more": torch.zeros(1 << 16)}
    limits, handler = getrlimit(RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    setrlimit(RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*step-00000002\.pt: File too large; "):
            save_checkpoint(tmp_path, 2, larger)
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]
    assert load_checkpoint(resolve_checkpoint(tmp_path))["step"] == 1
    save_checkpoint(tmp_path, 2, larger)
    assert load_checkpoint(resolve_checkpoint(tmp_path))["step"] == 2


def test_load_checkpoint__finds_every_damage(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 1, state(1)).read_bytes()
    place = tmp_path / "damaged.pt"
    generator = np.random.default_rng(0)
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        place.write_bytes(whole[:length])
        with pytest.raises(DamageError, match=r"damaged\.pt") as raised:
            load_checkpoint(place)
        assert "\n" not in str(raised.value)
    first = whole.index(torch.arange(400.0)[101:111].numpy().tobytes())
    for offset in generator.integers(first, first + 1100, 20):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << int(generator.integers(8))
        place.write_bytes(flipped)
        with pytest.raises(DamageError, match=r"damaged\.pt"):
            load_checkpoint(place)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_load_checkpoint__runs_no_code(tmp_path: Path, kind: str) -> None:
    trace, place = tmp_path / "ran", tmp_path / "bomb.pth"
    content = {"model": Bomb(trace)}
    if kind == "pickle":
        place.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, place, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DamageError, match="not opened because they can run code") as raised:
        load_checkpoint(place)
    assert not trace.exists()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["text", "list", "text as safetensors"])
def test_load_checkpoint__refuses_what_is_no_dict_of_weights(tmp_path: Path, content: str) -> None:
    place = tmp_path / ("a.safetensors" if content.endswith("safetensors") else "a.pt")
    if content == "list":
        torch.save([torch.ones(1)], place)
    else:
        place.write_text("not weights at all\n")
    with pytest.raises(DamageError, match=str(place)):
        load_checkpoint(place)


def test_load_checkpoint__reads_the_files_of_mae(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1.5e-4, model="mae_vit_base_patch16", resume="")
    for zipped in (False, True):
        place = tmp_path / f"mae-{zipped}.pth"
        content = {"model": {"cls_token": torch.ones(1, 1, 4)}, "epoch": 799, "args": args}
        torch.save(content, place, _use_new_zipfile_serialization=zipped)
        found = load_checkpoint(place)
        assert found["args"].model == "mae_vit_base_patch16"
        assert torch.equal(found["model"]["cls_token"], torch.ones(1, 1, 4))


def test_load_checkpoint__reads_safetensors_with_their_metadata(tmp_path: Path) -> None:
    place = tmp_path / "a.safetensors"
    metadata = {"format": "pt", "architecture": "{}", "model": "vit"}
    save_file({"weight": torch.arange(3.0)}, str(place), metadata)
    found = load_checkpoint(place)
    assert torch.equal(found["model"]["weight"], torch.arange(3.0))
    assert found["architecture"] == "{}"
    place.write_bytes(place.read_bytes()[:-4])
    with pytest.raises(DamageError, match="damaged"):
        load_checkpoint(place)


def test_load_checkpoint__refuses_a_newer_format(tmp_path: Path) -> None:
    torch.save({"format": FORMAT + 1, "model": {}}, tmp_path / "new.pt")
    with pytest.raises(DamageError, match="newer semmae"):
        load_checkpoint(tmp_path / "new.pt")


def test_resolve_checkpoint__says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path / "empty")
    for name in ("gone", "gone.pt", "gone.safetensors"):
        with pytest.raises(MissingError, match="no checkpoint at"):
            resolve_checkpoint(tmp_path / name)
        with pytest.raises(MissingError, match="no checkpoint at"):
            load_checkpoint(tmp_path / name)


def test_file_hash__is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "a") == expected


def test_save_checkpoint__makes_room_first(tmp_path: Path) -> None:
    old = tmp_path / "checkpoints" / f".step-00000001.pt.{'0' * 32}.tmp"
    save_checkpoint(tmp_path, 1, {})
    for age in (0.0, time.time()):
        old.write_bytes(b"half")
        os.utime(old, (age, age))
        save_checkpoint(tmp_path, 2, {})
        assert old.exists() == bool(age)
