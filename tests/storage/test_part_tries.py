from pathlib import Path

from semmae.storage.part_tries import Tries, begin_try, forget_tries, take_back_try


def test_tries__are_counted_by_shard_and_run_until_they_are_forgotten(tmp_path: Path) -> None:
    assert begin_try(tmp_path, 3, "a") == Tries(0, 0)
    assert begin_try(tmp_path, 3, "a") == Tries(1, 1)
    assert begin_try(tmp_path, 3, "b") == Tries(2, 0)
    assert begin_try(tmp_path, 30, "b") == Tries(0, 0)
    forget_tries(tmp_path, 3)
    assert begin_try(tmp_path, 3, "b") == Tries(0, 0)
    assert begin_try(tmp_path, 30, "b") == Tries(1, 1)


def test_tries__that_end_for_no_fault_of_the_shard_are_taken_back(tmp_path: Path) -> None:
    take_back_try(tmp_path, 3, "a")  # of a shard that was not begun
    for run in ("b", "a", "a"):
        begin_try(tmp_path, 3, run)
    begin_try(tmp_path, 4, "a")
    take_back_try(tmp_path, 3, "a")
    assert begin_try(tmp_path, 3, "a") == Tries(2, 1)
    assert begin_try(tmp_path, 4, "a") == Tries(1, 1)
