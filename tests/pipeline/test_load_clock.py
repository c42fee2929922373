import functools
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from semmae.pipeline.decoding import BadImage
from semmae.pipeline.load_clock import LoadClock
from semmae.pipeline.quarantine import fatal_images
from semmae.pipeline.shard_worker import ShardActor


def test_load_clock__tells_reading_from_decoding_over_all_threads() -> None:
    clock = LoadClock()

    def load(_: int) -> None:
        with clock.reading():
            time.sleep(0.02)
        with clock.decoding(str):
            time.sleep(0.05)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert clock.seconds["read"] >= 8 * 0.02
    assert clock.seconds["decode"] >= 8 * 0.05


def test_load_clock__counts_what_failed_and_lets_it_through() -> None:
    clock = LoadClock()

    def fails() -> None:
        with clock.decoding(str):
            time.sleep(0.01)
            raise BadImage("truncated", "it ends")

    with pytest.raises(BadImage):
        fails()
    assert clock.seconds["decode"] >= 0.01


def test_load_clock__travels_without_its_counts() -> None:
    clock = LoadClock()
    with clock.reading():
        pass
    assert pickle.loads(pickle.dumps(clock)).seconds == {"read": 0.0, "decode": 0.0}


def end_of(block: str) -> tuple[int, str]:
    """How a process ends that runs some lines with a clock that bounds decoding to 0.3 s."""
    program = f"""
import ctypes, signal, sys, time
from semmae.pipeline import load_clock
load_clock._GRACE = 0.2
clock = load_clock.LoadClock(0.3)
{block}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_decoding__that_does_not_end_ends_the_process() -> None:
    code, told = end_of('with clock.decoding(lambda: "a.jpg"): time.sleep(60)')
    assert code == -signal.SIGALRM
    assert told.startswith(
        "decoding a.jpg does not end within --decode-timeout 0.3 s: this process"
    )
    assert told.count("\n") == 1


def test_decoding__that_holds_the_interpreters_lock_is_ended_by_the_kernel() -> None:
    block = """
with clock.decoding(str): time.sleep(0.1)
with clock.decoding(str): ctypes.PyDLL(None).sleep(60)
"""
    assert end_of(block)[0] == -signal.SIGALRM


@pytest.fixture
def ignored() -> Iterator[None]:
    """SIGALRM is ignored here, and so by the processes that are started here."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGALRM, before)


def hangs_at_1(clock: LoadClock, index: int) -> None:
    with clock.decoding(lambda: str(index)):
        time.sleep(60 * (index == 1))


@pytest.mark.usefixtures("ignored")
def test_fatal_images__that_hang_are_told_by_the_signal_though_it_was_ignored(
    capfd: pytest.CaptureFixture[str],
) -> None:
    load = functools.partial(hangs_at_1, LoadClock(0.3))
    assert fatal_images(load, range(3)) == {1: "SIGALRM"}
    assert "decoding 1 does not end" in capfd.readouterr().err


@pytest.mark.usefixtures("ignored")
def test_shard_actor__heeds_the_signal_though_it_was_ignored() -> None:
    ShardActor()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_reading__may_take_any_time_and_so_may_many_decodings() -> None:
    block = """
def load(_):
    with clock.reading(): time.sleep(0.8)
    for _ in range(8):
        with clock.decoding(str): time.sleep(0.1)
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: list(pool.map(load, range(8)))
time.sleep(0.8)
assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # the process is its own again
sys.exit(7)
"""
    assert end_of(block) == (7, "")


def test_decoding__without_a_bound_is_not_watched() -> None:
    block = """
clock = load_clock.LoadClock()
with clock.decoding(str): time.sleep(0.7)
assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
sys.exit(7)
"""
    assert end_of(block) == (7, "")
