import re

import pytest

from semmae.pipeline import progress as shown
from semmae.pipeline.progress import Progress
from semmae.pipeline.watching import Told
from semmae.stages import pace as subject
from semmae.stages.pace import RATE_SECONDS, Pace, steady_seconds
from semmae.tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    monkeypatch.setattr(shown, "time", clock)
    return clock


def record(shard: int, worker: str, wait: float, device: float) -> dict[str, object]:
    seconds = {"wait": wait, "device": device, "hold": 0.0}
    seconds |= {"read": 0.032, "decode": 0.16, "write": 0.0}
    return {"shard": shard, "ok": 30, "bad": 2, "worker": worker, "seconds": seconds}


def test_pace__counts_images_under_way_until_their_shard_is_done() -> None:
    with Progress("testing", 100, "image", 4) as progress:
        pace = Pace(progress, 4, {1, 2})
        # Shard 0 was done by an earlier run.
        pace.watch({0: Told(32, "a"), 1: Told(10, "a"), 2: Told(5, "b")})
        assert progress.done == 4 + 15
        pace.committed(record(1, "a", 1, 3))
        pace.watch({1: Told(32, "a"), 2: Told(0, "b")})  # shard 2 was begun anew
        assert progress.done == 4 + 32


def test_pace__counts_bad_images_of_earlier_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("testing", 64, "image", 32) as progress:
        Pace(progress, 32, {1}, bad=3).committed(record(1, "a", 1, 3))
    assert "bad 5" in capsys.readouterr().err


def test_pace__says_what_time_went_to_and_who_was_slow() -> None:
    with Progress("testing", 64, "image") as progress:
        pace = Pace(progress, 0, {0, 1})
        pace.committed(record(0, "here:1", 1.0, 3.0))
        pace.committed(record(1, "there:2", 0.0, 16.0))
    assert pace.sentence() == (
        "2 workers, 2 (there:2) to 8 images/s each; time went to waiting for images 5%, encoding "
        "95%, waiting until the shard before was written 0%; "
        "ms an image: read 1, decode 5, device 297, write 0"
    )
    assert pace.workers["here:1"]["images"] == 32


def test_pace__a_shard_that_was_found_is_nobodys_work() -> None:
    with Progress("testing", 64, "image") as progress:
        pace = Pace(progress, 0, {0, 1})
        pace.committed(record(0, "here:1", 1.0, 3.0))
        pace.committed({"shard": 1, "ok": 32, "bad": 0, "worker": "here:1"})
        assert progress.done == 64
    assert pace.sentence().startswith("1 worker, 8 images/s")


def test_pace__is_silent_where_nobody_told() -> None:
    with Progress("testing", 64, "image") as progress:
        pace = Pace(progress, 0, {0})
        pace.committed({"shard": 0, "ok": 32, "bad": 0})
    assert pace.sentence() == ""


def test_pace__shows_each_workers_rate_and_the_slowest_while_it_runs(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("testing", 10_000, "image") as progress:
        pace = Pace(progress, 0, range(9))
        for second in range(0, 30, 2):
            clock.now += 2
            pace.watch({0: Told(10 * second, "a:1"), 1: Told(4 * second, "b:2")})
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith("bad 0, each 4 to 10/s; slowest b:2")


def test_pace__a_worker_that_slows_down_is_seen(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("testing", 10_000, "image") as progress:
        pace = Pace(progress, 0, range(9))
        for step in range(200):
            clock.now += 1
            slowed = 10 * min(step, 100) + max(step - 100, 0)
            pace.watch({0: Told(10 * step, "a:1"), 1: Told(slowed, "b:2")})
            if step == 20:
                capsys.readouterr()
            if step == 99:
                early = capsys.readouterr().err.splitlines()[-1]
        late = capsys.readouterr().err.splitlines()[-1]
    assert RATE_SECONDS < 100
    assert "each 10 to 10/s" in early
    assert "each 1 to 10/s; slowest b:2" in late


def test_pace__a_worker_that_does_nothing_any_more_is_not_shown_for_ever(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {}
    with Progress("testing", 10_000, "image") as progress:
        pace = Pace(progress, 0, range(9))
        for step in range(0, 400, 2):
            clock.now += 2
            told = {0: Told(10 * step, "a:1"), 1: Told(5 * step, "b:2")}
            # Dead from 100 on; the next one tells of its shard at 300.
            told[2] = Told(8 * min(step, 100), "c:3") if step < 300 else Told(step, "d:4")
            pace.watch(told)
            lines[step] = "".join(capsys.readouterr().err.splitlines()[-1:])
    assert "each 5 to 10/s; slowest b:2" in lines[98]
    assert any("slowest c:3" in line for line in lines.values())  # it may yet be alive
    shown = [line for step, line in lines.items() if step > 100 + RATE_SECONDS and line]
    assert len(shown) > 20
    assert all("each 5 to 10/s; slowest b:2" in line for line in shown if "d:4" not in line)


def test_pace__a_rate_goes_on_from_shard_to_shard(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("testing", 10_000, "image") as progress:
        pace = Pace(progress, 0, range(20))
        for step in range(40):
            clock.now += 1
            # Ten images a second, 32 a shard; the next one is begun before the record comes.
            shard, images = divmod(10 * step, 32)
            told = {number: Told(32, "a:1") for number in range(shard)}
            pace.watch({**told, shard: Told(images, "a:1"), 19: Told(step, "b:2")})
            if shard and images > 16 and shard - 1 in pace._open:
                pace.committed(record(shard - 1, "a:1", 0, 3.2))
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"each 1 to 10/s; slowest b:2; ms an image: read 1, decode 5", last), last


def test_steady_seconds__is_what_takes_longer_making_or_writing() -> None:
    seconds = {"wait": 1.0, "device": 2.0, "hold": 0.5, "read": 9.0, "decode": 9.0}
    assert steady_seconds({**seconds, "write": 1.0}) == 3.5
    assert steady_seconds({**seconds, "write": 4.0}) == 4.0
