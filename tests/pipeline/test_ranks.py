import socket
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semmae.errors import SettingError
from semmae.pipeline import parallel, ranks
from semmae.pipeline.feeding import Batch
from semmae.pipeline.launching import launch
from semmae.pipeline.loss_bins import LossBins
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.parallel import Parallel, blocks
from semmae.pipeline.training import fit
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.storage.dumps import read_dump
from semmae.tests.pipeline.peers import DeepTask, MistakenTask, Told, peer_run, together
from semmae.tests.pipeline.tiny import (
    BATCH,
    PER_EPOCH,
    STEPS,
    TinyTask,
    at,
    averages,
    dumped,
    flat,
    log_of,
    options,
    points_of,
    poisoned,
    same,
    step_of,
    weighs_as,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5
"""Relative: float32 sums of the same terms in another order, over the steps of the run."""

COMMON: dict[str, Any] = {"keep_checkpoints": 0, "checkpoint_steps": 2, "clip_gradients": 0.5}

SETTINGS = [(2, "none"), (2, "fsdp"), (4, "none")]


def run_in(count: int, output: Path, **changes: Any) -> list[Told]:
    return together(count, partial(peer_run, output=output, **COMMON, **changes))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1][1]


def assert_close_points(one: Path, other: Path) -> None:
    """Losses at each step of two runs agree."""
    for name in ("train/loss", "train/gradient_norm", "train/draw_mean", "train/learning_rate"):
        first, second = points_of(one, name), points_of(other, name)
        assert [step for step, _ in first] == list(range(1, STEPS + 1))
        assert [step for step, _ in second] == list(range(1, STEPS + 1))
        values, theirs = ([value for _, value in points] for points in (first, second))
        assert theirs == pytest.approx(values, rel=TOLERANCE)


def assert_close(one: Path, other: Path) -> None:
    """Losses of each epoch and the last weights and moments of two runs agree."""
    first_state, second_state = (flat(load_checkpoint(newest(run))) for run in (one, other))
    assert first_state.keys() == second_state.keys()
    for key, value in first_state.items():
        if isinstance(value, Tensor):
            assert second_state[key].dtype == value.dtype
            torch.testing.assert_close(second_state[key], value, rtol=TOLERANCE, atol=1e-6)
    for line, other_line in zip(log_of(one), log_of(other), strict=True):
        assert other_line == pytest.approx(line, rel=TOLERANCE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run of one process in parts of one image, whose random numbers all others share."""
    run = tmp_path_factory.mktemp("alone") / "run"
    peer_run(0, run, micro_batch=1, **COMMON)
    return run


@pytest.fixture(scope="module", params=SETTINGS)
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, str, Path]:
    """How many processes, how sharded, and their run, which nothing interrupted."""
    count, sharding = request.param
    run = tmp_path_factory.mktemp("several") / "run"
    told = run_in(count, run, micro_batch=1, sharding=sharding)
    assert told == [Told(value=newest(run))] * count
    return count, sharding, run


def test_fit__gives_the_losses_of_one_process_in_several(
    alone: Path, several: tuple[int, str, Path]
) -> None:
    _, _, run = several
    assert_close(alone, run)
    assert_close_points(alone, run)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_fit__resumes_in_several_processes_to_the_bit(
    several: tuple[int, str, Path], tmp_path: Path
) -> None:
    count, sharding, whole = several
    run = tmp_path / "run"
    calls = 7 * BATCH // count  # in the middle of an epoch, and of a checkpoint's steps
    told = run_in(count, run, micro_batch=1, sharding=sharding, task=partial(DeepTask, calls))
    assert told[1].ended == 9
    others = [peer for rank, peer in enumerate(told) if rank != 1]
    assert {peer.ended for peer in others} == {1}
    said = [peer.error for peer in others if peer.error]
    assert len(said) == 1
    assert said[0].startswith("UserError: another process of the run was lost")
    assert newest(run).name == "step-00000006.pt"
    run_in(count, run, micro_batch=1, sharding=sharding)
    assert log_of(run) == log_of(whole)
    for (step, one), (other_step, other) in zip(checkpoints(run), checkpoints(whole), strict=True):
        assert step == other_step
        assert same(one, other)


def test_fit__goes_on_with_another_number_of_processes(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for count, calls, sharding in ((2, 10, "fsdp"), (4, 4, "none"), (2, 9, "none")):
        task = partial(DeepTask, calls)
        told = run_in(count, run, micro_batch=1, sharding=sharding, task=task)
        assert told[1].ended == 9
    assert newest(run).name == "step-00000012.pt"
    peer_run(0, run, micro_batch=1, **COMMON)
    assert_close(alone, run)


# Figures of all processes.


def figures_in(rank: int, output: Path) -> dict[str, float]:
    found: dict[str, float] = {}

    def train(given: TrainingOptions) -> Path:
        bins = LossBins("by", (0.2, 0.4))
        # The first bin is filled in one process alone, and the processes hold different counts.
        shares = torch.tensor([0.1, 0.9, 0.9] if rank else [0.9])
        bins.add(torch.arange(1.0, len(shares) + 1), shares)
        bins.settle(torch.ones(()))
        found.update(bins.read())
        found.update(ranks.largest({"a": 3.0 - rank, "b": rank + 2**-40}, torch.device("cpu")))
        return given.output

    launch(train, options(output))
    return found


def test_figures__are_of_all_processes(tmp_path: Path) -> None:
    expected = {"by/0-0.2": 1.0, "by/0.4-1": 2.0, "a": 3.0, "b": 1 + 2**-40}
    assert together(2, partial(figures_in, output=tmp_path)) == [Told(value=expected)] * 2


# Mistakes.


def test_fit__says_a_mistake_of_one_process_once(tmp_path: Path) -> None:
    told = run_in(2, tmp_path / "run", task=partial(MistakenTask, 3, 1))
    assert told == [Told(ended=1), Told(ended=1, error="MissingError: the images are gone")]


def test_fit__says_a_mistake_of_all_processes_once(tmp_path: Path) -> None:
    told = run_in(3, tmp_path / "run")
    assert sorted(peer.error for peer in told) == [
        "",
        "",
        "SettingError: --batch-size is 4: expected a multiple of the 3 processes",
    ]
    assert [peer.ended for peer in told] == [1, 1, 1]
    assert not (tmp_path / "run").exists()


def other_folder(rank: int, folder: Path) -> Path:
    return peer_run(rank, folder / str(rank))


def test_fit__refuses_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    peer_run(0, tmp_path / "1", epochs=1)
    (newest(tmp_path / "1")).unlink()
    task = DeepTask(PER_EPOCH + 1, failing=0)
    task.fail = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(task, options(tmp_path / "1", resume="auto"))
    told = together(2, partial(other_folder, folder=tmp_path))
    (said,) = (peer.error for peer in told if peer.error)
    assert said.startswith(
        "MismatchError: the processes of the run do not see the same newest checkpoint: 0 in "
        f"process 0, {PER_EPOCH} in process 1"
    )
    assert not (tmp_path / "0").exists()


def test_fit__refuses_processes_that_were_not_told_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="WORLD_SIZE is 2, but this tiny run trains in one"):
        fit(TinyTask(), options(tmp_path))
    assert not list(tmp_path.iterdir())


MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
NOT_TOLD = "the environment tells of 2 processes, but not how they meet"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected a number of processes"),
        (
            {"RANK": None},
            rf"{NOT_TOLD} \(RANK=, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1, MASTER_PORT=1",
        ),
        ({"RANK": "first"}, NOT_TOLD),
        ({"MASTER_ADDR": None}, NOT_TOLD),
        ({"MASTER_PORT": "p"}, NOT_TOLD),
        ({"MASTER_PORT": "taken"}, "did not meet .*MASTER_PORT=.*address already in use"),
        ({"MASTER_PORT": "free"}, "did not meet .*1/2 clients joined.*and 2 processes"),
    ],
)
def test_launch__processes_that_do_not_meet_are_one_sentence(
    changes: dict[str, str | None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=1))
    with socket.create_server(("", 0)) as taken, socket.create_server(("", 0)) as free:
        ports = {"taken": str(taken.getsockname()[1]), "free": str(free.getsockname()[1])}
        free.close()
        for name, value in {**MEETING, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, ports.get(value, value))
        with pytest.raises(SettingError, match=said):
            peer_run(0, tmp_path)
    assert not list(tmp_path.iterdir())


# Steps that are not finite, and the average of the weights.


class PoisonedPeer(DeepTask):
    """In the process of rank 1 two steps are not finite."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, scalars = super().loss(batch)
        if step_of(batch) in (4, 5) and self.is_failing:
            first: Any = self.model[0]
            value = poisoned(value, first.weight, "gradients" if step_of(batch) == 4 else "loss")
        return value, scalars


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_fit__all_processes_skip_what_one_cannot_compute(sharding: str, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"micro_batch": 1, "clip_gradients": 0.5, "ema": 0.9}
    work = partial(
        peer_run, task=PoisonedPeer, sharding=sharding, checkpoint_steps=1, keep_checkpoints=0
    )
    told = together(2, partial(work, output=run, **settings))
    assert [peer.error for peer in told] == ["", ""]
    for step in (4, 5):
        assert weighs_as(at(run, step), at(run, 3))
    assert not weighs_as(at(run, 6), at(run, 5))
    counted = [load_checkpoint(at(run, step)) for step in range(1, STEPS + 1) if step not in (4, 5)]
    start = {name: value.clone() for name, value in DeepTask().model.state_dict().items()}
    for state, expected in zip(counted, averages(start, counted, 0.9), strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(state["ema"][name].double(), value, rtol=1e-5, atol=1e-6)
    state = flat(load_checkpoint(at(run, STEPS)))
    assert state[".guard.skipped"] == 2
    assert all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor))
    found = read_dump(run / "non-finite" / "step-00000005.json")
    assert [loss == "inf" for loss in found.record["losses"]] == [False, False, True, True]
    assert found.arrays["index"].tolist() == found.record["samples"]
    assert found.record["processes"] == 2
    weights = load_checkpoint(at(run, 3))["model"]
    assert all(np.array_equal(found.weights[name], w.numpy()) for name, w in weights.items())
    assert dumped(run).count("weights-00000004.safetensors") == 1
    # Killed within the row, and gone on with.
    again = tmp_path / "again"
    killed = partial(PoisonedPeer, 4 * BATCH // 2)
    together(2, partial(work, output=again, **{**settings, "task": killed}))
    assert checkpoints(again)[-1][0] == 4
    assert together(2, partial(work, output=again, **settings)) == [Told(at(again, STEPS))] * 2
    assert same(at(again, STEPS), at(run, STEPS))
    assert log_of(again) == log_of(run)


def test_fit__says_once_that_all_processes_stop(tmp_path: Path) -> None:
    work = partial(peer_run, output=tmp_path, task=PoisonedPeer, skip_at_most=1)
    told = together(2, work)
    assert [peer.ended for peer in told] == [1, 1]
    (said,) = (peer.error for peer in told if peer.error)
    assert said.startswith("DamageError: loss or gradients are not finite in 2 steps in a row")


# How batches are shared out.


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "parts"),
    [
        (8, 0, 1, 1),
        (8, 0, 4, 4),
        (8, 2, 1, 4),
        (8, 2, 2, 4),
        (8, 2, 4, 4),
        (8, 2, 8, 8),
        (8, 9, 1, 1),
        (12, 4, 2, 4),
        (320, 256, 1, 2),
        (1280, 256, 4, 8),
    ],
)
def test_batch_parts__are_the_same_for_any_number_of_processes(
    batch: int, micro: int, processes: int, parts: int
) -> None:
    given = TrainingOptions(output=Path("run"), batch_size=batch, micro_batch=micro)
    assert given.batch_parts(processes) == parts


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "said"),
    [
        (8, 0, 3, "--batch-size is 8: expected a multiple of the 3 processes"),
        (8, 0, 16, "--batch-size is 8: expected a multiple of the 16 processes"),
        (
            34,
            4,
            2,
            "--micro-batch is 4 and --batch-size is 34: expected a divisor of the 17 images of "
            "each process, of which 1 is the largest below",
        ),
        (257, 256, 1, "expected a divisor of --batch-size, of which 1 is the largest below"),
    ],
)
def test_batch_parts__refuse_what_cannot_be_shared_out(
    batch: int, micro: int, processes: int, said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        TrainingOptions(output=Path("run"), batch_size=batch, micro_batch=micro).batch_parts(
            processes
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"launcher": "ray"}, "--workers is 0: expected at least 1 with --launcher ray"),
        ({"workers": 2}, "--workers and --address are for --launcher ray"),
        ({"launcher": "ray", "workers": 3}, "--batch-size is 256: expected a multiple of the 3"),
    ],
)
def test_training_options__refuse_workers_that_cannot_be(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        TrainingOptions(output=Path("run"), **changes)


def test_blocks__are_the_members_of_lists_of_equal_modules() -> None:
    def stack(count: int) -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(count)]

    encoder, decoder = nn.Sequential(*stack(3)), nn.ModuleList(stack(2))
    model = nn.ModuleDict(
        {"encoder": encoder, "one": nn.Sequential(*stack(1)), "decoder": decoder, "end": nn.GELU()}
    )
    assert blocks(model) == [*encoder, *decoder]


@pytest.mark.parametrize(("device", "steady"), [("cpu", True), ("cuda", False)])
def test_parallel__looks_for_unused_parameters_only_where_bits_are_promised(
    device: str, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each step would wait for the device, to learn which are unused."""
    asked = []

    def replicas(held: nn.Module, **settings: bool) -> nn.Module:
        asked.append((len(list(held.parameters())), settings))
        return held

    monkeypatch.setattr(parallel, "DistributedDataParallel", replicas)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "send_to_all", lambda tensors: None)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    Parallel(model, torch.device(device), "none")
    assert asked == [(2 + steady, {"find_unused_parameters": steady})]
