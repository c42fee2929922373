import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semmae.errors import DamageError
from semmae.pipeline.dumping import arrays_of
from semmae.pipeline.feeding import Batch
from semmae.pipeline.guard import MOST_DUMPS, Guard
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.training import fit
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.storage.dumps import read_dump
from semmae.tests.pipeline.tiny import (
    BATCH,
    PER_EPOCH,
    STEPS,
    KilledError,
    PoisonedTask,
    TinyTask,
    at,
    dumped,
    log_of,
    options,
    points_of,
    same,
    step_of,
    weighs_as,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# A step that is not finite.


IN_PARTS: dict[str, Any] = {"clip_gradients": 0.5, "micro_batch": 1}
IN_BF16: dict[str, Any] = {"precision": "bf16", "ema": 0.9}


@pytest.mark.parametrize(
    ("how", "optimizer", "changes"),
    [
        ("loss", "fused", {}),
        ("gradients", "fused", {}),
        ("both", "fused", IN_PARTS),
        ("gradients", "fused", IN_PARTS),
        ("both", "fused", IN_BF16),
        ("loss", "plain", IN_BF16),
        ("gradients", "plain", IN_PARTS),
    ],
)
def test_fit__changes_nothing_in_a_step_that_is_not_finite(
    how: str, optimizer: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    task = PoisonedTask(4, 8, 9, how=how, optimizer=optimizer)
    fit(task, options(tmp_path, checkpoint_steps=1, keep_checkpoints=0, **changes))
    for skipped in (4, 8, 9):
        assert weighs_as(at(tmp_path, skipped), at(tmp_path, skipped - 1))
    for step in (3, 5, 7, 10, STEPS):
        assert not weighs_as(at(tmp_path, step), at(tmp_path, step - 1))
    assert load_checkpoint(at(tmp_path, 9))["guard"] == {"skipped": 3, "in_a_row": 2, "dumps": 3}
    assert load_checkpoint(at(tmp_path, 10))["guard"] == {"skipped": 3, "in_a_row": 0, "dumps": 3}


def test_fit__a_skipped_step_leaves_the_run_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Steps before are the very same; the state of AdamW does not count the step that was not."""
    fit(TinyTask(), options(tmp_path / "good", checkpoint_steps=1, keep_checkpoints=0))
    fit(PoisonedTask(6), options(tmp_path / "bad", checkpoint_steps=1, keep_checkpoints=0))
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert weighs_as(at(good, 5), at(bad, 6))
    state = load_checkpoint(at(bad, STEPS))["optimizer"]["state"]
    assert {float(held["step"]) for held in state.values()} == {STEPS - 1.0}


def test_fit__puts_running_statistics_back(tmp_path: Path) -> None:
    class Normed(PoisonedTask):
        def __init__(self) -> None:
            super().__init__(4, how="loss")
            self.model.insert(0, nn.BatchNorm1d(6))

        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            spoilt = batch["x"] * math.nan if step_of(batch) == 4 else batch["x"]
            return super().loss({**batch, "x": spoilt})

    fit(Normed(), options(tmp_path, checkpoint_steps=1, keep_checkpoints=0))
    assert weighs_as(at(tmp_path, 4), at(tmp_path, 3))
    assert int(load_checkpoint(at(tmp_path, STEPS))["model"]["0.num_batches_tracked"]) == STEPS - 1


@pytest.mark.parametrize("log_steps", [1, 3, 100])
def test_fit__takes_no_skipped_step_into_the_means(log_steps: int, tmp_path: Path) -> None:
    task = PoisonedTask(2, PER_EPOCH, PER_EPOCH + 1)
    fit(task, options(tmp_path, log_steps=log_steps))
    losses = [loss for _, loss in task.seen]
    for epoch, (line, skipped) in enumerate(zip(log_of(tmp_path), (2, 3, 3, 3), strict=True)):
        steps = range(epoch * PER_EPOCH + 1, (epoch + 1) * PER_EPOCH + 1)
        counted = [losses[step - 1] for step in steps if step not in task.steps]
        assert line["loss"] == pytest.approx(np.mean(counted), rel=1e-6)
        assert line["skipped"] == skipped
    assert points_of(tmp_path, "train/skipped")[-1] == (STEPS, 3.0)
    assert all(math.isfinite(loss) for _, loss in points_of(tmp_path, "train/loss"))


def test_fit__an_epoch_of_skipped_steps_has_no_mean(tmp_path: Path) -> None:
    fit(PoisonedTask(*range(1, PER_EPOCH + 1)), options(tmp_path, log_steps=1))
    first, second = log_of(tmp_path)[:2]
    assert "loss" not in first
    assert first["skipped"] == PER_EPOCH
    assert math.isfinite(second["loss"])


def test_fit__asks_of_a_step_once_the_next_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Telling(TinyTask):
        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            told.append(f"loss {step_of(batch)}")
            return super().loss(batch)

    read = Guard.count

    def count(guard: Guard) -> bool:
        told.append("asked")
        return read(guard)

    monkeypatch.setattr(Guard, "count", count)
    fit(Telling(), options(tmp_path, log_steps=100))
    expected = []
    for first in range(1, STEPS, PER_EPOCH):
        between = [[f"loss {step}", "asked"] for step in range(first + 1, first + PER_EPOCH)]
        # The last step of an epoch is waited for: its line is written.
        expected += [f"loss {first}", *(word for pair in between for word in pair), "asked"]
    assert told == expected


def test_fit__resumes_to_the_bit_through_skipped_steps(tmp_path: Path) -> None:
    steps, settings = (2, 6, 7, 8, 13), {"checkpoint_steps": 2, "skip_at_most": 3, "ema": 0.9}
    whole = options(tmp_path / "whole", **settings)
    path = fit(PoisonedTask(*steps), whole)
    for killed_at in (1, 6, 7, 8, 13):
        chosen = options(tmp_path / str(killed_at), **settings)
        killed = PoisonedTask(*steps)
        killed.fails_at = killed_at
        with pytest.raises(KilledError):
            fit(killed, chosen)
        assert same(fit(PoisonedTask(*steps), chosen), path)
        assert log_of(chosen.output) == log_of(whole.output)
        assert dumped(chosen.output) == dumped(whole.output)
        for step in steps:
            mine, theirs = (
                read_dump(o.output / "non-finite" / f"step-{step:08d}.json")
                for o in (chosen, whole)
            )
            assert mine.weights.keys() == theirs.weights.keys()
            assert all(np.array_equal(mine.weights[k], theirs.weights[k]) for k in mine.weights)


# Too many of them.


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_fit__stops_after_too_many_in_a_row(allowed: int, tmp_path: Path) -> None:
    last = 4 + allowed
    task = PoisonedTask(2, *range(4, STEPS + 1)) if allowed else PoisonedTask(4)
    with pytest.raises(DamageError) as raised:
        fit(task, options(tmp_path, skip_at_most=allowed, log_steps=100, keep_checkpoints=0))
    said = str(raised.value)
    assert "\n" not in said
    assert f"to step {last} (--skip-at-most {allowed})" in said
    assert str(tmp_path / "non-finite") in said
    assert f"step-{last:08d}.json" in dumped(tmp_path)
    assert [step for step, _ in checkpoints(tmp_path)] == [PER_EPOCH] * (last > PER_EPOCH)


def test_fit__counts_a_row_on_where_it_was_resumed(tmp_path: Path) -> None:
    chosen = partial(options, tmp_path, skip_at_most=3, checkpoint_steps=1)
    killed = PoisonedTask(*range(6, STEPS))
    killed.fails_at = 7
    with pytest.raises(KilledError):
        fit(killed, chosen())
    assert load_checkpoint(checkpoints(tmp_path)[-1][1])["guard"]["in_a_row"] == 2
    with pytest.raises(DamageError, match="in 4 steps in a row, to step 9 "):
        fit(PoisonedTask(*range(6, STEPS)), chosen())
    assert checkpoints(tmp_path)[-1][0] == 8
    # What is allowed may change; then the run goes on.
    fit(PoisonedTask(*range(6, STEPS)), chosen(skip_at_most=20))
    assert load_checkpoint(at(tmp_path, STEPS))["guard"]["skipped"] == STEPS - 6


def test_fit__saves_no_weight_that_the_last_step_broke(tmp_path: Path) -> None:
    class Overflowing(TinyTask):
        def optimizer(self, rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
            class Breaking(torch.optim.SGD):
                def step(self, closure: Any = None) -> None:  # type: ignore[override]
                    self.param_groups[0]["params"][0].data.fill_(math.inf)

            return Breaking(self.model.parameters(), lr=rate)

    with pytest.raises(DamageError, match=r"1 of 4 weights are not finite after step 1, 0\.weight"):
        fit(Overflowing(), options(tmp_path, checkpoint_steps=1))
    assert checkpoints(tmp_path) == []


# What is kept of them.


def test_dump__says_what_was_computed_of_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(
        PoisonedTask(7, 8),
        options(tmp_path, micro_batch=2, checkpoint_steps=1, keep_checkpoints=0),
    )
    said = capsys.readouterr().err
    for step in (7, 8):
        path = tmp_path / "non-finite" / f"step-{step:08d}.json"
        assert said.count(f"step {step} is skipped, see {path}\n") == 1
    assert dumped(tmp_path) == [
        "step-00000007.json",
        "step-00000007.safetensors",
        "step-00000008.json",
        "step-00000008.safetensors",
        "weights-00000007.safetensors",
    ]
    whole = TinyTask()
    fit(whole, options(tmp_path / "whole", micro_batch=2, epochs=2))
    draws = [[draw for part in whole.seen[2 * s : 2 * s + 2] for draw in part[0]] for s in (6, 7)]
    weights = load_checkpoint(at(tmp_path, 6))["model"]
    for step, drawn in zip((7, 8), draws, strict=True):
        found = read_dump(tmp_path / "non-finite" / f"step-{step:08d}.json")
        record = found.record
        assert (record["step"], record["epoch"], record["seed"], record["kind"]) == (
            *(step, 2, 0),
            "tiny",
        )
        assert record["losses"] == ["nan", "nan"]
        assert record["scalars"]["loss"] == record["scalars"]["gradient_norm"] == "nan"
        gradients = record["gradient_norms"]
        assert gradients.keys() == weights.keys()
        assert [name for name, norm in gradients.items() if norm == "nan"] == ["0.weight"]
        assert record["weight_norms"] == {
            name: pytest.approx(float(weight.norm())) for name, weight in weights.items()
        }
        assert record["samples"] == [index for index, _, _ in drawn]
        assert found.arrays["index"].tolist() == [index for index, _, _ in drawn]
        assert found.arrays["x"].shape == (BATCH, 6)
        assert record["newest_checkpoint"] == f"step-{step - 1:08d}.pt"
        assert found.weights.keys() == weights.keys()
        assert all(np.array_equal(found.weights[k], w.numpy()) for k, w in weights.items())


def test_dump__holds_the_running_statistics_that_the_step_began_with(tmp_path: Path) -> None:
    class Normed(PoisonedTask):
        def __init__(self) -> None:
            super().__init__(4, 5)
            self.model.insert(0, nn.BatchNorm1d(6))

    chosen = options(tmp_path, checkpoint_steps=3, keep_checkpoints=0, log_steps=100, micro_batch=2)
    fit(Normed(), chosen)
    state = load_checkpoint(at(tmp_path, 3))["model"]
    for step in (4, 5):
        found = read_dump(tmp_path / "non-finite" / f"step-{step:08d}.json")
        assert found.record["files"]["weights"]["name"] == "weights-00000004.safetensors"
        assert found.weights.keys() == state.keys()
        for name, tensor in state.items():
            assert np.array_equal(found.weights[name], tensor.numpy()), name


def test_fit__drops_dumps_of_steps_that_it_does_again(tmp_path: Path) -> None:
    run = partial(options, tmp_path, checkpoint_steps=3, checkpoint_epochs=100, log_steps=1)
    killed = PoisonedTask(3, 4, 5)
    killed.fails_at = 5
    with pytest.raises(KilledError):
        fit(killed, run())
    assert "step-00000005.json" in dumped(tmp_path)
    (tmp_path / "non-finite" / "step-by-step.json").touch()
    fit(PoisonedTask(3, 5, 6), run())  # as on a GPU, where a step may come out otherwise
    assert dumped(tmp_path) == [
        "step-00000003.json",
        "step-00000003.safetensors",
        "step-00000005.json",
        "step-00000005.safetensors",
        "step-00000006.json",
        "step-00000006.safetensors",
        "step-by-step.json",
        "weights-00000003.safetensors",
        "weights-00000005.safetensors",
    ]
    for step in (3, 5, 6):
        read_dump(tmp_path / "non-finite" / f"step-{step:08d}.json")


def test_dump__is_whole_where_the_first_one_of_its_row_was_removed(tmp_path: Path) -> None:
    run = partial(options, tmp_path, checkpoint_steps=1)
    killed = PoisonedTask(4, 5)
    killed.fails_at = 4
    with pytest.raises(KilledError):
        fit(killed, run())
    shutil.rmtree(tmp_path / "non-finite")
    fit(PoisonedTask(4, 5), run())
    assert read_dump(tmp_path / "non-finite" / "step-00000005.json").weights.keys()


def test_dump__tells_the_part_whose_loss_is_not_finite(tmp_path: Path) -> None:
    class OnePart(TinyTask):
        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            value, scalars = super().loss(batch)
            second = round(float(batch["progress"][0]) * STEPS % 1, 3) == 0.5
            return value * (math.inf if second and step_of(batch) == 3 else 1.0), scalars

    fit(OnePart(), options(tmp_path, micro_batch=2))
    (path,) = (tmp_path / "non-finite").glob("*.json")
    first, second = json.loads(path.read_text())["losses"]
    assert math.isfinite(first)
    assert second == "inf"


def test_dump__keeps_of_pixels_their_checksums_alone() -> None:
    pixels = torch.arange(3 * 40 * 40 * 3, dtype=torch.int64).reshape(3, 40, 40, 3).byte()
    mask = torch.zeros(3, 25, dtype=torch.bool)
    found = arrays_of({"images": pixels, "mask": mask})
    assert found.keys() == {"images.crc32", "mask"}
    pixels[1, 2, 3, 0] += 1
    again = arrays_of({"images": pixels, "mask": mask})
    assert (found["images.crc32"] == again["images.crc32"]).tolist() == [True, False, True]


def test_fit__dumps_a_few_steps_and_counts_the_others(tmp_path: Path) -> None:
    fit(PoisonedTask(*range(3, 19)), options(tmp_path, skip_at_most=20))
    found = [name for name in dumped(tmp_path) if name.endswith(".json")]
    assert found == [f"step-{step:08d}.json" for step in range(3, 3 + MOST_DUMPS)]
    assert log_of(tmp_path)[-1]["skipped"] == 16


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes(path.read_bytes()[:-3]), lambda path: path.unlink()]
)
@pytest.mark.parametrize("name", ["step-00000003.safetensors", "weights-00000003.safetensors"])
def test_read_dump__says_what_is_damaged(spoil: Any, name: str, tmp_path: Path) -> None:
    fit(PoisonedTask(3), options(tmp_path))
    spoil(tmp_path / "non-finite" / name)
    with pytest.raises(DamageError, match=name):
        read_dump(tmp_path / "non-finite" / "step-00000003.json")
