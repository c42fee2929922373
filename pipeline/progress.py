"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines where standard error is no terminal."""

NOTE_SECONDS = 60.0
"""Seconds between two notes above the bar on a terminal."""


class Progress:
    """Counts units of work done and shows them; use as a context manager.

    Args:
        description: What is being done, a few words.
        total: Units in all.
        unit: Name of one unit, such as ``"image"``.
        done: Units that an earlier, interrupted run did; they do not count for the rate.
    """

    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        self._plain = not sys.stderr.isatty()
        self._description, self._unit = description, unit
        self._bar = tqdm(
            desc=description,
            total=total,
            initial=done,
            unit=unit,
            disable=self._plain,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self._first, self._done, self._total = done, done, total
        self._start = self._said = time.monotonic()
        self._figures = self._note = ""
        self._told = (done, "", "")  # what the last plain line said, but for the rate

    @property
    def done(self) -> int:
        """Units done, those of earlier runs too."""
        return self._done

    def reach(self, done: int, **figures: float | str) -> None:
        """Say that ``done`` units are done in all, which may be fewer than was said before."""
        self.update(done - self._done, **figures)

    def note(self, text: str) -> None:
        """Say more at the end of plain lines from now on; on a terminal, above the bar at times."""
        self._note = text
        if not self._plain and text and time.monotonic() - self._said >= NOTE_SECONDS:
            self._said = time.monotonic()
            self._bar.write(f"{self._description}: {text}", file=sys.stderr)

    def update(self, count: int = 1, **figures: float | str) -> None:
        """Say that ``count`` more units are done; ``figures`` are shown beside."""
        self._done += count
        if figures:
            shown = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in figures.items()}
            self._figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            self._bar.set_postfix_str(self._figures, refresh=False)
        self._bar.update(count)
        if self._plain and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._line()

    def _line(self) -> None:
        self._said = time.monotonic()
        self._told = (self._done, self._figures, self._note)
        rate = (self._done - self._first) / max(self._said - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        figures = f", {self._figures}" if self._figures else ""
        note = f"; {self._note}" if self._note else ""
        print(
            f"{self._description}: {self._done}/{self._total} {self._unit}s, "
            f"{rate:.3g} {self._unit}s/s, {left:.0f} s left{figures}{note}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        new = (self._done, self._figures, self._note) != self._told
        if self._plain and kind is None and new and self._done > self._first:
            self._line()
        self._bar.close()
