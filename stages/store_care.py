"""`semmae parts verify` and `semmae parts repair`: find damage in a part store, and mend it."""

import contextlib
import dataclasses
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ..errors import DamageError, MissingError, SettingError, UnreadableError, UserError
from ..pipeline.progress import Progress
from ..storage.files import NO_FILE, read_json, read_whole
from ..storage.part_check import (
    Fault,
    check_complete,
    check_plan,
    check_shards,
    check_shards_alone,
    complete_store,
    foreign_objects,
)
from ..storage.part_records import read_set_up
from ..storage.retries import LOST_NUMBERS
from ..storage.store_paths import StorePath, store_path
from .extract_parts import ExtractPartsOptions, extract_parts
from .import_parts import ImportPartsOptions, import_parts
from .previous_store import PreviousStore


class _Maker(NamedTuple):
    """A command that fills stores."""

    options: type
    run: Callable[[Any], dict[str, Any]]


MAKERS = {
    "stage1 extract-parts": _Maker(ExtractPartsOptions, extract_parts),
    "parts import": _Maker(ImportPartsOptions, import_parts),
}
"""Commands that fill stores, as the records in ``runs/`` name them."""


@dataclass(frozen=True, kw_only=True)
class RepairPartsOptions:
    """Settings of `repair_parts`; what is not given is as in the store's last run."""

    parts: Annotated[StorePath, "A part store."]
    data: Annotated[str | None, "Where its images are now; default: where they were."] = None
    learner: Annotated[Path | None, "Where its learner is now; default: where it was."] = None
    labels: Annotated[Path | None, "Where its label images are now, if it was imported."] = None
    update: Annotated[
        StorePath | None, "Where the store is now that it took rows from; default: where it was."
    ] = None
    workers: Annotated[int | None, "Ray actors; 0: this process. Default: as it was."] = None
    address: Annotated[str | None, "Ray cluster to run on; default: this machine."] = None


def verify_parts(path: StorePath) -> list[Fault]:
    """Read every object of a store and compare it with its checksums.

    Args:
        path: Folder of the store.

    Returns:
        Each damaged, missing or foreign object; empty where all is as it was written.  Without a
        sound ``plan.json`` shards are checked all the same; the plan's files, the arrays' metadata
        and foreign files cannot be.

    Raises:
        MissingError: There is no store.
        MismatchError: The store has another format version.
    """
    faults = check_plan(path)
    whole = all(fault.name != "plan.json" for fault in faults)
    if whole:
        _, identity = read_set_up(path)
        shards, count = check_shards(path), identity.shards
    else:
        print(
            "without a sound plan.json, shards are compared with their own records; what else "
            "belongs to the store cannot be told",
            file=sys.stderr,
        )
        shards, count = check_shards_alone(path), len(list((path / "commits").glob("*.json")))
    faults += check_complete(path)
    began, size = time.perf_counter(), 0
    with Progress("verifying", count, "shard") as progress:
        for check in shards:
            faults += check.faults
            size += check.bytes
            progress.update()
    seconds = time.perf_counter() - began
    print(
        f"read {size / 1e6:.1f} MB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s",
        file=sys.stderr,
    )
    return faults + (foreign_objects(path) if whole else [])


def repair_parts(options: RepairPartsOptions) -> list[Fault]:
    """Do the damaged and missing shards of a store again, and nothing else.

    The command that made the store is run again with the settings of its last run.

    Args:
        options: The settings.

    Returns:
        What was wrong before and is right now.

    Raises:
        MissingError: There is no store, or no record of the run that made it, or the store that
            it took rows from is gone.
        SettingError: A setting does not belong to the command that made the store.
        MismatchError: Images, learner or labels are no longer those of the store; an image that
            kept its size is told by meta rows that still stand.
        DamageError: Something could not be mended, such as foreign files.
        UnreadableError: The storage fails, so that nothing is known of what is there.
    """
    before = verify_parts(options.parts)
    mendable = [fault for fault in before if not fault.foreign]
    if {fault.name for fault in mendable} == {"complete.json"}:
        _remove_lost(options.parts, before)
        complete_store(options.parts)
    elif mendable:
        maker, settings = _last_run(options.parts)
        wanted = {**settings, **_given(options, maker), "output": options.parts}
        if wanted.get("update") is not None:
            _refuse_gone(options.parts, wanted["update"], mendable)
        _remove_lost(options.parts, before)
        maker.run(maker.options(**wanted))
    if foreign := foreign_objects(options.parts):
        names = ", ".join(fault.name for fault in sorted(foreign)[:5])
        raise DamageError(
            f"{options.parts} holds {len(foreign)} files that are not its own ({names}): remove "
            "them; all that is its own is right now"
        )
    return mendable


def _given(options: RepairPartsOptions, maker: _Maker) -> dict[str, Any]:
    """What was said of settings of the command that made the store."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name != "parts" and getattr(options, field.name) is not None
    }
    unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(maker.options)})
    if unknown:
        raise SettingError(
            f"--{unknown[0]} is no setting of what made {options.parts}: leave it out"
        )
    return given


def _refuse_gone(path: StorePath, earlier: StorePath, faults: list[Fault]) -> None:
    """Refuse to mend an updated store whose rows were those of one that is gone."""
    try:
        PreviousStore.open(earlier)
    except MissingError as error:
        names = ", ".join(fault.name for fault in faults[:5])
        raise MissingError(
            f"{path} took rows over from {earlier}, which is gone, so that what is not right "
            f"({names}) cannot be made as it was: say by --update where it is now; or remove "
            "complete.json, and the records in commits/ of the shards at fault, and make a new "
            f"store of the others by `semmae stage1 extract-parts --update {path}` with another "
            "--output"
        ) from error


def _remove_lost(path: StorePath, faults: list[Fault]) -> None:
    """Remove what a disk has lost, so that it is made anew; storage that fails as a whole raises.

    Args:
        path: Folder of the store.
        faults: What is wrong with it.
    """
    unread = {fault.name: fault.error for fault in faults if fault.error is not None}
    if not unread:
        return
    # One of both is there and can be read, as long as the storage itself does not fail.
    standing = next((name for name in ("plan.json", "complete.json") if name not in unread), None)
    if standing is None:
        raise next(iter(unread.values()))
    for name in unread:
        with contextlib.suppress(DamageError, MissingError):
            read_json(path / standing)
        try:
            read_whole(path / name)
        except NO_FILE:
            continue
        except UnreadableError as error:
            if getattr(error.__cause__, "errno", None) not in LOST_NUMBERS:
                raise
            _remove(path / name)


def _remove(place: StorePath) -> None:
    try:
        place.unlink()
    except OSError as error:
        raise UserError(
            f"{place} can neither be read nor removed ({error.strerror}): see to the disk or mount "
            "that it lies on, and run again"
        ) from error


def _last_run(path: StorePath) -> tuple[_Maker, dict[str, Any]]:
    """The command that filled a store last, and its settings by name."""
    records: list[StorePath] = sorted((path / "runs").glob("*.json"), key=str, reverse=True)
    for place in records:
        try:
            record = read_json(place)
        except (DamageError, UnreadableError):
            continue
        maker = MAKERS.get(record.get("command", ""))
        if maker is not None:
            return maker, _options_of(maker.options, record["options"], Path(record["folder"]))
    raise MissingError(
        f"{path / 'runs'} holds no sound record of the run that made the store: run `semmae stage1 "
        f"extract-parts` or `semmae parts import` again with its settings and --output {path}"
    )


def _options_of(kind: type, plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings from a record; relative paths are those of the folder they were given in.

    A cluster of then may be gone, so its address is left out; so is what this version has not.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if name not in hints or name == "address":
            continue
        if value is not None and Path in (hints[name], *typing.get_args(hints[name])):
            value = store_path(value) if "://" in value else folder / Path(value).expanduser()
        elif name == "data" and "://" not in value:
            value = str(folder / Path(value).expanduser())
        values[name] = value
    return values
