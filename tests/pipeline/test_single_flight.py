import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from semmae.pipeline.single_flight import SingleFlight

LONG = 20.0
"""Seconds after which what is waited for counts as never coming."""


def test_single_flight__threads_that_ask_at_once_share_one_load() -> None:
    loads, begun, go_on = list[str](), threading.Event(), threading.Event()

    def load(name: str) -> str:
        loads.append(name)
        begun.set()
        assert go_on.wait(LONG)
        return name.upper()

    flight = SingleFlight(load, 1)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(flight, "a") for _ in range(4)]
        assert begun.wait(LONG)
        go_on.set()
        assert [future.result(LONG) for future in found] == ["A"] * 4
    assert loads == ["a"]


def test_single_flight__others_do_not_wait_for_a_load_that_is_not_theirs() -> None:
    go_on = threading.Event()

    def load(name: str) -> str:
        if name == "slow":
            assert go_on.wait(LONG)
        return name

    flight = SingleFlight(load, 1)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(flight, "slow")
        assert pool.submit(flight, "quick").result(LONG) == "quick"
        go_on.set()
        assert slow.result(LONG) == "slow"


def test_single_flight__keeps_the_last_ones_used() -> None:
    loads = list[int]()

    def load(number: int) -> int:
        loads.append(number)
        return number

    few, all_ = SingleFlight(load, 2), SingleFlight(load)
    assert [few(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert loads == [1, 2, 3, 2]
    loads.clear()
    assert [all_(number) for number in (1, 2, 3, 1, 2, 3)] == [1, 2, 3, 1, 2, 3]
    assert loads == [1, 2, 3]


def test_single_flight__a_load_that_fails_is_tried_again() -> None:
    ends = iter([OSError("now and then"), "there"])

    def load() -> str:
        end = next(ends)
        if isinstance(end, Exception):
            raise end
        return str(end)

    flight = SingleFlight(load)
    with pytest.raises(OSError, match="now and then"):
        flight()
    assert flight() == "there"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_single_flight__a_fork_amid_a_load_neither_hangs_nor_loads_again() -> None:
    begun, go_on, loads = threading.Event(), threading.Event(), list[str]()

    def load(name: str) -> str:
        loads.append(name)
        if name == "slow" and len(loads) == 2:
            begun.set()
            assert go_on.wait(LONG)
        return name

    flight = SingleFlight(load)
    flight("kept")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(flight, "slow")
        assert begun.wait(LONG)
        with flight._lock:  # as another thread may hold it then
            child = os.fork()
        if child == 0:
            threading.Timer(LONG, lambda: os._exit(9)).start()
            found = [flight("kept"), flight("slow")]
            os._exit(0 if found == ["kept", "slow"] and loads == ["kept", "slow", "slow"] else 1)
        go_on.set()
        assert slow.result(LONG) == "slow"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
