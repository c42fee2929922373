from semmae.pipeline.progress import Progress
from semmae.stages.pace import Pace


def record(shard: int, worker: str, wait: float, encode: float) -> dict[str, object]:
    seconds = {"wait": wait, "device": encode, "hold": 0.0, "write": 0.0}
    return {"shard": shard, "ok": 30, "bad": 2, "worker": worker, "seconds": seconds}


def test_pace__counts_images_under_way_until_their_shard_is_done() -> None:
    with Progress("testing", 100, "image", 4) as progress:
        pace = Pace(progress, 4, {1, 2})
        pace.watch({0: 32, 1: 10, 2: 5})
        assert progress.done == 4 + 15  # shard 0 was done by an earlier run
        pace.committed(record(1, "a", 1, 3))
        pace.watch({1: 32, 2: 0})  # shard 2 was begun anew
        assert progress.done == 4 + 32


def test_pace__says_what_time_went_to_and_who_was_slow() -> None:
    with Progress("testing", 64, "image") as progress:
        pace = Pace(progress, 0, {0, 1})
        pace.committed(record(0, "here:1", 1.0, 3.0))
        pace.committed(record(1, "there:2", 0.0, 16.0))
    assert pace.sentence() == (
        "2 workers, 2 (there:2) to 8 images/s each; "
        "time went to waiting for images 5%, encoding 95%, waiting until the shard before was "
        "written 0%, writing 0%"
    )
    assert pace.workers["here:1"]["images"] == 32


def test_pace__is_silent_where_nobody_told() -> None:
    with Progress("testing", 64, "image") as progress:
        pace = Pace(progress, 0, {0})
        pace.committed({"shard": 0, "ok": 32, "bad": 0})
    assert pace.sentence() == ""
