import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from semmae.errors import SettingError
from semmae.pipeline import memory, throughput
from semmae.pipeline.throughput import Throughput, peak_of
from semmae.pipeline.training import fit
from semmae.tests.clock import Clock
from semmae.tests.pipeline.tiny import BATCH, STEPS, TinyTask, Whole, lines_of, options, same

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "time", made)
    return made


def test_throughput__tells_rate_wait_and_utilisation_since_the_last_point(clock: Clock) -> None:
    speed = Throughput(CPU, batch_size=32, parts=2, flops=3 * 10**12, peak=4.0)
    speed.begin(10)
    speed.begin_epoch(10)
    for _ in range(3):
        with speed.waiting():
            clock.now += 0.5
        clock.now += 3.5
    found = speed.figures(13)
    assert found.pop("host_gib") > 0
    assert found == pytest.approx(
        {
            "images_per_second": 3 * 32 / 12,
            "data_wait": 1.5 / 12,
            "tflops_per_second": 3 * 2 * 3 / 12,
            "mfu": 3 * 2 * 3 / 12 / 4,
        }
    )
    clock.now += 4  # drawing pictures is no training
    speed.begin(13)
    clock.now += 8
    assert speed.figures(14)["data_wait"] == 0
    assert speed.figures(14)["images_per_second"] == 4
    epoch = speed.epoch_figures(14)
    assert epoch["seconds"] == 24
    assert epoch["data_wait"] == pytest.approx(1.5 / 24)
    assert epoch["images_per_second"] == pytest.approx(4 * 32 / 24)


def test_throughput__of_an_unknown_device_has_no_utilisation(clock: Clock) -> None:
    speed = Throughput(CPU, batch_size=32, parts=1, flops=10**12)
    clock.now += 2
    found = speed.figures(1)
    assert found["tflops_per_second"] == 0.5
    assert "mfu" not in found


def test_throughput__counts_the_first_part_of_a_step(clock: Clock) -> None:
    speed, layer = Throughput(CPU, batch_size=8, parts=2), nn.Linear(10, 10)
    for _ in range(4):
        with speed.counted():
            layer(torch.randn(4, 10)).sum().backward()
    clock.now += 2
    done = 2 * 2 * 4 * 10 * 10
    assert speed.figures(2)["tflops_per_second"] == pytest.approx(done * 2 * 2 / 2 / 1e12)


def test_throughput__on_cuda_counts_only_what_the_device_stood_idle(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is played: it works off what was queued, and an event ends after that."""

    class Device:
        busy_until = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self, stream: object) -> None:
            self.at = max(clock.now, Device.busy_until)

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    speed = Throughput(torch.device("cuda"), batch_size=4, parts=1, flops=1)
    # Seconds that the batch takes, and that the device still has to do when it is asked for.
    for asked, queued in ((2.0, 5.0), (2.0, 0.5), (1.0, 0.0)):
        Device.busy_until = clock.now + queued
        with speed.waiting():
            clock.now += asked
        clock.now += 5.0
    found = speed.figures(3)
    assert found["data_wait"] == pytest.approx((0.0 + 1.5 + 1.0) / 20)
    assert found["device_gib"] == 3
    speed.begin(3)
    clock.now += 1
    assert speed.figures(4)["data_wait"] == 0


@pytest.mark.parametrize(
    ("precision", "matmul", "expected"),
    [("bf16", "highest", 989), ("fp32", "highest", 67), ("fp32", "high", 494)],
)
def test_peak_of__follows_the_precision_of_matrix_products(
    precision: str, matmul: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    cuda = torch.device("cuda")
    assert peak_of(cuda, precision, 0.0) == expected
    assert peak_of(cuda, precision, 12.5) == 12.5
    assert peak_of(CPU, precision, 0.0) is None


# In a run.


def test_fit__tells_every_figure_at_every_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(TinyTask(), options(tmp_path, log_steps=2, epochs=1, peak_tflops=1e-3, loader_workers=1))
    points = lines_of(tmp_path, "steps.jsonl")
    assert [point["step"] for point in points] == [2, 4, 5]
    for point in points:
        for name in ("loss", "learning_rate", "gradient_norm", "weight_norm"):
            assert point[name] > 0
        for name in ("images_per_second", "tflops_per_second", "host_gib"):
            assert point[name] > 0
        assert 0 < point["data_wait"] < 1
        assert point["mfu"] == pytest.approx(point["tflops_per_second"] / 1e-3)
    (line,) = lines_of(tmp_path)
    assert {"images_per_second", "data_wait", "seconds"} <= line.keys()
    said = capsys.readouterr().err
    assert all(f"{name} " in said for name in points[0].keys() - {"step", "epoch"})


def test_fit__weight_norm_is_of_all_weights_that_train(tmp_path: Path) -> None:
    task = TinyTask()
    task.first.bias.requires_grad_(False)
    fit(task, options(tmp_path, epochs=1))
    trained = [p.detach().flatten() for p in task.model.parameters() if p.requires_grad]
    last = lines_of(tmp_path, "steps.jsonl")[-1]
    assert last["weight_norm"] == pytest.approx(float(torch.cat(trained).norm()), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_fit__counts_what_a_task_does_not_tell_and_changes_nothing(
    micro_batch: int, whole: Whole, tmp_path: Path
) -> None:
    class Telling(TinyTask):
        def flops(self, images: int) -> int:
            told.append(images)
            return images * 2 * (2 * 6 * 8 + 3 * 8)  # the input needs no gradient

    told: list[int] = []
    counted = fit(TinyTask(), options(tmp_path / "counted", micro_batch=micro_batch))
    known = fit(Telling(), options(tmp_path / "told", micro_batch=micro_batch))
    assert same(counted, known)
    assert told == [micro_batch or BATCH]
    # Both say the same FLOPs a step: what they say a second goes with images a second.
    per_image = [
        point["tflops_per_second"] / point["images_per_second"]
        for run in ("counted", "told")
        for point in lines_of(tmp_path / run, "steps.jsonl")
    ]
    assert per_image == pytest.approx([2 * (2 * 6 * 8 + 3 * 8) / 1e12] * len(per_image))


def test_fit__refuses_a_peak_below_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--peak-tflops is -1"):
        options(tmp_path, peak_tflops=-1.0)


def test_fit__goes_on_whatever_is_logged(whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    task = TinyTask()
    task.fails_at = 7
    with pytest.raises(Exception, match="loss"):
        fit(task, options(run))
    assert same(fit(TinyTask(), options(run, peak_tflops=3.0)), whole.path)
    assert lines_of(run)[-1]["step"] == STEPS


# Memory.


def hold(size: int, ready: Any) -> None:
    held = np.ones(size, dtype=np.uint8)
    ready.set()
    time.sleep(60)
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_memory__tells_the_peak_and_what_other_processes_hold() -> None:
    before = memory.peaks(CPU)["host_gib"]
    held = np.ones(2**29, dtype=np.uint8)
    assert memory.peaks(CPU)["host_gib"] >= max(before, 0.5)
    del held
    assert memory.peaks(CPU)["host_gib"] >= max(before, 0.5)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    before_child = memory.of_children().get("loader_gib", 0.0)
    child = context.Process(target=hold, args=(2**28, ready))
    child.start()
    try:
        assert ready.wait(30)
        assert memory.of_children()["loader_gib"] >= before_child + 0.25
    finally:
        child.kill()
        child.join()
    assert memory.of_children().get("loader_gib", 0.0) == before_child


def test_memory__does_without_what_the_system_does_not_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    monkeypatch.setattr(Path, "read_text", lambda path: "Name:\tpython\nThreads:\t1\n")
    try:
        assert memory.peaks(CPU)["host_gib"] > 0.01
        assert memory.of_children() == {}
    finally:
        child.kill()
        child.join()
