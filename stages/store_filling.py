"""What every command that fills a part store shares: meta rows, and the run itself."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import __version__
from ..errors import DamageError, MismatchError, SettingError, UnreadableError
from ..pipeline.cluster_fitness import MAKE_BYTES
from ..pipeline.options import plain_options
from ..pipeline.plan import Plan
from ..pipeline.progress import Progress
from ..pipeline.sources import LOST, Split, refuse_among_images
from ..pipeline.watching import Watch
from ..storage.files import NO_FILE, read_json, read_whole, write_json
from ..storage.part_check import bad_in_shards, complete_store, damaged_shards
from ..storage.part_identity import META_SCHEMA, StoreIdentity
from ..storage.part_records import decode_table, meta_name, same_store
from ..storage.part_writer import create_store, uncommit, write_shard
from ..storage.store_paths import StorePath
from .pace import Pace

if TYPE_CHECKING:  # it imports torch
    from ..pipeline.image_loading import LoadedImage


class FillOptions(Protocol):
    """What the options of a command that fills a store have."""

    @property
    def data(self) -> str:
        """Images: a folder, Parquet or tars, or a URL."""

    @property
    def split(self) -> Split:
        """Which of them."""

    @property
    def output(self) -> StorePath:
        """Folder or URL of the part store."""


def meta_rows(
    plan: Plan,
    first: int,
    loaded: "Sequence[LoadedImage]",
    labels: NDArray[np.uint8],
    confidence: NDArray[np.floating],
    parts: int,
    start: int = 0,
) -> list[dict[str, Any]]:
    """Rows of `META_SCHEMA` of consecutive images.

    Args:
        plan: Of the store, or of some of its rows.
        first: Position of the first of the images in ``plan``.
        loaded: The n images.
        labels: (n, rows, columns) uint8, part ids below ``parts``; those of bad images are ignored.
        confidence: (n,), mean over the patches of an image.
        parts: Number of part ids.
        start: Position in the store of the first row of ``plan``.
    """
    here = plan.table.slice(first, len(loaded))
    keys, classes, rows = here["key"].to_pylist(), here["label"].to_pylist(), []
    for place, image in enumerate(loaded):
        bad = image.bad
        flat = labels[place].ravel()
        areas = np.bincount(flat, minlength=parts) / flat.size
        rows.append(
            {
                "index": start + first + place,
                "key": keys[place],
                "label": classes[place],
                "width": image.width,
                "height": image.height,
                "crc32": image.crc32,
                "status": "ok" if bad is None else "bad",
                "error_code": bad and bad.code,
                "error_kind": bad and bad.kind,
                "error": bad and bad.message,
                "confidence": float(confidence[place]) if bad is None else None,
                "part_areas": areas.tolist() if bad is None else None,
            }
        )
    return rows


def commit_shard(
    output: StorePath,
    shard: int,
    rows: Sequence[Mapping[str, Any]],
    image_cache: Mapping[str, int] | None = None,
    **arrays: NDArray[Any],
) -> dict[str, Any]:
    """Write one shard of the store: what it takes as `write_shard` does.

    Returns:
        ``shard``, and counts ``ok`` and ``bad``.

    Raises:
        MismatchError: An image is another than when the shard was written before.
        UnreadableError: The system refuses to read what was written of it before.
    """
    _refuse_changed(output / meta_name(shard), rows)
    meta = pa.Table.from_pylist(list(rows), META_SCHEMA)
    commit = write_shard(output, shard, meta=meta, image_cache=image_cache, **arrays)
    return {name: commit[name] for name in ("shard", "ok", "bad")}


def _refuse_changed(place: StorePath, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse images that are others than meta rows of earlier say, where such still stand.

    A shard that is done again, or was broken off before its commit, must not come out as one of
    other images.  Rows that are damaged say nothing: their pages have checksums.

    Args:
        place: The meta rows of the shard, which need not be there.
        rows: The new ones.
    """
    try:
        data = read_whole(place)
    except NO_FILE:
        return
    try:
        have = decode_table(data)
    except (OSError, pa.ArrowException):
        return
    if not have.schema.equals(META_SCHEMA) or have["key"].to_pylist() != [r["key"] for r in rows]:
        return
    before = zip(have["crc32"].to_pylist(), have["error_code"].to_pylist(), strict=True)
    changed = [
        row
        for row, (crc32, error) in zip(rows, before, strict=True)
        if row["crc32"] != crc32 and error != "unreadable"
    ]
    unread = [row for row in changed if row["error_code"] == "unreadable"]
    if unread:
        gone = all(row["error"] == LOST for row in unread)
        raise MismatchError(
            f"{len(unread)} images cannot be read now and could be when {place} was written, such "
            f"as {unread[0]['key']} ({unread[0]['error']}): see to it that they can, and run again"
            + ("; or remove that file, and they become bad rows" if gone else "")
        )
    if changed:
        raise MismatchError(
            f"{len(changed)} images are not those that {place} was written of, such as "
            f"{changed[0]['key']}: put those of then back; or remove that file, and its shard "
            "takes those of now"
        )


def fill_store(
    command: str,
    doing: str,
    options: FillOptions,
    identity: StoreIdentity,
    plan: Plan,
    work: Callable[[list[int], Watch], Iterable[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Fill and complete a store, or go on where an earlier call was interrupted.

    Args:
        command: Name of the command, for the record of the run.
        doing: The same as an activity, for the progress shown.
        options: Settings of the command.
        identity: What the store is to hold.
        plan: Its images.
        work: Commits the shards it is given, in any order, tells meanwhile how far they are, and
            gives for each a record as `Pace.committed` takes it; not called if none is left to do.

    Returns:
        The record ``complete.json``: ``images``, ``ok``, ``bad`` and checksums.

    Raises:
        MismatchError: The output holds a store of another identity, or an image is another than
            when its shard was written before.
        SettingError: Not one image can be read, the output holds other things, or lies among the
            images.
        DamageError: A finished shard was damaged meanwhile.
        MissingError: The store is gone meanwhile.
        UnreadableError: The system refuses to read what is there.
    """
    refuse_among_images(options.output, options.data, options.split)
    begun = create_store(options.output, identity, plan.tables(), plan.class_names)
    done = _sound_shards(options.output)
    todo = [shard for shard in range(identity.shards) if shard not in done]
    # An empty folder where a disk should be mounted looks like a new store.
    begins = f"goes on, {len(done)} of" if begun else "begins a new store of"
    print(f"{options.output}: {begins} {identity.shards} shards", file=sys.stderr)
    started = datetime.now(UTC)
    if todo:  # a store that is complete already may lie on a read-only disk
        _tell_other_versions(options.output)
        _record_run(command, options, identity, started)
    finished = sum(stop - start for start, stop in map(identity.shard_range, done))
    with Progress(doing, identity.images, "image", finished) as progress:
        pace = Pace(progress, finished, todo, sum(done.values()))
        for record in work(todo, pace.watch) if todo else ():
            pace.committed(record)
    if told := pace.sentence():
        print(told, file=sys.stderr)
    with Progress("checking", identity.shards, "shard") as progress:
        complete = complete_store(options.output, progress.update)
    if todo:
        _record_run(command, options, identity, started, pace, complete)
    if complete["bad"]:
        print(
            f"{complete['bad']} of {complete['images']} images could not be used: status and "
            f"error in {options.output / 'meta'} name them",
            file=sys.stderr,
        )
    if not complete["ok"]:
        raise SettingError(
            f"not one of the {complete['images']} images in {options.data} could be read: "
            f"the error columns of {options.output / 'meta'} say why"
        )
    return complete


def _sound_shards(output: StorePath) -> dict[int, int]:
    """Images that could not be used, by shard that is committed and was not altered since.

    What is committed while this looks is another writer's, and right.
    """
    before = bad_in_shards(output)
    if not before:
        return before
    with Progress("checking", len(before), "shard") as progress:
        damaged = damaged_shards(output, sorted(before), progress.update)
    if damaged:
        same_store(output)
        # Looked at twice: while a mount was away, all was missing.
        uncommit(output, damaged_shards(output, sorted(damaged)))
    return bad_in_shards(output)


def _versions() -> dict[str, str]:
    """Versions of what may change the bytes of a store; builds for other devices count alike."""
    found = {name: version(name).partition("+")[0] for name in MAKE_BYTES}
    return {"semmae": __version__, **found}


def _tell_other_versions(output: StorePath) -> None:
    """Say which versions are others than those of the run before, if there was one."""
    records: list[StorePath] = sorted((output / "runs").glob("*.json"), key=str)
    before: dict[str, str] = {}
    for place in records:
        with contextlib.suppress(DamageError, UnreadableError):
            before = read_json(place).get("versions", {})
    others = [
        f"{name} {now} ({before[name]} then)"
        for name, now in _versions().items()
        if before.get(name, now).partition("+")[0] != now
    ]
    if others:
        print(
            f"{output}: versions are others than in the run before: {', '.join(others)}; what is "
            "still to do may differ in its last bits from what those would have written",
            file=sys.stderr,
        )


def _resolved(options: FillOptions, identity: StoreIdentity) -> dict[str, str]:
    return {"batch_size": str(identity.batch_size)} if hasattr(options, "batch_size") else {}


def _record_run(
    command: str,
    options: FillOptions,
    identity: StoreIdentity,
    started: datetime,
    pace: Pace | None = None,
    complete: Mapping[str, Any] | None = None,
) -> None:
    """Keep what differs from run to run apart from the store itself.

    First when the run begins, so that `semmae parts repair` knows its settings however it ends.
    """
    record = {
        "command": command,
        # What ``auto`` came to belongs to the store.
        "options": {**plain_options(options), **_resolved(options, identity)},
        "folder": str(Path.cwd()),
        "started": started.isoformat(),
        "versions": _versions(),
    }
    if pace is not None and complete is not None:
        record |= {
            "finished": datetime.now(UTC).isoformat(),
            "workers": pace.workers,
            "ok": complete["ok"],
            "bad": complete["bad"],
        }
    write_json(options.output / "runs" / f"{started:%Y%m%dT%H%M%S.%f}Z.json", record)
