"""The same command under torchrun and Ray Train, processes and all (more: `make launchers`)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semmae.storage.checkpoints import checkpoints
from semmae.tests.pipeline.tiny import same
from semmae.tests.soak import family
from semmae.tests.world import World

pytestmark = pytest.mark.xdist_group("ray")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RAY = ["--launcher", "ray", "--workers", "2"]


def pretraining(world: World, output: Path, *more: str) -> list[str]:
    flags = {
        "data": world.data,
        "output": str(output),
        "masking": "random",
        "size": "micro",
        "patch-size": "8",
        "image-size": "32",
        "epochs": "30",
        "batch-size": "16",
        "warmup-epochs": "0",
        "loader-workers": "0",
        "checkpoint-steps": "2",
        "device": "cpu",
    }
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return ["-m", "semmae", "stage2", "pretrain", *given, *more]


def started(command: list[str], said: Path) -> subprocess.Popen[bytes]:
    """A command in a process group of its own."""
    with said.open("wb") as opened:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=opened,
            stderr=opened,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run under torchrun that nothing interrupts."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [*TORCHRUN, *pretraining(world, folder / "run")]
    assert started(command, folder / "said").wait(300) == 0
    path = checkpoints(folder / "run")[-1][1]
    text = (folder / "said").read_text()
    assert text.count("semmae stage2 pretrain") == text.count(f"wrote {path}") == 1
    assert text.count("image_size = 32") == 1
    return path


@pytest.mark.launchers
def test_torchrun__says_a_mistake_once(world: World, tmp_path: Path) -> None:
    command = [*TORCHRUN, *pretraining(world, tmp_path / "run", "--batch-size", "15")]
    assert started(command, tmp_path / "said").wait(300) != 0
    text = (tmp_path / "said").read_text()
    assert text.count("semmae: --batch-size is 15: expected a multiple of the 2 processes") == 1
    assert "Connection" not in text


def test_torchrun__goes_on_by_itself_where_a_process_is_lost(
    world: World, whole: Path, tmp_path: Path
) -> None:
    command = [*TORCHRUN, "--max-restarts", "2", *pretraining(world, tmp_path / "run")]
    running = started(command, tmp_path / "said")
    kill_one(running, tmp_path / "run", "semmae")
    assert running.wait(300) == 0, (tmp_path / "said").read_text()
    assert same(checkpoints(tmp_path / "run")[-1][1], whole)


def wait_for_checkpoints(running: subprocess.Popen[bytes], run: Path) -> None:
    deadline = time.monotonic() + 240
    while len(checkpoints(run)) < 2:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("at", ["all", "workers first"])
def test_pretrain__ended_by_sigterm_says_where_it_goes_on(
    at: str, world: World, tmp_path: Path
) -> None:
    """Of its own process, or of its loader workers too, as Slurm ends a job."""
    run = tmp_path / "run"
    command = pretraining(world, run, "--epochs", "5000", "--loader-workers", "2")
    running = started(command, tmp_path / "said")
    wait_for_checkpoints(running, run)
    for child in family(running.pid)[1:] if at == "workers first" else ():
        os.kill(child, signal.SIGTERM)
    (os.killpg if at == "all" else os.kill)(running.pid, signal.SIGTERM)
    assert running.wait(60) == 143
    *before, said = (tmp_path / "said").read_text().splitlines()
    newest = checkpoints(run)[-1][1]
    assert said == f"semmae: interrupted (SIGTERM); the same command goes on from {newest}"
    assert not any("Traceback" in line or line.startswith("semmae: ") for line in before)


@pytest.mark.launchers
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_launchers__say_once_that_sigterm_ended_the_run(
    launcher: str, world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = RAY if launcher == "ray" else []
    command = pretraining(world, run, "--epochs", "5000", *more)
    running = started(command if more else [*TORCHRUN, *command], tmp_path / "said")
    wait_for_checkpoints(running, run)
    os.kill(running.pid, signal.SIGTERM)
    code, text = running.wait(120), (tmp_path / "said").read_text()
    assert code == 143 if more else code != 0, text  # torchrun has a code of its own
    newest = checkpoints(run)[-1][1]
    said = f"semmae: interrupted (SIGTERM); the same command goes on from {newest}\n"
    assert text.count(said) == text.count("semmae: ") == 1, text


def kill_one(running: subprocess.Popen[bytes], run: Path, name: str) -> None:
    """Kill a process of that name once some checkpoints are there."""
    wait_for_checkpoints(running, run)
    named = []
    for process in family(running.pid)[1:]:
        words = (Path("/proc") / str(process) / "cmdline").read_bytes()
        if name in words.decode(errors="replace"):
            named.append(process)
    assert len(named) == 2
    os.kill(named[-1], signal.SIGKILL)


def test_ray__goes_on_by_itself_where_a_worker_is_lost(
    world: World, whole: Path, tmp_path: Path
) -> None:
    running = started(pretraining(world, tmp_path / "run", *RAY), tmp_path / "said")
    kill_one(running, tmp_path / "run", "RayTrainWorker")
    assert running.wait(300) == 0, (tmp_path / "said").read_text()
    text = (tmp_path / "said").read_text()
    assert text.count("a worker was lost: all go on from step") == 1
    assert "Traceback" not in text
    assert text.count("pretraining: 1920/1920 images") == 1
    assert same(checkpoints(tmp_path / "run")[-1][1], whole)
    assert not (tmp_path / "run" / ".ray").exists()


@pytest.mark.launchers
def test_ray__says_a_workers_mistake_in_one_sentence(world: World, tmp_path: Path) -> None:
    command = pretraining(world, tmp_path / "run", *RAY, "--data", str(tmp_path / "nowhere"))
    assert started(command, tmp_path / "said").wait(300) == 1
    text = (tmp_path / "said").read_text()
    assert text.splitlines()[-1].startswith("semmae: ")
    assert str(tmp_path / "nowhere") in text.splitlines()[-1]
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
