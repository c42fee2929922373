"""How fast a store is being filled: by which worker, and what the time goes to."""

import threading
from collections.abc import Collection, Mapping
from typing import Any

from ..pipeline.progress import Progress

OWN = {
    "wait": "waiting for images",
    "device": "encoding",
    "hold": "waiting until the shard before was written",
}
"""What a worker does one after another, by the name in its records."""

ACTIVITIES = {**OWN, "write": "writing"}
"""The same, and what its threads do meanwhile."""


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
    """

    def __init__(self, progress: Progress, done: int, shards: Collection[int]) -> None:
        self._progress, self._done, self._bad = progress, done, 0
        self._open = set(shards)
        self._under_way: dict[int, int] = {}
        self._images: dict[str, int] = {}
        self._seconds: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def watch(self, told: Mapping[int, int]) -> None:
        """Take how many images of some shards are done; a `pipeline.cluster.Watch`."""
        with self._lock:
            self._under_way |= {shard: told[shard] for shard in self._open & told.keys()}
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
            worker = record.get("worker", "this process")
            self._images[worker] = self._images.get(worker, 0) + images
            spent = self._seconds.setdefault(worker, {})
            for activity, seconds in record.get("seconds", {}).items():
                spent[activity] = spent.get(activity, 0.0) + seconds
            self._show()

    def _show(self) -> None:
        self._progress.reach(self._done + sum(self._under_way.values()), bad=self._bad)

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """Of each worker its ``images`` and ``seconds`` by activity."""
        return {
            worker: {"images": images, "seconds": dict(self._seconds[worker])}
            for worker, images in sorted(self._images.items())
        }

    def sentence(self) -> str:
        """What the time of all workers went to, and who was slowest; "" if they did not tell."""
        spent = {
            activity: sum(seconds.get(activity, 0.0) for seconds in self._seconds.values())
            for activity in ACTIVITIES
        }
        total = sum(spent.values())
        if not total:
            return ""
        shares = ", ".join(
            f"{words} {spent[activity] / total:.0%}" for activity, words in ACTIVITIES.items()
        )
        rates = {
            worker: images / max(sum(self._seconds[worker].get(a, 0.0) for a in ACTIVITIES), 1e-9)
            for worker, images in self._images.items()
            if images
        }
        slow, fast = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
        told = f"{len(rates)} worker, {rates[slow]:.3g} images/s"
        if len(rates) > 1:
            told = (
                f"{len(rates)} workers, {rates[slow]:.3g} ({slow}) to {rates[fast]:.3g} images/s "
                "each"
            )
        return f"{told}; time went to {shares}"
