import gc
import json
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.pipeline import resuming
from semmae.pipeline.feeding import Batch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.training import fit
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.storage.leftovers import is_leftover
from semmae.tests.pipeline.tiny import (
    PER_EPOCH,
    STEPS,
    KilledError,
    TinyData,
    TinyTask,
    Whole,
    log_of,
    options,
    points_of,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("checkpoint_steps", [0, 2])
@pytest.mark.parametrize("by", ["loss", "data"])
def test_fit__resumes_to_the_bit_after_a_kill_at_any_step(
    by: str, checkpoint_steps: int, whole: Whole, tmp_path: Path
) -> None:
    for step in range(0, STEPS, 3 if by == "loss" else 7):
        chosen = options(tmp_path / f"run-{step}", checkpoint_steps=checkpoint_steps)
        killed = TinyTask()
        if by == "loss":
            killed.fails_at = step
        else:
            killed.data.fails_at = step
        with pytest.raises(KilledError):
            fit(killed, chosen)
        assert killed.seen == whole.task.seen[:step]
        again = TinyTask()
        path = fit(again, chosen)
        every = checkpoint_steps or PER_EPOCH
        done = max(step // every * every, step // PER_EPOCH * PER_EPOCH)
        assert again.seen == whole.task.seen[done:]
        assert same(path, whole.path)
        assert log_of(chosen.output) == log_of(whole.run)


def test_fit__resumes_to_the_bit_with_loader_workers(whole: Whole, tmp_path: Path) -> None:
    chosen = options(tmp_path / "run", checkpoint_steps=3, loader_workers=2)
    killed = TinyTask()
    killed.data.fails_at = 11
    with pytest.raises(RuntimeError, match="data"):
        fit(killed, chosen)
    assert killed.seen == whole.task.seen[:11]
    again = TinyTask()
    path = fit(again, chosen)
    assert again.seen == whole.task.seen[10:]
    assert same(path, whole.path)
    assert again.data.warmed == 1


def test_fit__survives_several_kills(whole: Whole, tmp_path: Path) -> None:
    chosen = options(tmp_path / "run", checkpoint_steps=1)
    for step in (2, 3, 5, 9, 15):
        killed = TinyTask()
        killed.data.fails_at = step
        with pytest.raises(KilledError):
            fit(killed, chosen)
    path = fit(TinyTask(), chosen)
    assert same(path, whole.path)
    assert log_of(chosen.output) == log_of(whole.run)
    kept = points_of(chosen.output, "train/learning_rate")
    assert [step for step, _ in kept] == list(range(1, STEPS + 1))


def test_fit__logs_each_point_once_through_kills(whole: Whole, tmp_path: Path) -> None:
    expected = log_of(whole.run, file="steps.jsonl")
    due = {*range(3, STEPS + 1, 3), *range(PER_EPOCH, STEPS + 1, PER_EPOCH)}
    assert [point["step"] for point in expected] == sorted(due)
    run = tmp_path / "run"
    for step in (PER_EPOCH + 2, 2 * PER_EPOCH + 4):
        killed = TinyTask()
        killed.fails_at = step if step < 2 * PER_EPOCH else step - PER_EPOCH
        with pytest.raises(KilledError):
            fit(killed, options(run))
        # A point that was half written when the process ended.
        with (run / "steps.jsonl").open("a") as opened:
            opened.write('{"step": 1, "lo')
    assert log_of(whole.run, file="steps.jsonl") == expected
    fit(TinyTask(), options(run))
    assert log_of(run, file="steps.jsonl") == expected
    for name in ("train/loss", "train/weight_norm", "speed/data_wait"):
        assert [step for step, _ in points_of(run, name)] == sorted(due)


@pytest.mark.parametrize("where", ["save", "replace"])
def test_fit__resumes_after_a_kill_while_a_checkpoint_is_written(
    where: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(tmp_path / "run")
    saves: list[str] = []
    with monkeypatch.context() as patched:
        target, name = (torch, "save") if where == "save" else (Path, "replace")
        original = getattr(target, name)

        def killed(*arguments: Any) -> Any:
            places = (getattr(a, "name", "") for a in arguments)  # of a path, or of an open file
            saves.extend(place for place in places if ".pt." in place)
            if len(saves) == 2:
                raise KeyboardInterrupt
            return original(*arguments)

        patched.setattr(target, name, killed)
        with pytest.raises(KeyboardInterrupt):
            fit(TinyTask(), chosen)
    assert [step for step, _ in checkpoints(chosen.output)] == [PER_EPOCH]
    assert same(fit(TinyTask(), chosen), whole.path)


def test_fit__does_nothing_more_to_a_finished_run(whole: Whole, tmp_path: Path) -> None:
    chosen = options(tmp_path / "run")
    fit(TinyTask(), chosen)
    task = TinyTask()
    task.first.weight.data.fill_(9)
    assert same(fit(task, chosen), whole.path)
    assert task.seen == []
    assert torch.equal(task.first.weight, load_checkpoint(whole.path)["model"]["0.weight"])


def test_fit__accumulates_the_same_batches(tmp_path: Path) -> None:
    one, two = TinyTask(dropout=0.0), TinyTask(dropout=0.0)
    fit(one, options(tmp_path / "one"))
    fit(two, options(tmp_path / "two", micro_batch=2))
    for step, (draws, loss) in enumerate(one.seen):
        halves = two.seen[2 * step : 2 * step + 2]
        assert halves[0][0] + halves[1][0] == draws
        # Sums of the same float32 terms in another order; the difference grows with the steps.
        assert (halves[0][1] + halves[1][1]) / 2 == pytest.approx(loss, rel=1e-4)


def test_fit__resumes_with_accumulation(tmp_path: Path) -> None:
    whole = TinyTask()
    expected = fit(whole, options(tmp_path / "whole", micro_batch=1))
    killed, chosen = TinyTask(), options(tmp_path / "run", micro_batch=1, checkpoint_steps=3)
    killed.fails_at = 4 * 8 + 2
    with pytest.raises(KilledError):
        fit(killed, chosen)
    again = TinyTask()
    assert same(fit(again, chosen), expected)
    assert again.seen == whole.seen[4 * 6 :]


# Refusals.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    run, task = tmp_path_factory.mktemp("halfway") / "run", TinyTask()
    task.fails_at = PER_EPOCH + 2
    with pytest.raises(KilledError):
        fit(task, options(run))
    return run


class OtherKind(TinyTask):
    kind = "other"


@pytest.mark.parametrize(
    ("task", "changes", "error", "said"),
    [
        (TinyTask, {"batch_size": 2}, MismatchError, r"--batch-size was 4, is 2"),
        (TinyTask, {"seed": 3}, MismatchError, r"--seed was 0, is 3"),
        (
            TinyTask,
            {"epochs": 9, "clip_gradients": 1.0},
            MismatchError,
            r"--clip-gradients was 0.0, is 1.0; --epochs was 4, is 9",
        ),
        (
            lambda: TinyTask(width=9),
            {},
            MismatchError,
            r"shape was .*8.*, is .*9.*width was 8, is 9",
        ),
        (
            lambda: TinyTask(TinyData(images=23)),
            {},
            MismatchError,
            r"other data: images 0+ then, 0+ now \(22 images then, 23 now\);",
        ),
        (OtherKind, {}, MismatchError, r"holds a run of kind 'tiny', this is 'other'"),
        (TinyTask, {"resume": "never"}, SettingError, r"--resume auto"),
        (TinyTask, {"batch_size": 23}, SettingError, r"--batch-size is 23, but there are 22"),
        (TinyTask, {"device": "abacus"}, SettingError, r"--device is abacus"),
        (TinyTask, {"device": "cuda:99"}, SettingError, r"--device is cuda:99"),
    ],
)
def test_fit__refuses_before_it_touches_the_folder(
    task: Any, changes: dict[str, Any], error: type[Exception], said: str, halfway: Path
) -> None:
    before = contents(halfway)
    with pytest.raises(error, match=said) as raised:
        fit(task(), options(halfway, **changes))
    assert "\n" not in str(raised.value)
    assert contents(halfway) == before


def test_fit__refuses_weights_that_do_not_fit(halfway: Path) -> None:
    class Grown(TinyTask):
        def __init__(self) -> None:
            super().__init__()
            self.model.append(nn.Linear(1, 1))

    before = contents(halfway)
    with pytest.raises(MismatchError, match="holds other weights"):
        fit(Grown(), options(halfway))
    assert contents(halfway) == before


def test_fit__refuses_another_kind_before_its_first_checkpoint(tmp_path: Path) -> None:
    task = TinyTask()
    task.fails_at = 0
    with pytest.raises(KilledError):
        fit(task, options(tmp_path))
    with pytest.raises(MismatchError, match="kind 'tiny'"):
        fit(OtherKind(), options(tmp_path))
    fit(TinyTask(), options(tmp_path, seed=5, resume="never"))


def test_fit__lets_free_options_change(whole: Whole, tmp_path: Path) -> None:
    killed = TinyTask()
    killed.fails_at = 8
    with pytest.raises(KilledError):
        fit(killed, options(tmp_path / "run"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    changed = options(
        moved,
        loader_workers=1,
        checkpoint_steps=4,
        checkpoint_epochs=2,
        keep_checkpoints=5,
        log_steps=1,
    )
    assert same(fit(TinyTask(), changed), whole.path)
    assert json.loads((moved / "options.json").read_text())["options"]["log_steps"] == 1


def test_fit__goes_on_in_the_precision_that_auto_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TinyTask()
    task.fails_at = 8
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(TrainingOptions, "precision_on", lambda options, device: "bf16")
        with pytest.raises(KilledError):
            fit(task, options(tmp_path))
    assert json.loads((tmp_path / "options.json").read_text())["options"]["precision"] == "bf16"
    with pytest.raises(MismatchError, match="--precision was bf16, is fp32"):
        fit(TinyTask(), options(tmp_path))
    path = fit(TinyTask(), options(tmp_path, precision="bf16"))
    assert load_checkpoint(path)["step"] == STEPS


def test_fit__points_at_the_checkpoint_before_a_damaged_one(whole: Whole, tmp_path: Path) -> None:
    chosen, task = options(tmp_path / "run"), TinyTask()
    task.fails_at = 2 * PER_EPOCH + 1
    with pytest.raises(KilledError):
        fit(task, chosen)
    newest = checkpoints(chosen.output)[-1][1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(DamageError, match=r"go on from step-00000005\.pt"):
        fit(TinyTask(), chosen)
    newest.unlink()
    assert same(fit(TinyTask(), chosen), whole.path)


@pytest.mark.parametrize("workers", [0, 1])
def test_fit__says_a_users_mistake_of_a_worker_in_one_sentence(
    workers: int, tmp_path: Path
) -> None:
    task = TinyTask()
    task.data.fails_at, task.data.error = 3, MissingError("the folder of images is gone")
    with pytest.raises(MissingError) as raised:
        fit(task, options(tmp_path, loader_workers=workers))
    assert str(raised.value) == "the folder of images is gone"


def test_fit__keeps_no_loaded_checkpoint_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(tmp_path, checkpoint_steps=1, ema=0.9)
    killed = TinyTask()
    killed.fails_at = 3
    with pytest.raises(KilledError):
        fit(killed, chosen)
    held: list[weakref.ref[torch.Tensor]] = []

    def loaded(path: Path) -> dict[str, Any]:
        state = load_checkpoint(path)
        weights = [*state["model"].values(), *state["ema"].values()]
        held.extend(map(weakref.ref, weights))
        return state

    monkeypatch.setattr(resuming, "load_checkpoint", loaded)

    class Watching(TinyTask):
        def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if self.calls == 0:
                gc.collect()
                assert [weight() for weight in held] == [None] * 8
            return super().loss(batch)

    fit(Watching(), chosen)


# What a kill leaves.


def test_fit__removes_what_a_kill_left_of_a_checkpoint(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, save = options(tmp_path, checkpoint_epochs=2, keep_checkpoints=0), torch.save
    child = os.fork()
    if child == 0:

        def killed(state: Any, place: Path) -> None:
            save(state, place)
            if state["step"] == 4 * PER_EPOCH:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            monkeypatch.setattr(torch, "save", killed)
            fit(TinyTask(), chosen)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = (tmp_path / "checkpoints").glob(".*")
    assert is_leftover(left.name)
    # It might be that of a writer who lives, until it was not touched for long.
    fit(TinyTask(), chosen)
    assert left.exists()
    os.utime(left, (0, 0))
    path = fit(TinyTask(), chosen)  # which has no step left
    assert same(path, whole.path)
    assert not list((tmp_path / "checkpoints").glob(".*"))
