import pickle
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
        with clock.decoding():
            time.sleep(0.05)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert clock.seconds["read"] >= 8 * 0.02
    assert clock.seconds["decode"] >= 8 * 0.05


def test_load_clock__counts_what_failed_and_lets_it_through() -> None:
    clock = LoadClock()

    def fails() -> None:
        with clock.decoding():
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
