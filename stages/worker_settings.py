"""What an extraction worker must be told."""

from dataclasses import dataclass
from pathlib import Path

from ..storage.store_paths import StorePath


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker must be told; everything else is in the store."""

    output: StorePath
    """Folder of the store, absolute, or its URL."""
    root: str
    """Folder or URL that the paths of the plan start from."""
    learner: Path
    """Folder of the learn-parts run, absolute."""
    run: str
    """Name of the run, for counting tries."""
    device: str
    """Device of this worker; of the store's device type."""
    decode_threads: int
    decode_timeout: float
    """Seconds that decoding an image may take; 0 for any."""
    checked: frozenset[int] = frozenset()
    """Shards of which a batch of labels is compared with those of full precision."""
    update: StorePath | None = None
    """Earlier store whose rows are taken over."""
