"""A small part store with every kind of array, shards that end early, and bad images."""

import hashlib
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from semmae.storage.part_check import complete_store
from semmae.storage.part_identity import META_SCHEMA, StoreIdentity
from semmae.storage.part_writer import create_store, write_shard

Shard = tuple[NDArray[np.uint8], pa.Table, NDArray[np.float16], NDArray[np.float16]]


@dataclass(frozen=True)
class Example:
    identity: StoreIdentity
    plan: pa.Table
    names: tuple[str, ...] = ("cat", "dog")
    bad: frozenset[int] = frozenset({3, 40})

    def content(
        self, shard: int, identity: StoreIdentity | None = None, bad: Set[int] | None = None
    ) -> Shard:
        """What a worker would hand over for a shard, a function of its number."""
        identity = identity or self.identity
        bad = self.bad if bad is None else bad
        rng = np.random.default_rng(shard)
        start, stop = identity.shard_range(shard)
        n, (rows, columns), parts = stop - start, identity.grid, identity.parts
        meta = pa.table(
            {
                "index": list(range(start, stop)),
                "key": [f"{i:03d}.jpg" for i in range(start, stop)],
                "label": [i % 2 for i in range(start, stop)],
                "width": [None if i in bad else 100 for i in range(start, stop)],
                "height": [None if i in bad else 80 for i in range(start, stop)],
                "crc32": list(range(start, stop)),
                "status": ["bad" if i in bad else "ok" for i in range(start, stop)],
                "error_code": ["truncated" if i in bad else None for i in range(start, stop)],
                "error_kind": ["OSError" if i in bad else None for i in range(start, stop)],
                "error": ["file is cut" if i in bad else None for i in range(start, stop)],
                "confidence": [None if i in bad else 0.5 for i in range(start, stop)],
                "part_areas": [None if i in bad else [0.2] * parts for i in range(start, stop)],
            },
            schema=META_SCHEMA,
        )
        labels = rng.integers(0, parts, (n, rows, columns), dtype=np.uint8)
        attention = rng.random((n, identity.attention_heads, rows, columns)).astype(np.float16)
        return labels, meta, attention, rng.random((n, parts, rows, columns)).astype(np.float16)

    def fill(self, path: Path, shards: Sequence[int] = range(6)) -> None:
        create_store(path, self.identity, self.plan, self.names)
        for shard in shards:
            write_shard(path, shard, *self.content(shard))

    @staticmethod
    def digests(path: Path) -> dict[str, str]:
        return {
            str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(path.rglob("*"))
            if file.is_file() and "cache" not in file.relative_to(path).parts
        }


@pytest.fixture(scope="session")
def example() -> Example:
    identity = StoreIdentity(
        images=43,  # five shards of 8 and a partial one of 3
        shard_size=8,
        grid=(3, 4),
        parts=5,
        background=4,
        image_size=(48, 64),
        batch_size=8,
        dtype="float32",
        device_type="cpu",
        plan_fingerprint="f" * 8,
        learner_hash="a" * 64,
        preprocessing={"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"},
        attention_heads=2,
        probabilities=True,
    )
    return Example(
        identity, pa.table({"index": range(43), "key": [f"{i:03d}.jpg" for i in range(43)]})
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, example: Example) -> Path:
    path = tmp_path_factory.mktemp("finished") / "store"
    example.fill(path)
    complete_store(path)
    return path


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A finished store of a test's own, without cached labels."""
    ignored = shutil.ignore_patterns("cache")
    return Path(shutil.copytree(finished, tmp_path / "store", ignore=ignored))
