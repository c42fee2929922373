import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semmae.pipeline.feeding import Batch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.runs import Run
from semmae.pipeline.schedule import Draw
from semmae.pipeline.tasks import decay_groups
from semmae.pipeline.training import fit
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.tests.pipeline.reads import ScalarReads
from semmae.tests.pipeline.tiny import (
    BATCH,
    EPOCHS,
    PER_EPOCH,
    STEPS,
    KilledError,
    TinyData,
    TinyTask,
    Whole,
    log_of,
    options,
    points_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fit__takes_the_learning_rate_of_the_schedule(whole: Whole) -> None:
    peak = 0.5 * BATCH / 256
    for step, rate in points_of(whole.run, "train/learning_rate"):
        before = step - 1
        expected = peak * (before + 1) / (PER_EPOCH + 1)
        if before >= PER_EPOCH:
            turn = (before - PER_EPOCH) / (STEPS - PER_EPOCH)
            expected = peak * (1 + math.cos(math.pi * turn)) / 2
        assert rate == pytest.approx(expected, rel=1e-6)


# What is written, and how a step is computed.


def test_fit__logs_a_line_an_epoch_with_true_means(whole: Whole) -> None:
    lines = log_of(whole.run)
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines] == list(range(PER_EPOCH, STEPS + 1, PER_EPOCH))
    for epoch, line in enumerate(lines):
        seen = whole.task.seen[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]
        assert line["loss"] == pytest.approx(np.mean([loss for _, loss in seen]), rel=1e-6)
    assert points_of(whole.run, "train/loss")[-1][0] == STEPS


def test_fit__keeps_what_was_asked(whole: Whole, tmp_path: Path) -> None:
    assert [s for s, _ in checkpoints(whole.run)] == list(range(PER_EPOCH, STEPS + 1, PER_EPOCH))
    fit(TinyTask(), options(tmp_path, checkpoint_steps=3, keep_checkpoints=3))
    assert [s for s, _ in checkpoints(tmp_path)] == [15, 18, STEPS]
    state = load_checkpoint(whole.path)
    assert (state["kind"], state["step"], state["samples_seen"]) == ("tiny", STEPS, STEPS * BATCH)


def test_fit__log_drops_lines_past_the_checkpoint(tmp_path: Path) -> None:
    task, chosen = TinyTask(), options(tmp_path, checkpoint_epochs=3)
    task.fails_at = 2 * PER_EPOCH + 1
    with pytest.raises(KilledError):
        fit(task, chosen)
    assert len(log_of(tmp_path)) == 2
    fit(TinyTask(), chosen)
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


def test_fit__hands_finish_epoch_a_model_in_evaluation(tmp_path: Path) -> None:
    class Watching(TinyTask):
        def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
            assert not self.model.training
            assert run.step == epoch * PER_EPOCH
            torch.manual_seed(99)
            torch.rand(5)
            run.picture("noise", np.zeros((4, 4, 3), dtype=np.uint8))
            return {"epoch_twice": 2.0 * epoch, "undefined": math.nan}

    plain, watching = TinyTask(), Watching()
    fit(plain, options(tmp_path / "plain"))
    fit(watching, options(tmp_path / "watching"))
    assert watching.seen == plain.seen
    lines = log_of(tmp_path / "watching")
    assert [line["epoch_twice"] for line in lines] == [2.0, 4.0, 6.0, 8.0]
    assert lines[0]["undefined"] is None


def test_fit__runs_in_bf16_on_the_cpu(tmp_path: Path) -> None:
    kinds = []

    class Watching(TinyTask):
        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            kinds.append(self.model(batch["x"]).dtype)
            return super().loss(batch)

    path = fit(Watching(), options(tmp_path, precision="bf16", epochs=1))
    assert set(kinds) == {torch.bfloat16}
    assert {w.dtype for w in load_checkpoint(path)["model"].values()} == {torch.float32}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_fit__clips_gradients_as_torch_does(clip: float, tmp_path: Path) -> None:
    class Watching(TinyTask):
        gradients: list[float]

        def optimizer(self, rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
            self.gradients, task = [], self

            class Recording(torch.optim.SGD):
                def step(self, closure: Any = None) -> None:  # type: ignore[override]
                    found = [p.grad for p in task.model.parameters() if p.grad is not None]
                    task.gradients.append(float(nn.utils.get_total_norm(found)))
                    super().step(closure)

            return Recording(self.model.parameters(), lr=rate)

    task = Watching()
    fit(task, options(tmp_path, clip_gradients=clip, epochs=1, log_steps=1))
    told = [norm for _, norm in points_of(tmp_path, "train/gradient_norm")]
    for norm, used in zip(told, task.gradients, strict=True):
        assert used == pytest.approx(min(norm, clip) if clip else norm, rel=1e-3)


def test_fit__reads_no_tensor_between_two_points_of_the_log(tmp_path: Path) -> None:
    class Quiet(TinyTask):
        def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            value = (self.model(batch["x"]).squeeze(1) - batch["x"].sum(1)).square().mean()
            return value, {"index": batch["index"].float().mean()}

        def optimizer(self, rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=rate, fused=True)

    counts = []
    for images in (40, 80):
        with ScalarReads() as reads:
            fit(
                Quiet(TinyData(images=images)),
                options(tmp_path / str(images), log_steps=1000, epochs=1, clip_gradients=1.0),
            )
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_fit__warns_of_a_warm_up_longer_than_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(TinyTask(), options(tmp_path, warmup_epochs=5.0))
    assert "--warmup-epochs 5 is more than --epochs 4" in capsys.readouterr().err


def test_decay_groups__spare_biases_norms_and_tokens() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.patches = nn.Conv2d(3, 8, 4)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 2)
            self.positions = nn.Parameter(torch.zeros(1, 5, 8), requires_grad=False)

    network = Network()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, spared = (
        {names[id(p)] for p in group["params"]} for group in decay_groups(network, 0.05)
    )
    assert decayed == {"patches.weight", "head.weight"}
    assert spared == {"class_token", "patches.bias", "norm.weight", "norm.bias", "head.bias"}
    assert [group["weight_decay"] for group in decay_groups(network, 0.05)] == [0.05, 0.0]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"keep_checkpoints": 1, "keep_every": 2}, [10, 20]),
        ({"keep_checkpoints": 2, "keep_every": 3}, [15, 20]),
        # Due are 4, 5, 8, 10, 12, 15, 16 and 20.
        ({"keep_checkpoints": 1, "keep_every": 3, "checkpoint_steps": 4}, [8, 15, 20]),
        ({"keep_checkpoints": 1, "keep_every": 1, "checkpoint_epochs": 3}, [15, 20]),
        ({"keep_checkpoints": 0, "keep_every": 2}, [5, 10, 15, 20]),
    ],
)
def test_fit__keeps_every_so_manieth_checkpoint(
    changes: dict[str, int], kept: list[int], tmp_path: Path
) -> None:
    task = TinyTask()
    task.fails_at = 17
    with pytest.raises(KilledError):
        fit(task, options(tmp_path, **changes))
    fit(TinyTask(), options(tmp_path, **changes))
    assert [step for step, _ in checkpoints(tmp_path)] == kept


def test_fit__keeps_no_batch_that_it_has_computed(tmp_path: Path) -> None:
    """Each part from a worker is an open file for every array, of which there are not many."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watched(TinyData):
        def __getitems__(self, draws: list[Draw]) -> Batch:
            alive.append(sum(array() is not None for array in made))
            batch = super().__getitems__(draws)
            made.append(weakref.ref(batch["x"]))
            return batch

    fit(TinyTask(Watched()), options(tmp_path, micro_batch=1, log_steps=100))
    assert len(alive) == STEPS * BATCH
    assert max(alive) <= 1  # the one before
