"""The folder of a run: whether it may be trained into, and what a run there goes on from."""

import contextlib
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from ..errors import DamageError, MismatchError, SettingError, UserError
from ..storage.checkpoints import checkpoints, load_checkpoint, newest_checkpoints
from ..storage.files import read_json, write_json
from .feeding import sources_of
from .image_source import ImageSource
from .options import TrainingOptions, plain_options, refuse_difference, settled
from .run_images import changed_images, keep_images
from .tasks import Task

_OPTIONS = "options.json"


def run_to_resume(kind: str, options: TrainingOptions) -> dict[str, Any] | None:
    """The newest checkpoint, found to be of a run of this configuration; None for a new run.

    What can be refused before the data are read; `state_to_resume` refuses the rest.

    Raises:
        SettingError: The folder holds a run, and it is not to be resumed.
        MismatchError: The run there has another kind or configuration.
        DamageError: Its newest checkpoint cannot be read.
    """
    found = checkpoints(options.output)
    if found:
        _refuse_never(options)
    else:
        return None
    path = found[-1][1]
    try:
        state = load_checkpoint(path)
    except DamageError as error:
        before = f"go on from {found[-2][1].name}" if len(found) > 1 else "begin again"
        raise DamageError(f"{error}; remove that file to {before}") from error
    _refuse_kind(str(state.get("kind")), kind, options.output)
    now = plain_options(settled(options))
    refuse_difference(options.output, kind, state["options"], now, options=True)
    return state


def begun_to_resume(kind: str, options: TrainingOptions, images: ImageSource) -> bool:
    """Whether a run without a checkpoint has begun, by runs in its folder that it is made from.

    Args:
        kind: Of the task.
        options: Of the run, as `begin` got them.
        images: Likewise.

    Raises:
        SettingError: It has, and it is not to be resumed.
        MismatchError: It has, with another configuration or other data.
        MissingError, DamageError: It has, and what it was begun with cannot be read.
    """
    if checkpoints(options.output) or not newest_checkpoints(options.output):
        return False
    _refuse_never(options)
    record = read_json(options.output / _OPTIONS)
    now = plain_options(settled(options))
    refuse_difference(options.output, kind, record["options"], now, options=True)
    # A run that had checkpoints, and lost them, has no data there; those it is made from have.
    if "data" in record:
        _refuse_other_data(options.output, record, {"images": images.fingerprint}, images)
    return True


def begin(kind: str, options: TrainingOptions, images: ImageSource) -> None:
    """Write what a run that is made from runs in its folder begins with, before these.

    Args:
        kind: Of the task.
        options: Of the run; for ``RUN/options.json``.
        images: All that is learned from is made from these.
    """
    begun = {"data": {"images": images.fingerprint}, "images": len(images)}
    write_json(options.output / _OPTIONS, {**_record(kind, options), **begun})
    keep_images(options.output, images)


def _refuse_never(options: TrainingOptions) -> None:
    if options.resume == "never":
        raise SettingError(
            f"{options.output} holds a run already: --resume auto goes on with it, or choose "
            "another --output"
        )


def state_to_resume(task: Task, options: TrainingOptions) -> dict[str, Any] | None:
    """The newest checkpoint, found to be one of this very run; None for a new run.

    Raises:
        SettingError, DamageError: As `run_to_resume`.
        MismatchError: The run there has another kind, configuration or data.
    """
    state = run_to_resume(task.kind, options)
    if state is None:
        return None
    architecture = state["architecture"]
    refuse_difference(options.output, task.kind, architecture, task.architecture, options=False)
    _refuse_other_data(options.output, state, sources_of(task.data), task.data)
    return state


def _refuse_other_data(
    folder: Path, state: Mapping[str, Any], now: Mapping[str, str], data: Sized
) -> None:
    """Refuse to go on by other data than those that a run began with.

    Args:
        folder: Of the run.
        state: What it began with: ``data``, fingerprints by name, and ``images``, how many.
        now: Fingerprints of the data of now.
        data: These.

    Raises:
        MismatchError: They differ.
    """
    was = state["data"]
    differing = [
        f"{name} {was.get(name, 'none')[:12]} then, {now.get(name, 'none')[:12]} now"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    if differing:
        by_image = changed_images(folder, data)
        raise MismatchError(
            f"the run in {folder} was started on other data: {'; '.join(differing)} "
            f"({state['images']} images then, {len(data)} now{by_image and f': {by_image}'}); "
            "restore what changed or choose another --output"
        )


def state_of(
    task: Task,
    options: TrainingOptions,
    step: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        task: What is trained.
        options: How.
        step: Optimiser steps done.
        model: Whole state of the model.
        optimizer: Whole state of the optimiser.
        counts: What else a run goes on from, by key.
    """
    return {
        "kind": task.kind,
        "architecture": task.architecture,
        "model": model,
        "optimizer": optimizer,
        "step": step,
        "samples_seen": step * options.batch_size,
        "options": plain_options(options),
        "data": sources_of(task.data),
        "images": len(task.data),
        **counts,
    }


def load_state(
    load: Callable[[Mapping[str, Any]], object], state: Mapping[str, Any], task: Task, folder: Path
) -> None:
    """Load a part of a checkpoint.

    Args:
        load: Takes the part.
        state: The part.
        task: What is trained, for the message.
        folder: Of the run, likewise.

    Raises:
        MismatchError: It does not fit.
    """
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise MismatchError(
            f"the newest checkpoint in {folder} holds other weights than this {task.kind} run "
            "trains: go on with the version of semmae that wrote it, or choose another --output"
        ) from error


def refuse_foreign_folder(folder: Path, kind: str) -> None:
    """Refuse to train into a folder that holds something else.

    Args:
        folder: Where a run is to go; it may be absent, empty, or hold a run of this kind.
        kind: Of the task.

    Raises:
        MismatchError: It holds a run of another kind.
        SettingError: It is a file, or holds things that are no run.
    """
    if folder.is_file():
        raise SettingError(f"{folder} is a file: name a folder as --output")
    if checkpoints(folder):
        return
    options: Mapping[str, Any] = {}
    with contextlib.suppress(UserError):
        options = read_json(folder / _OPTIONS)
    if "kind" in options:
        _refuse_kind(str(options["kind"]), kind, folder)
    held = [entry.name for entry in folder.glob("*") if not entry.name.startswith(".")]
    if held and _OPTIONS not in held:
        raise SettingError(
            f"{folder} is not empty and holds no run ({', '.join(sorted(held)[:3])}...): "
            "name a new or empty folder as --output"
        )


def _refuse_kind(kind: str, wanted: str, folder: Path) -> None:
    if kind != wanted:
        raise MismatchError(
            f"{folder} holds a run of kind {kind!r}, this is {wanted!r}: choose another --output"
        )


def write_options(task: Task, options: TrainingOptions) -> None:
    """Write ``RUN/options.json``, unless it says the same already."""
    record = {**_record(task.kind, options), "model": task.architecture}
    path = options.output / _OPTIONS
    with contextlib.suppress(UserError):
        if read_json(path) == record:
            return
    write_json(path, record)


def _record(kind: str, options: TrainingOptions) -> dict[str, Any]:
    return {"kind": kind, "options": plain_options(settled(options))}
