import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from semmae.pipeline.decoding import BadImage
from semmae.pipeline.load_clock import LoadClock


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
