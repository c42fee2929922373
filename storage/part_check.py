"""Checking a part store to the byte, and completing it.

Whatever is altered, cut, lost or added is found: every object is compared with its commit record,
each record carries its own checksum, and ``complete.json`` vouches for the records.
"""

import contextlib
import functools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import DamageError, MissingError, UserError
from .files import damage_of, read_json, record_crc32, write_json
from .leftovers import is_leftover, sweep
from .lookahead import each_in
from .part_identity import VERSION
from .part_records import (
    UNLASTING,
    WAY_OUT,
    commit_name,
    commit_path,
    object_names,
    read_commit,
    read_set_up,
)
from .part_writer import uncommit
from .store_paths import StorePath, sizes_below

_COMMIT = re.compile(r"\d{5}\.json")


class Fault(NamedTuple):
    """Something that is not as it was written."""

    name: str
    """The object, relative to the store."""
    reason: str
    """A few words: ``is missing``, ``has a wrong checksum``, ..."""

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class ShardCheck(NamedTuple):
    """What the check of a shard found."""

    shard: int
    commit: Mapping[str, Any]
    """Its commit record; empty if there is none that is sound."""
    faults: list[Fault]

    @property
    def bytes(self) -> int:
        """Bytes of its objects."""
        return sum(described["size"] for described in self.commit.get("objects", {}).values())


def check_plan(path: StorePath) -> list[Fault]:
    """Check plan and array metadata of a store.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        MismatchError: The store has another format version.
    """
    begun = (path / "complete.json").exists() or (path / "commits").exists()
    if begun and not (path / "plan.json").exists():
        return [Fault("plan.json", "is missing")]
    try:
        plan, _ = read_set_up(path)
    except DamageError:
        return [Fault("plan.json", "is not what was written")]
    wrong = ((name, damage_of(path / name, known)) for name, known in plan["objects"].items())
    return [Fault(name, reason) for name, reason in wrong if reason]


def check_complete(path: StorePath) -> list[Fault]:
    """Check that ``complete.json`` vouches for the plan and for each commit record there is.

    Args:
        path: Folder of the store.
    """
    try:
        complete = read_json(path / "complete.json")
    except MissingError:
        return [Fault("complete.json", "is missing: the store was not completed")]
    except DamageError:
        return [Fault("complete.json", "is not what was written")]
    # A plan.json that is damaged or gone says nothing of this record.
    with contextlib.suppress(DamageError, MissingError):
        if complete["plan"] != record_crc32(read_json(path / "plan.json")):
            return [Fault("complete.json", "is that of another store")]
    return [
        Fault(commit_name(shard), "is not the one that the store was completed with")
        for shard in sorted(_later_commits(path))
    ]


def check_shards(path: StorePath, shards: Iterable[int] | None = None) -> Iterator[ShardCheck]:
    """Check every object of shards against its commit record; this reads all of them.

    Args:
        path: Folder of the store.
        shards: Numbers of the shards; None for all.

    Yields:
        What was found in each shard, in order.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    plan, identity = read_set_up(path)
    check = functools.partial(
        _check_shard, path, functools.partial(read_commit, path, identity), record_crc32(plan)
    )
    yield from each_in(path, check, range(identity.shards) if shards is None else shards)


def check_shards_alone(path: StorePath) -> Iterator[ShardCheck]:
    """Check every object of the shards there are where ``plan.json`` is damaged or gone.

    Which shards there must be is known from ``complete.json``, if that is sound.

    Args:
        path: Folder of the store.

    Yields:
        What was found in each shard, in order.
    """
    complete: dict[str, Any] = {}
    with contextlib.suppress(DamageError, MissingError):
        complete = read_json(path / "complete.json")

    def read(shard: int) -> dict[str, Any]:
        commit = read_json(commit_path(path, shard))
        if commit.get("shard") != shard:
            raise DamageError(f"the record {commit_path(path, shard)} is not that of its shard")
        return commit

    names = {place.name for place in (path / "commits").glob("*.json")}
    names |= {f"{shard}.json" for shard in complete.get("commits", ())}
    shards = sorted(int(name[:5]) for name in names if _COMMIT.fullmatch(name))
    check = functools.partial(_check_shard, path, read, complete.get("plan"))
    yield from each_in(path, check, shards)


def _check_shard(
    path: StorePath, read: Callable[[int], dict[str, Any]], plan: int | None, shard: int
) -> ShardCheck:
    """Check a shard.

    Args:
        path: Folder of the store.
        read: Reads a commit record, and checks that it is the one of the shard.
        plan: CRC-32 of ``plan.json``, if that is known.
        shard: Number of the shard.
    """
    name = commit_name(shard)
    try:
        commit = read(shard)
    except MissingError:
        return ShardCheck(shard, {}, [Fault(name, "is missing: the shard is not committed")])
    except DamageError:
        return ShardCheck(shard, {}, [Fault(name, "is not what was written")])
    if plan is not None and commit["plan"] != plan:
        return ShardCheck(shard, {}, [Fault(name, "is that of another store")])
    wrong = ((name, damage_of(path / name, known)) for name, known in commit["objects"].items())
    return ShardCheck(shard, commit, [Fault(name, reason) for name, reason in wrong if reason])


def foreign_objects(path: StorePath) -> list[Fault]:
    """Files that no record of the store knows; temporary files of writers are none.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    plan, identity = read_set_up(path)
    known = {"plan.json", "complete.json", *plan["objects"]}
    for shard in range(identity.shards):
        known.update(object_names(identity, shard))
        known.add(commit_name(shard))
    return [
        Fault(name, "is foreign: no record of the store knows it")
        for name in sorted(sizes_below(path), key=lambda name: name.split("/"))
        if name not in known
        and name.partition("/")[0] not in UNLASTING
        and not is_leftover(name.rpartition("/")[2])
    ]


def committed_shards(path: StorePath) -> set[int]:
    """The shards whose commit record stands and is sound; their objects are not looked at.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    _, identity = read_set_up(path)

    def is_done(shard: int) -> bool:
        with contextlib.suppress(MissingError, DamageError):
            read_commit(path, identity, shard)
            return True
        return False

    shards = range(identity.shards)
    return {s for s, done in zip(shards, each_in(path, is_done, shards), strict=True) if done}


def damaged_shards(path: StorePath) -> set[int]:
    """The shards that are not committed, or not what was written; this reads the whole store.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    return {check.shard for check in check_shards(path) if check.faults} | _later_commits(path)


def _later_commits(path: StorePath) -> set[int]:
    """Shards whose commit record is another one than the store was completed with."""
    try:
        commits = read_json(path / "complete.json")["commits"]
    except (MissingError, DamageError):
        return set()

    def is_later(shard: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return zlib.crc32(commit_path(path, int(shard)).read_bytes()) != int(commits[shard])
        return False

    found = zip(commits, each_in(path, is_later, commits), strict=True)
    return {int(shard) for shard, later in found if later}


def complete_store(path: StorePath) -> dict[str, Any]:
    """Verify the whole store and write ``complete.json``, without which it cannot be opened.

    What killed writers left is removed: temporary files that were not written to for an hour, on S3
    uploads that were not ended.

    Args:
        path: Folder of the store.

    Returns:
        The record: ``images, ok, bad``, ``plan`` (CRC-32 of plan.json) and ``commits`` (CRC-32 of
        each commit record, by shard).

    Raises:
        MissingError: There is no store.
        DamageError: Shards are not committed, or objects are not what was written; the message
            names them.  A ``complete.json`` of earlier is taken back then.
        UserError: The system refused the write.
    """
    plan, identity = read_set_up(path)
    faults = check_plan(path)
    totals = {"ok": 0, "bad": 0}
    commits, names = {}, set(plan["objects"])
    for check in check_shards(path):
        faults += check.faults
        names |= set(check.commit.get("objects", ()))
        if not check.faults:
            totals = {name: count + check.commit[name] for name, count in totals.items()}
            commits[f"{check.shard:05d}"] = record_crc32(check.commit)
    if faults:
        with contextlib.suppress(UserError):
            uncommit(path, ())
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        told = "; ".join(map(str, faults[:8]))
        raise DamageError(f"the part store {path} is not complete: {told}{more}; {WAY_OUT}")
    record = {
        "version": VERSION,
        "images": identity.images,
        **totals,
        "plan": record_crc32(plan),
        "commits": commits,
    }
    standing = None
    with contextlib.suppress(MissingError, DamageError):
        standing = read_json(path / "complete.json")
    if standing != record:  # a store that is complete already may lie on a read-only disk
        write_json(path / "complete.json", record)
    sweep(path, names)
    return record
