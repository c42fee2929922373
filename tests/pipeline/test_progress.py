import contextlib
import re
import sys
from collections.abc import Callable

import pytest

from semmae.pipeline import progress as subject
from semmae.pipeline.progress import PLAIN_SECONDS, Progress
from semmae.tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    return clock


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: capsys.readouterr().err.splitlines()


def test_progress__says_a_plain_line_now_and_then(
    clock: Clock, lines: Callable[[], list[str]]
) -> None:
    with Progress("reading", 100, "image") as progress:
        for _ in range(45):
            clock.now += PLAIN_SECONDS / 10
            progress.update(2, loss=0.123456)
        assert len(lines()) == 4
    last = lines()
    assert last == ["reading: 90/100 images, 2 images/s, 5 s left, loss 0.1235"]


def test_progress__says_no_line_twice(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Progress("reading", 4, "image") as progress:
        clock.now += PLAIN_SECONDS
        progress.update(4, loss=0.5)
    assert lines() == ["reading: 4/4 images, 0.4 images/s, 0 s left, loss 0.5"]


def test_progress__counts_only_its_own_work_for_the_rate(
    clock: Clock, lines: Callable[[], list[str]]
) -> None:
    with Progress("reading", 1000, "image", done=900) as progress:
        clock.now += 5
        progress.update(50)
    assert lines() == ["reading: 950/1000 images, 10 images/s, 5 s left"]


def test_progress__says_nothing_of_work_that_failed_or_never_began(
    clock: Clock, lines: Callable[[], list[str]]
) -> None:
    with Progress("reading", 10, "image"):
        pass
    with contextlib.suppress(KeyError), Progress("reading", 10, "image") as progress:
        progress.update()
        raise KeyError
    assert lines() == []


def test_progress__keeps_the_last_figures(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Progress("training", 4, "image") as progress:
        progress.update(2, loss=3.0)
        clock.now += 1
        progress.update(2)
    assert lines() == ["training: 4/4 images, 4 images/s, 0 s left, loss 3"]


def test_progress__adds_a_note_to_plain_lines(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Progress("reading", 4, "image") as progress:
        progress.note("slowest there:2")
        clock.now += 1
        progress.update(2, each="1 to 2/s")
    assert lines() == ["reading: 2/4 images, 2 images/s, 1 s left, each 1 to 2/s; slowest there:2"]


def test_progress__draws_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("reading", 4, "image", done=2) as progress:
        progress.note("slowest there:2")
        progress.update(2, loss=0.5)
        monkeypatch.setattr(subject, "NOTE_SECONDS", 0.0)
        progress.note("ms an image: read 1")
    shown = capsys.readouterr().err
    assert re.search(r"reading: 100%.*4/4.*loss 0\.5", shown)
    assert "images/s," not in shown
    assert "slowest" not in shown  # the first of its kind waits as long as the next
    assert "reading: ms an image: read 1\n" in shown
