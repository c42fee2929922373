"""How fast a store is being filled: by which worker, and what the time goes to."""

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from ..pipeline.progress import Progress
from ..pipeline.watching import HERE, Told

OWN = {
    "wait": "waiting for images",
    "device": "encoding",
    "hold": "waiting until the shard before was written",
}
"""What a worker does one after another, by the name in its records; it adds up to its time."""

THREADS = ("read", "decode", "write")
"""What its threads do meanwhile; theirs is time of several, beside the worker's own."""

ACTIVITIES = (*OWN, *THREADS)
"""Names of all that takes time."""

RATE_SECONDS = 60.0
"""What is shown of a worker's rate is that of so long; one that did nothing has none any more."""

_APART = 1.0
"""Seconds between two counts of a worker's images."""


def steady_seconds(seconds: Mapping[str, float]) -> float:
    """What a shard takes among others, which are made while it is written.

    Args:
        seconds: By activity, of the shard.
    """
    return max(sum(seconds[name] for name in OWN), seconds["write"])


class Pace:
    """Counts what workers tell and shows it.

    Args:
        progress: Where it is shown, in images.
        done: Images that earlier runs did.
        shards: The shards still to do.
        bad: Images among those done that could not be used.
    """

    def __init__(
        self, progress: Progress, done: int, shards: Collection[int], bad: int = 0
    ) -> None:
        self._progress, self._done, self._bad = progress, done, bad
        self._open = set(shards)
        self._under_way: dict[int, Told] = {}
        self._images: dict[str, int] = {}
        self._seconds: dict[str, dict[str, float]] = {}
        self._counts: dict[str, deque[tuple[float, int]]] = {}
        self._lock = threading.Lock()

    def watch(self, told: Mapping[int, Told]) -> None:
        """Take how far some shards are; a `pipeline.watching.Watch`."""
        with self._lock:
            self._under_way |= {shard: told[shard] for shard in self._open & told.keys()}
            self._count(time.monotonic())
            self._show()

    def committed(self, record: Mapping[str, Any]) -> None:
        """Take the record of a shard that is committed.

        Args:
            record: ``shard``, counts ``ok`` and ``bad``, and if a worker made it ``worker`` and
                ``seconds`` by activity.
        """
        images = record["ok"] + record["bad"]
        with self._lock:
            self._open.discard(record["shard"])
            self._under_way.pop(record["shard"], None)
            self._done += images
            self._bad += record["bad"]
            if "seconds" in record:  # else it was found, not made
                worker = record.get("worker", HERE)
                self._images[worker] = self._images.get(worker, 0) + images
                spent = self._seconds.setdefault(worker, dict.fromkeys(ACTIVITIES, 0.0))
                for activity, seconds in record["seconds"].items():
                    spent[activity] += seconds
            self._show()

    def _count(self, now: float) -> None:
        """Note how many images each worker has done that is doing any."""
        images: dict[str, int] = {}
        for told in self._under_way.values():
            images[told.worker] = images.get(told.worker, 0) + told.images
        self._counts = {worker: self._counts.get(worker, deque()) for worker in images}
        for worker, counts in self._counts.items():
            if not counts or now - counts[-1][0] >= _APART:
                counts.append((now, self._images.get(worker, 0) + images[worker]))
            while len(counts) > 1 and now - counts[1][0] >= RATE_SECONDS:
                counts.popleft()

    def _rates(self) -> dict[str, float]:
        """Images a second of each worker that is doing any, lately.

        A worker that did none for `RATE_SECONDS` is as good as dead, and its shard may wait long
        for another, so it would be shown as the slowest all that time.
        """
        rates = {}
        for worker, counts in self._counts.items():
            (since, first), (now, last) = counts[0], counts[-1]
            if now > since and (last != first or now - since < RATE_SECONDS):
                rates[worker] = max(last - first, 0) / (now - since)
        return rates

    def _show(self) -> None:
        figures: dict[str, float | str] = {"bad": self._bad}
        rates, note = self._rates(), self._an_image()
        if len(rates) > 1:
            slow = min(rates, key=rates.__getitem__)
            figures["each"] = f"{rates[slow]:.3g} to {max(rates.values()):.3g}/s"
            note = f"slowest {slow}" + (f"; {note}" if note else "")
        done = self._done + sum(told.images for told in self._under_way.values())
        self._progress.note(note)
        self._progress.reach(done, **figures)

    def _an_image(self) -> str:
        """What an image took in the mean, by activity; "" before any shard is done."""
        images = sum(self._images.values())
        if not images:
            return ""
        names = ("read", "decode", "device", "write")
        took = ", ".join(f"{name} {1e3 * self._spent(name) / images:.3g}" for name in names)
        return f"ms an image: {took}"

    def _spent(self, activity: str) -> float:
        """Seconds of all workers."""
        return sum(seconds[activity] for seconds in self._seconds.values())

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """Of each worker its ``images`` and ``seconds`` by activity."""
        return {
            worker: {"images": images, "seconds": dict(self._seconds[worker])}
            for worker, images in sorted(self._images.items())
        }

    def sentence(self) -> str:
        """What the time of all workers went to, and who was slowest; "" if they did not tell."""
        spent = {words: self._spent(name) for name, words in OWN.items()}
        total = sum(spent.values())
        if not total:
            return ""
        shares = ", ".join(f"{words} {seconds / total:.0%}" for words, seconds in spent.items())
        rates = {
            worker: images / max(sum(self._seconds[worker][name] for name in OWN), 1e-9)
            for worker, images in self._images.items()
        }
        slow, fast = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
        told = f"{len(rates)} worker, {rates[slow]:.3g} images/s"
        if len(rates) > 1:
            told = (
                f"{len(rates)} workers, {rates[slow]:.3g} ({slow}) to {rates[fast]:.3g} images/s "
                "each"
            )
        return f"{told}; time went to {shares}; {self._an_image()}"
