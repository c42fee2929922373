"""The folder of a run: whether it may be trained into, and what a run there goes on from."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DamageError, MismatchError, SettingError, UserError
from ..storage.checkpoints import checkpoints, load_checkpoint
from ..storage.files import read_json, write_json
from .feeding import sources_of
from .options import TrainingOptions, plain_options, refuse_difference, settled
from .run_images import changed_images
from .tasks import Task


def run_to_resume(kind: str, options: TrainingOptions) -> dict[str, Any] | None:
    """The newest checkpoint, found to be of a run of this configuration; None for a new run.

    What can be refused before the data are read; `state_to_resume` refuses the rest.

    Raises:
        SettingError: The folder holds a run, and it is not to be resumed.
        MismatchError: The run there has another kind or configuration.
        DamageError: Its newest checkpoint cannot be read.
    """
    found = checkpoints(options.output)
    if found and options.resume == "never":
        raise SettingError(
            f"{options.output} holds a run already: --resume auto goes on with it, or choose "
            "another --output"
        )
    if not found:
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
    was, now = state["data"], sources_of(task.data)
    differing = [
        f"{name} {was.get(name, 'none')[:12]} then, {now.get(name, 'none')[:12]} now"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name)
    ]
    if differing:
        by_image = changed_images(options.output, task.data)
        raise MismatchError(
            f"the run in {options.output} was started on other data: {'; '.join(differing)} "
            f"({state['images']} images then, {len(task.data)} now{by_image and f': {by_image}'}); "
            "restore what changed or choose another --output"
        )
    return state


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
        options = read_json(folder / "options.json")
    if "kind" in options:
        _refuse_kind(str(options["kind"]), kind, folder)
    held = [entry.name for entry in folder.glob("*") if not entry.name.startswith(".")]
    if held and "options.json" not in held:
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
    record = {"kind": task.kind, "options": plain_options(options), "model": task.architecture}
    path = options.output / "options.json"
    with contextlib.suppress(UserError):
        if read_json(path) == record:
            return
    write_json(path, record)
