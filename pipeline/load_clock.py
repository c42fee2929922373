"""What reading and decoding images takes, told apart."""

import contextlib
import threading
import time
from collections.abc import Iterator


class LoadClock:
    """Sums what threads spend on reading and on decoding, by the clock on the wall.

    Several threads may add up to more than passes; what they wait for (storage, a processor, the
    interpreter's lock) counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = {"read": 0.0, "decode": 0.0}

    def __reduce__(self) -> tuple[type["LoadClock"], tuple[()]]:
        return LoadClock, ()

    @property
    def seconds(self) -> dict[str, float]:
        """What went to ``read`` and ``decode`` so far."""
        with self._lock:
            return dict(self._seconds)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Counts the block as reading from storage."""
        with self._counted("read"):
            yield

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Counts the block as decoding, and as what else is done to the pixels."""
        with self._counted("decode"):
            yield

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.perf_counter() - began
