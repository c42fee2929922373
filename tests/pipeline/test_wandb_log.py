import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semmae.errors import MissingError, SettingError
from semmae.pipeline.runs import Run
from semmae.pipeline.training import fit, keep
from semmae.tests.pipeline.tiny import (
    EPOCHS,
    PER_EPOCH,
    STEPS,
    KilledError,
    TinyTask,
    Whole,
    lines_of,
    options,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STAND_IN = """
import json
from pathlib import Path

class Error(Exception):
    pass

class Image:
    def __init__(self, pixels):
        self.shape = list(pixels.shape)

class Run:
    def __init__(self, **settings):
        self.calls, self.step = Path(CALLS), STEP
        self.tell("init", settings)

    def tell(self, name, told):
        with self.calls.open("a") as opened:
            json.dump([name, told], opened, default=lambda image: image.shape)
            opened.write("\\n")

    def log(self, values, step):
        self.tell("log", {"step": step, **values})

    def finish(self, exit_code):
        self.tell("finish", exit_code)

def init(**settings):
    if REFUSES:
        raise Error("No API key\\nconfigured.")
    return Run(**settings)
"""


class Service:
    """A module ``wandb`` that writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls.jsonl"
        self.install()

    def install(self, step: int = 0, refuses: bool = False) -> None:
        """Make it new; ``step`` is where the service says that a run stands."""
        sys.modules.pop("wandb", None)
        settings = f"CALLS, STEP, REFUSES = {str(self._calls)!r}, {step}, {refuses}\n"
        (self._folder / "wandb").mkdir(exist_ok=True)
        (self._folder / "wandb" / "__init__.py").write_text(settings + STAND_IN)
        self._calls.write_text("")

    def told(self, name: str) -> list[Any]:
        calls = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [told for called, told in calls if called == name]


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Service:
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # put back as it was afterwards
    return Service(folder)


class Drawing(TinyTask):
    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        run.picture("noise", np.zeros((4, 6, 3), dtype=np.uint8))
        return {"twice": 2.0 * epoch}


def test_fit__logs_the_same_on_weights_and_biases(
    service: Service, whole: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert same(fit(Drawing(), options(run, wandb="parts")), whole.path)
    (begun,) = service.told("init")
    assert (begun["project"], begun["name"], begun["dir"]) == ("parts", "run", str(run))
    assert begun["config"]["kind"] == "tiny"
    assert begun["config"]["batch_size"] == 4
    seen: dict[int, dict[str, Any]] = {}
    for told in service.told("log"):
        seen.setdefault(told["step"], {}).update(told)
    points = lines_of(run, "steps.jsonl")
    assert sorted(seen) == [point["step"] for point in points]
    for point in points:
        told = seen[point["step"]]
        assert told["train/loss"] == point["loss"]
        assert told["train/learning_rate"] == point["learning_rate"]
        assert told["speed/data_wait"] == point["data_wait"]
    ends = [seen[epoch * PER_EPOCH] for epoch in range(1, EPOCHS + 1)]
    assert [(told["epoch/twice"], told["noise"]) for told in ends] == [
        (2.0 * epoch, [4, 6, 3]) for epoch in range(1, EPOCHS + 1)
    ]
    assert service.told("finish") == [0]


@pytest.mark.parametrize("online", [False, True])
def test_fit__goes_on_with_the_same_run_there(
    online: bool, service: Service, tmp_path: Path
) -> None:
    run, killed = tmp_path / "run", TinyTask()
    killed.fails_at = 2 * PER_EPOCH + 4
    with pytest.raises(KilledError):
        fit(killed, options(run, wandb="parts"))
    (first,) = service.told("init")
    assert service.told("finish") == [1]
    assert service.told("log")[-1]["step"] == 12
    # The service knows of step 12, which the newest checkpoint does not.
    service.install(step=13 if online else 0)
    fit(TinyTask(), options(run, wandb="parts"))
    (second,) = service.told("init")
    assert (first["id"], first["resume"]) == (second["id"], second["resume"])
    assert second["resume"] == "allow"
    steps = [told["step"] for told in service.told("log")]
    assert (min(steps), max(steps)) == (15 if online else 12, STEPS)
    fit(TinyTask(), options(tmp_path / "other", wandb="parts"))
    assert service.told("init")[-1]["id"] != first["id"]


def test_fit__says_how_to_install_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for train in (fit, keep):
        with pytest.raises(MissingError, match=r"pip install 'semmae\[wandb\]'") as raised:
            train(TinyTask(), options(tmp_path / "run", wandb="parts"))
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_fit__says_what_the_service_says(service: Service, tmp_path: Path) -> None:
    service.install(refuses=True)
    with pytest.raises(
        SettingError, match=r"'No API key configured\.'; run `wandb login`"
    ) as raised:
        fit(TinyTask(), options(tmp_path / "run", wandb="parts"))
    assert "\n" not in str(raised.value)
    service.install()
    fit(TinyTask(), options(tmp_path / "run", wandb="parts"))


def test_fit__does_not_ask_for_it_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an error
    fit(TinyTask(), options(tmp_path, epochs=1))
    assert not (tmp_path / "wandb.json").exists()


def test_keep__shows_a_task_that_needs_no_training(service: Service, tmp_path: Path) -> None:
    keep(Drawing(), options(tmp_path / "run", wandb="parts"))
    assert service.told("log") == [{"step": 0, "noise": [4, 6, 3]}, {"step": 0, "epoch/twice": 0.0}]
    assert service.told("finish") == [0]
