from pathlib import Path

from semmae.storage.part_tries import Tries, begin_try, forget_tries


def test_tries__are_counted_by_shard_and_run_until_they_are_forgotten(tmp_path: Path) -> None:
    assert begin_try(tmp_path, 3, "a") == Tries(0, 0)
    assert begin_try(tmp_path, 3, "a") == Tries(1, 1)
    assert begin_try(tmp_path, 3, "b") == Tries(2, 0)
    assert begin_try(tmp_path, 30, "b") == Tries(0, 0)
    forget_tries(tmp_path, 3)
    assert begin_try(tmp_path, 3, "b") == Tries(0, 0)
    assert begin_try(tmp_path, 30, "b") == Tries(1, 1)
