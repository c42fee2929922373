import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from semmae.errors import DamageError, MissingError
from semmae.storage import files
from semmae.storage.part_check import (
    Fault,
    check_complete,
    check_plan,
    check_shards,
    committed_shards,
    complete_store,
    foreign_objects,
)
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import uncommit

if TYPE_CHECKING:
    from .conftest import Example


def test_complete_store__finds_a_flip_of_any_byte(store: Path) -> None:
    (store / "complete.json").unlink()
    rng = random.Random(0)
    kinds = ("parts.zarr/labels/c/*/*/*", "parts.zarr/class_attention/c/*/*/*/*", "meta/*",
             "commits/*", "plan/*", "parts.zarr/labels/zarr.json")  # fmt: skip
    for number in range(120):
        place = rng.choice(sorted(store.glob(kinds[number % len(kinds)])))
        sound = place.read_bytes()
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        place.write_bytes(damaged)
        with pytest.raises(DamageError):
            complete_store(store)
        assert not (store / "complete.json").exists()
        place.write_bytes(sound)
    complete_store(store)


def test_complete_store__takes_the_mark_back_when_damage_is_found(store: Path) -> None:
    (store / "meta/part-00001.parquet").unlink()
    with pytest.raises(DamageError, match=r"meta/part-00001\.parquet is missing"):
        complete_store(store)
    with pytest.raises(DamageError, match="extract-parts"):
        PartStore.open(store)


def test_complete_store__totals_and_second_pass(store: Path) -> None:
    before = (store / "complete.json").stat().st_mtime_ns
    record = complete_store(store)
    assert (record["images"], record["ok"], record["bad"]) == (43, 41, 2)
    assert record["commits"].keys() == {f"{shard:05d}" for shard in range(6)}
    assert (store / "complete.json").stat().st_mtime_ns == before


def test_uncommit__makes_the_next_run_write_the_shard(
    example: "Example", finished: Path, store: Path
) -> None:
    uncommit(store, [1, 4])
    assert committed_shards(store) == {0, 2, 3, 5}
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(store)
    example.fill(store, [1, 4])
    complete_store(store)
    assert example.digests(store) == example.digests(finished)


def test_committed_shards__damaged_or_foreign_record_does_not_count(store: Path) -> None:
    first, second = store / "commits/00000.json", store / "commits/00001.json"
    first.write_bytes(first.read_bytes().replace(b'"ok": 7', b'"ok": 8'))
    shutil.copy(store / "commits/00002.json", second)
    assert committed_shards(store) == {2, 3, 4, 5}


def test_complete_store__sweeps_leftovers_of_what_stands_and_old_ones(
    example: "Example", store: Path
) -> None:
    """As killed writers leave them; what may be somebody's is left alone while it is new."""
    ours = ["plan.json", "commits/00001.json", "meta/part-00001.parquet", "parts.zarr/zarr.json"]
    half = []
    for place in (
        *(store / name for name in ours),
        store / "runs/old.json",
        store / "cache/part-00000",
    ):
        with files.atomic_file(place) as temporary:
            temporary.write_bytes(place.read_bytes() if place.is_file() else b"whole")
        half.append(temporary)
    fresh = half.pop()
    mine = [store / "runs/.notes.tmp", store / "runs/plain.tmp", store / "meta/.hidden"]
    for place in (*half, fresh, *mine):
        place.write_bytes(b"half")
    for place in (half[-1], *mine):
        os.utime(place, (0, 0))
    complete_store(store)
    assert not any(place.exists() for place in half)
    assert all(place.exists() for place in (fresh, *mine))


def faults(store: Path) -> list[Fault]:
    """All that a whole check finds."""
    try:
        found = [*check_plan(store), *check_complete(store), *foreign_objects(store)]
        return found + [fault for check in check_shards(store) for fault in check.faults]
    except (DamageError, MissingError):
        return check_plan(store)


def test_checks__find_nothing_wrong_with_a_finished_store(finished: Path) -> None:
    assert faults(finished) == []


def test_checks__find_a_flip_of_any_bit_and_name_the_object(store: Path) -> None:
    rng = random.Random(0)
    lasting = [place for place in sorted(store.rglob("*")) if place.is_file()]
    for place in lasting:
        sound = place.read_bytes()
        for _ in range(4):
            damaged = bytearray(sound)
            damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
            place.write_bytes(damaged)
            assert place.relative_to(store).as_posix() in {fault.name for fault in faults(store)}
        place.write_bytes(sound)
    assert faults(store) == []


@pytest.mark.parametrize("harm", ["cut", "deleted"])
def test_checks__find_every_file_that_is_cut_or_deleted(store: Path, harm: str) -> None:
    for place in [place for place in sorted(store.rglob("*")) if place.is_file()]:
        sound = place.read_bytes()
        if harm == "cut":
            place.write_bytes(sound[: len(sound) // 2])
        else:
            place.unlink()
        name = place.relative_to(store).as_posix()
        assert name in {fault.name for fault in faults(store)}
        place.write_bytes(sound)


def test_checks__name_foreign_files_but_not_those_of_runs_and_writers(store: Path) -> None:
    for name in ("notes.txt", "meta/part-00099.parquet", "parts.zarr/labels/c/7/0/0"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"?")
    for name in ("runs/a.json", "cache/b.npy", f"meta/.part.{'0' * 32}.tmp"):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(b"!")
    (store / "elsewhere").symlink_to(store.parent)
    found = foreign_objects(store)
    assert all(fault.foreign for fault in found)
    names = {"notes.txt", "meta/part-00099.parquet", "parts.zarr/labels/c/7/0/0", "elsewhere"}
    assert {fault.name for fault in found} == names
