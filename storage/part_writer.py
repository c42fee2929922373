"""Writing a part store: set it up, write its shards in any order, verify and complete it.

One writer a shard; a shard is done when its commit record stands, never because an array can be
read: Zarr gives the fill value for a shard that is missing.  A shard's bytes are a function of its
content alone, so writers that overlap (a rerun beside workers that outlived a killed driver) leave
the same store.  Layout: `part_records`.

Legend: n images of a shard, H attention heads, P parts.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import DamageError, MismatchError, MissingError, SettingError, UserError
from .files import damage_of, describe, file_crc32, read_json, write_atomically, write_json
from .part_identity import VERSION, StoreIdentity
from .part_records import (
    WAY_OUT,
    commit_path,
    encode_table,
    image_cache_name,
    meta_name,
    object_names,
    read_commit,
    read_set_up,
)
from .part_shards import ShardCodec, array_metadata, array_specs, checked_array, checked_meta

_PLAN_ROWS = 1_000_000
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)
_LEFTOVER_SECONDS = 3600


def _differences(have: Any, want: Any, name: str = "") -> Iterator[str]:
    """Each field that differs between two records, as "name: have/want"."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted({*have, *want}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(have.get(key), want.get(key), inner)
    elif have != want:
        yield f"{name}: the store has {have!r}, this run wants {want!r}"


def _clear_leftovers(path: Path) -> None:
    """Remove an interrupted set-up, and refuse a folder that holds anything else."""
    foreign = {
        entry.name
        for entry in path.iterdir()
        if not entry.name.startswith(".") and entry.name not in {"plan", "parts.zarr", "runs"}
    }
    if (path / "plan").is_dir():
        entries = [entry.name for entry in (path / "plan").iterdir()]
        ours = (name.startswith((".", "part-")) for name in entries)
        foreign |= set() if all(ours) else {"plan"}
    if foreign:
        raise SettingError(
            f"{path} is not empty and is no part store (it holds {', '.join(sorted(foreign)[:5])}, "
            "but no plan.json); name an empty or new folder as --output"
        )
    shutil.rmtree(path / "plan", ignore_errors=True)
    shutil.rmtree(path / "parts.zarr", ignore_errors=True)


def create_store(
    path: Path, identity: StoreIdentity, plan: pa.Table, class_names: Sequence[str] = ()
) -> None:
    """Set up a store, or find that the same one is there already and can be gone on with.

    Args:
        path: Folder of the store; made if absent.
        identity: What the store is to hold.
        plan: One row an image in index order, ``identity.images`` rows.
        class_names: Name of each class; empty without classes.

    Raises:
        MismatchError: A store of another identity is there, or ``plan`` has another length.
        SettingError: The folder holds other things and is no part store.
        UserError: The system refused a write.
    """
    if plan.num_rows != identity.images:
        raise MismatchError(f"the plan has {plan.num_rows} rows for {identity.images} images")
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; name a folder as --output")
    want = {"identity": identity.to_record(), "class_names": list(class_names)}
    if (path / "plan.json").is_file():
        have, _ = read_set_up(path)
        different = [
            *_differences(have["identity"], want["identity"]),
            *_differences(have["class_names"], want["class_names"], "class_names"),
        ]
        if different:
            raise MismatchError(
                f"the part store {path} was begun with other settings ({'; '.join(different)}); "
                "use the same ones to go on with it, or name another --output"
            )
        return
    if path.exists():
        _clear_leftovers(path)
    objects = {f"parts.zarr/{name}": data for name, data in array_metadata(identity).items()}
    for number, start in enumerate(range(0, plan.num_rows, _PLAN_ROWS)):
        objects[f"plan/part-{number:05d}.parquet"] = encode_table(plan.slice(start, _PLAN_ROWS))
    for name, data in objects.items():
        write_atomically(path / name, data)
    described = {name: describe(data) for name, data in objects.items()}
    write_json(path / "plan.json", {"version": VERSION, **want, "objects": described})


def write_shard(
    path: Path,
    shard: int,
    labels: NDArray[np.uint8],
    meta: pa.Table,
    class_attention: NDArray[np.float16] | None = None,
    probabilities: NDArray[np.float16] | None = None,
    *,
    image_cache: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write one shard: its arrays, then its meta rows, and last the commit record.

    Writing the same content again, at any time and in any order, gives the same bytes.  Rows whose
    status is "bad" are stored as `UNLABELLED` (NaN in float arrays), whatever they hold here, so
    that what a batch was padded with leaves no trace.

    Args:
        path: Folder of the store.
        shard: Number of the shard.
        labels: (n, rows, columns) uint8, part ids below ``identity.parts``.
        meta: n rows with the columns of `META_SCHEMA`, indices of the shard in order.
        class_attention: (n, H, rows, columns) float16, where the store has it.
        probabilities: (n, P, rows, columns) float16, where the store has it.
        image_cache: Size and CRC-32 of the shard's cached images, which `write_image_cache` wrote
            already, where the store keeps them.

    Returns:
        The commit record: ``shard, start, stop, ok, bad, objects``.

    Raises:
        MissingError: There is no store.
        MismatchError: An array or the meta rows do not fit the store.
        DamageError: The set-up of the store is damaged.
        UserError: The system refused a write.
    """
    plan, identity = read_set_up(path)
    start, stop = identity.shard_range(shard)
    table = checked_meta(identity, shard, meta)
    ok = np.asarray(pc.equal(table["status"], "ok").to_numpy(), dtype=np.bool_)
    specs = array_specs(identity)
    given = {"labels": labels, "class_attention": class_attention, "probabilities": probabilities}
    for name, values in given.items():
        if values is not None and name not in specs:
            raise MismatchError(f"the part store {path} was set up without {name}")
    if (image_cache is not None) != bool(identity.image_cache):
        raise MismatchError(
            f"the part store {path} was set up {'with' if identity.image_cache else 'without'} an "
            f"image cache, but shard {shard} came {'without' if identity.image_cache else 'with'}"
        )
    objects = {}
    for (name, spec), place in zip(specs.items(), object_names(identity, shard), strict=False):
        limit = identity.parts if name == "labels" else np.inf
        values = checked_array(name, spec, given[name], ok, limit)
        objects[place] = ShardCodec(path, plan, identity, name).encode(shard, values)
    objects[meta_name(shard)] = encode_table(table)
    for place, data in objects.items():
        write_atomically(path / place, data)
    described = {place: describe(data) for place, data in objects.items()}
    if image_cache is not None:
        described[image_cache_name(identity, shard)] = dict(image_cache)
    commit = {
        "shard": shard,
        "start": start,
        "stop": stop,
        "ok": int(ok.sum()),
        "bad": int((~ok).sum()),
        "objects": described,
    }
    write_json(commit_path(path, shard), commit)
    return commit


def committed_shards(path: Path) -> set[int]:
    """The shards whose commit record stands and is sound; their objects are not looked at.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    _, identity = read_set_up(path)
    done = set()
    for shard in range(identity.shards):
        with contextlib.suppress(MissingError, DamageError):
            read_commit(path, identity, shard)
            done.add(shard)
    return done


def damaged_shards(path: Path) -> dict[int, str]:
    """Check every object of every shard against its commit record; this reads the whole store.

    Args:
        path: Folder of the store.

    Returns:
        What is wrong, by shard; ``"is not committed"`` for one that was not written yet.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    _, identity = read_set_up(path)
    return {shard: wrong for shard, wrong, _ in _examine(path, identity) if wrong}


def _examine(path: Path, identity: StoreIdentity) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each shard with what is wrong with it ("" if nothing) and its commit record."""
    for shard in range(identity.shards):
        try:
            commit = read_commit(path, identity, shard)
        except MissingError:
            yield shard, "is not committed", {}
        except DamageError as error:
            yield shard, str(error), {}
        else:
            checks = ((name, damage_of(path / name, o)) for name, o in commit["objects"].items())
            yield shard, "; ".join(f"{n} {wrong}" for n, wrong in checks if wrong), commit


def uncommit(path: Path, shards: Iterable[int]) -> None:
    """Take back the commit records of shards, so that the next run writes them anew.

    Args:
        path: Folder of the store; it counts as not complete afterwards.
        shards: Numbers of the shards; those without a record are passed over.

    Raises:
        UserError: The system refused to remove a record.
    """
    try:
        (path / "complete.json").unlink(missing_ok=True)
        for shard in shards:
            commit_path(path, shard).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from error


def _sweep(path: Path) -> None:
    """Remove temporary files of `atomic_file` that killed writers left; they only cost space.

    A live writer touches its file all the time.  Should a clock be wrong by more than the limit,
    its rename fails and its shard stays uncommitted; nothing that stands is ever lost.
    """
    oldest = time.time() - _LEFTOVER_SECONDS
    for place in path.rglob(".*.tmp"):
        # Another process may sweep too, and the disk may be read-only.
        with contextlib.suppress(OSError):
            known = _LEFTOVER.fullmatch(place.name) and place.is_file() and not place.is_symlink()
            if known and place.stat().st_mtime < oldest:
                place.unlink()


def complete_store(path: Path) -> dict[str, Any]:
    """Verify the whole store and write ``complete.json``, without which it cannot be opened.

    Temporary files of killed writers are removed where they were not written to for an hour.

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
    wrong = {name: damage_of(path / name, o) for name, o in plan["objects"].items()}
    faults = [f"{name} {reason}" for name, reason in wrong.items() if reason]
    totals = {"ok": 0, "bad": 0}
    commits = {}
    for shard, reason, commit in _examine(path, identity):
        if reason:
            faults.append(f"shard {shard} {reason}")
            continue
        totals = {name: count + commit[name] for name, count in totals.items()}
        commits[f"{shard:05d}"] = file_crc32(commit_path(path, shard))
    if faults:
        with contextlib.suppress(UserError):
            uncommit(path, ())
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise DamageError(
            f"the part store {path} is not complete: {'; '.join(faults[:8])}{more}; {WAY_OUT}"
        )
    _sweep(path)
    record = {
        "version": VERSION,
        "images": identity.images,
        **totals,
        "plan": file_crc32(path / "plan.json"),
        "commits": commits,
    }
    with contextlib.suppress(MissingError, DamageError):
        # A store that is complete already may lie on a read-only disk.
        if read_json(path / "complete.json") == record:
            return record
    write_json(path / "complete.json", record)
    return record
