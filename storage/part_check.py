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

from ..errors import DamageError, MissingError, UnreadableError, UserError
from .files import damage_of, read_json, read_whole, record_crc32, write_json
from .leftovers import is_leftover, sweep
from .lookahead import each_in
from .part_identity import VERSION
from .part_records import (
    WAY_OUT,
    commit_name,
    commit_path,
    object_names,
    read_commit,
    read_set_up,
    same_store,
)
from .part_writer import uncommit
from .store_paths import StorePath, lasts, sizes_below

_COMMIT = re.compile(r"\d{5}\.json")

_NO_RECORD = (DamageError, MissingError, UnreadableError)


class Fault(NamedTuple):
    """Something that is not as it was written."""

    name: str
    """The object, relative to the store."""
    reason: str
    """A few words: ``is missing``, ``has a wrong checksum``, ..."""
    error: UnreadableError | None = None
    """Where the system refuses to read it, which may pass: the object may be sound."""

    @property
    def foreign(self) -> bool:
        """Whether it is no object of the store at all."""
        return self.reason.startswith("is foreign")

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def _unreadable(name: str, error: UnreadableError) -> Fault:
    said = error.__cause__
    reason = said.strerror if isinstance(said, OSError) else None
    return Fault(name, f"cannot be read ({reason or said})", error)


def _faults(path: StorePath, objects: Mapping[str, Mapping[str, int]]) -> Iterator[Fault]:
    """What is wrong with objects of a store, by their sizes and checksums."""
    for name, known in objects.items():
        try:
            if reason := damage_of(path / name, known):
                yield Fault(name, reason)
        except UnreadableError as error:
            yield _unreadable(name, error)


def _refuse_unreadable(path: StorePath, faults: Iterable[Fault]) -> None:
    """Storage that fails says nothing of what it holds, which must not be given up for that."""
    unread = [fault for fault in faults if fault.error is not None]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UnreadableError(
            f"the part store {path} cannot be checked now, {unread[0]}{more}: see to the disk or "
            "mount that it lies on, and to your rights to it, and run again; what a disk has lost "
            "for good `semmae parts repair` makes anew"
        ) from unread[0].error


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
    except UnreadableError as error:
        return [_unreadable("plan.json", error)]
    return list(_faults(path, plan["objects"]))


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
    except UnreadableError as error:
        return [_unreadable("complete.json", error)]
    # A plan.json that is damaged or gone says nothing of this record.
    with contextlib.suppress(*_NO_RECORD):
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
    with contextlib.suppress(*_NO_RECORD):
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
    except UnreadableError as error:
        return ShardCheck(shard, {}, [_unreadable(name, error)])
    if plan is not None and commit["plan"] != plan:
        return ShardCheck(shard, {}, [Fault(name, "is that of another store")])
    return ShardCheck(shard, commit, list(_faults(path, commit["objects"])))


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
        if name not in known and lasts(name) and not is_leftover(name.rpartition("/")[2])
    ]


def committed_shards(path: StorePath) -> set[int]:
    """The shards of `bad_in_shards`."""
    return set(bad_in_shards(path))


def bad_in_shards(path: StorePath) -> dict[int, int]:
    """How many images could not be used, of each shard whose commit record stands and is sound.

    The shards' objects are not looked at.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
        UnreadableError: The system refuses to read a record.
    """
    _, identity = read_set_up(path)

    def bad_in(shard: int) -> int | None:
        with contextlib.suppress(MissingError, DamageError):
            return int(read_commit(path, identity, shard)["bad"])
        return None

    shards = range(identity.shards)
    found = zip(shards, each_in(path, bad_in, shards), strict=True)
    return {shard: bad for shard, bad in found if bad is not None}


def damaged_shards(
    path: StorePath, shards: Iterable[int] | None = None, told: Callable[[], object] = lambda: None
) -> set[int]:
    """Those of some shards that are not committed, or not what was written; this reads them.

    Args:
        path: Folder of the store.
        shards: Their numbers, not one of them twice; None for all.
        told: Called after each.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
        UnreadableError: The system refuses to read some of it, so that nothing is known of that.
    """
    faults, later = list[Fault](), _later_commits(path)
    damaged = set[int]()
    for check in check_shards(path, shards):
        faults += check.faults
        if check.faults or check.shard in later:
            damaged.add(check.shard)
        told()
    _refuse_unreadable(path, faults)
    return damaged


def _later_commits(path: StorePath) -> set[int]:
    """Shards whose commit record is another one than the store was completed with."""
    try:
        commits = read_json(path / "complete.json")["commits"]
    except (MissingError, DamageError):
        return set()

    def is_later(shard: str) -> bool:
        # What is missing or unreadable is told of by the check of the shard.
        with contextlib.suppress(FileNotFoundError, UnreadableError):
            return zlib.crc32(read_whole(commit_path(path, int(shard)))) != int(commits[shard])
        return False

    found = zip(commits, each_in(path, is_later, commits), strict=True)
    return {int(shard) for shard, later in found if later}


def complete_store(path: StorePath, told: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Verify the whole store and write ``complete.json``, without which it cannot be opened.

    What killed writers left is removed: temporary files, on S3 uploads that were not ended.

    Args:
        path: Folder of the store.
        told: Called after each shard.

    Returns:
        The record: ``images, ok, bad``, ``plan`` (CRC-32 of plan.json) and ``commits`` (CRC-32 of
        each commit record, by shard).

    Raises:
        MissingError: There is no store, or no more.
        DamageError: Shards are not committed, or objects are not what was written; the message
            names them.  A ``complete.json`` of earlier is taken back then.
        UnreadableError: The system refuses to read some of it.
        UserError: The system refused the write.
    """
    plan, identity = same_store(path)
    faults = check_plan(path)
    totals = {"ok": 0, "bad": 0}
    commits, names = {}, {"plan.json", "complete.json", *plan["objects"]}
    for check in check_shards(path):
        faults += check.faults
        names |= {commit_name(check.shard), *check.commit.get("objects", ())}
        if not check.faults:
            totals = {name: count + check.commit[name] for name, count in totals.items()}
            commits[f"{check.shard:05d}"] = record_crc32(check.commit)
        told()
    _refuse_unreadable(path, faults)
    if faults:
        same_store(path)
        with contextlib.suppress(UserError):
            uncommit(path, ())
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        named = "; ".join(map(str, faults[:8]))
        raise DamageError(f"the part store {path} is not complete: {named}{more}; {WAY_OUT}")
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
