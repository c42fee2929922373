"""The start of part learning is made of runs that go on where they were killed."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from semmae.errors import MismatchError, MissingError, SettingError
from semmae.pipeline.feeding import Batch
from semmae.stages import learn_parts as learning
from semmae.stages import part_start
from semmae.stages.learn_parts import LearnPartsOptions, learn_parts
from semmae.stages.predictor_learning import TEACHER_FILE, PredictorLearning
from semmae.storage.checkpoints import checkpoints
from semmae.tests.pipeline.peers import together
from semmae.tests.pipeline.tiny import same
from semmae.tests.world import World, learn_options

INNER = {"places": ("places", 12), "round 2": ("round-2", 9), "round 3": ("round-3", 9)}
"""Runs within a run: their folders and steps, by name."""

SAVED = 4
"""Steps between checkpoints."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the processes that are started have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(world: World, run: Path, **changes: object) -> LearnPartsOptions:
    settings = {"place_steps": 12, "round_steps": 9, "checkpoint_steps": SAVED, "micro_batch": 8}
    return learn_options(world, run, **{**settings, **changes})


def learned(
    rank: int, options: LearnPartsOptions, fail: Callable[[str, int], None]
) -> tuple[Path, Counter[str]]:
    """The last checkpoint, and how many steps of which runs it took.

    Args:
        rank: Of the process.
        options: The settings.
        fail: Called with the name and step, from 1, of a run in the run before each.
    """
    steps: Counter[str] = Counter()
    loss = PredictorLearning.loss

    def counted(task: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        steps[task.kind] += 1
        fail(task.kind, steps[task.kind])
        return loss(task, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "LEAST_TOLD", -100.0)
        patch.setattr(PredictorLearning, "loss", counted)
        return learn_parts(options), steps


def go_on(name: str, step: int) -> None:
    """Fails never."""


def interrupted(run: str, at: int, name: str, step: int) -> None:
    if (name, step) == (run, at):
        raise KeyboardInterrupt


def killed(run: str, at: int, name: str, step: int) -> None:
    if (name, step) == (run, at):
        os._exit(9)


def interrupt(options: LearnPartsOptions, run: str, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        learned(0, options, partial(interrupted, run, at))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1][1]


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert learned(0, given(world, run), go_on)[1] == {
        name: steps for name, (_, steps) in INNER.items()
    }
    return run


@pytest.mark.parametrize(("name", "at"), [("places", 7), ("round 2", 6), ("round 3", 2)])
def test_learn_parts__goes_on_within_its_start(
    world: World, whole: Path, tmp_path: Path, name: str, at: int, capsys: Any
) -> None:
    run = tmp_path / "run"
    interrupt(given(world, run), name, at)
    assert not checkpoints(run)
    capsys.readouterr()
    _, steps = learned(0, given(world, run), go_on)
    names = list(INNER)
    done = (at - 1) // SAVED * SAVED
    expected = {name: INNER[name][1] - done}
    for later in names[names.index(name) + 1 :]:
        expected[later] = INNER[later][1]
    assert steps == expected  # nothing of what was done is done again
    for folder in [".", *(folder for folder, _ in INNER.values())]:
        assert same(newest(run / folder), newest(whole / folder))
    told = capsys.readouterr().err
    # Views are taken only for what is still to be learned.
    assert told.count("looking for objects") == (name == "places")
    assert told.count("nats of where on the object") == 1
    for later, (_, count) in INNER.items():
        assert told.count(f"{later}: {8 * count}/{8 * count} images") == (later in expected)


def test_learn_parts__finds_a_start_that_is_done(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(whole, tmp_path / "run")
    for _, path in checkpoints(tmp_path / "run"):
        path.unlink()
    for name in ("sample_place_views", "sample_looks"):
        monkeypatch.setattr(learning, name, lambda *given: pytest.fail("views are taken again"))
    path, steps = learned(0, given(world, tmp_path / "run"), go_on)
    assert not steps
    assert same(path, newest(whole))


def otherwise(measured: Callable[..., Any], *given: Any) -> Any:
    """What k-means, or the vote, might say of tokens that another GPU computed: the reverse."""
    return measured(*given)[::-1].copy()


@pytest.mark.parametrize(
    ("name", "at", "folder", "hook"),
    [("places", 7, "places", "objectness_of"), ("round 2", 6, "round-2", "part_order")],
)
def test_learn_parts__goes_on_with_the_targets_that_a_run_began_with(
    world: World,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    at: int,
    folder: str,
    hook: str,
) -> None:
    interrupt(given(world, tmp_path), name, at)
    monkeypatch.setattr(part_start, hook, partial(otherwise, getattr(part_start, hook)))
    learned(0, given(world, tmp_path), go_on)
    assert same(newest(tmp_path / folder), newest(whole / folder))
    last = list(INNER.values())[-1][0]
    assert not same(newest(tmp_path / last), newest(whole / last))  # the hook had an effect


def test_learn_parts__refuses_to_go_on_without_the_targets_of_then(
    world: World, tmp_path: Path
) -> None:
    interrupt(given(world, tmp_path), "round 2", 6)
    (tmp_path / "round-2" / TEACHER_FILE).unlink()
    with pytest.raises(MissingError, match=r"round-2/teacher\.pt"):
        learned(0, given(world, tmp_path), go_on)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"round_steps": 10}, MismatchError, "--round-steps was 9, is 10"),
        ({"temperature": 0.2}, MismatchError, "--temperature was .*, is 0.2"),
        ({"resume": "never"}, SettingError, "holds a run already"),
    ],
)
def test_learn_parts__refuses_to_go_on_otherwise_within_its_start(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    error: type[Exception],
    told: str,
) -> None:
    interrupt(given(world, tmp_path), "places", 6)
    capsys.readouterr()
    held = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(error, match=told):
        learned(0, given(world, tmp_path, **changes), go_on)
    assert "reading" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == held


def test_learn_parts__names_images_that_changed_within_its_start(
    world: World, tmp_path: Path
) -> None:
    data = copytree(world.data, tmp_path / "images")
    interrupt(given(world, tmp_path / "run", data=str(data)), "places", 6)
    changed = min((data / "train").rglob("*.*"))
    with changed.open("ab") as opened:
        opened.write(b" ")
    with pytest.raises(MismatchError, match=rf"72 images then, 72 now: 1 new .*{changed.name}"):
        learned(0, given(world, tmp_path / "run", data=str(data)), go_on)


def test_learn_parts__begins_anew_before_anything_was_learned(
    world: World, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupt(given(world, run, temperature=0.2), "places", 1)
    path, _ = learned(0, given(world, run, resume="never"), go_on)
    assert same(path, newest(whole))


def test_learn_parts__the_first_of_two_processes_learns_the_start(
    world: World, whole: Path, tmp_path: Path
) -> None:
    options = given(world, tmp_path / "run")
    lost = together(2, partial(learned, options=options, fail=partial(killed, "round 2", 6)))
    assert lost[0].ended == 9
    assert lost[1].error.startswith("UserError: another process of the run was lost")
    assert [step for step, _ in checkpoints(tmp_path / "run" / "round-2")] == [4]
    first, other = together(2, partial(learned, options=options, fail=go_on))
    assert (first.error, other.error) == ("", "")
    assert first.value[1] == {"round 2": 5, "round 3": 9}
    assert not other.value[1]
    for folder, _ in INNER.values():
        assert same(newest(tmp_path / "run" / folder), newest(whole / folder))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        path.name for path in whole.iterdir()
    }
