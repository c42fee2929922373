"""`semmae stage1 extract-parts` with workers that read and decode but have no network.

`benchmarks.extraction memory` runs it and reads its last line: peak memory of the driver and of the
worker, in bytes.  It imports no torch, as the command does not.

    python -m semmae.benchmarks.extraction_memory LEARNER DATA STORE
"""

import functools
import sys
from typing import Any

from semmae import cli
from semmae.pipeline.memory import peak_resident
from semmae.pipeline.shard_worker import ShardWorker
from semmae.stages import extract_parts, pace
from semmae.stages.worker_settings import WorkerSettings


def fake_worker(settings: WorkerSettings) -> ShardWorker:
    """The worker of an actor, where torch is imported."""
    from semmae.benchmarks.extraction import FakeEncoder

    return FakeEncoder(settings)


def main() -> None:
    peaks = []
    committed = pace.Pace.committed

    def kept(self: pace.Pace, record: Any) -> None:
        peaks.append(record["peak"])
        committed(self, record)

    pace.Pace.committed = kept  # type: ignore[method-assign]
    extract = functools.partial(extract_parts.extract_parts, worker=fake_worker)
    extract_parts.extract_parts = extract
    learner, data, output = sys.argv[1:]
    given = {"--learner": learner, "--data": data, "--output": output, "--workers": "1"}
    flags = [part for pair in given.items() for part in pair]
    sys.argv = ["semmae", "stage1", "extract-parts", "--split", "all", "--batch-size", "8", *flags]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    assert "torch" not in sys.modules
    print(peak_resident(), max(peaks))


if __name__ == "__main__":
    main()
