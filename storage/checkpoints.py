"""Training checkpoints and weight files: written whole or not at all, read without unpickling.

A run keeps its checkpoints in ``RUN/checkpoints/step-<8 digits>.pt``.  A file of that name is
always complete, since it is written beside and renamed; so the newest name is the state to go on
from.
"""

import argparse
import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..errors import DamageError, MissingError
from .files import atomic_file
from .leftovers import sweep_folder

FORMAT = 1
"""Version of the checkpoint layout; a reader refuses a newer one."""

_PLAIN = (str, int, float, bool, bytes, type(None))

_NAME = re.compile(r"step-(\d{8,})\.pt")


def save_checkpoint(run: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``RUN/checkpoints/step-<step>.pt`` atomically; what killed writers left there goes.

    Args:
        run: Folder of the run.
        step: Optimiser steps done.
        state: Tensors and plain data only, so that it loads with ``weights_only=True``.

    Returns:
        The path of the file.

    Raises:
        TypeError: The state holds something else.
        UserError: The system refused the write.
    """
    _require_plain("state", state)
    path = run / "checkpoints" / f"step-{step:08d}.pt"
    sweep_folder(path.parent)  # before the write, which may need the space
    with atomic_file(path) as partial, partial.open("wb") as opened:
        _save({"format": FORMAT, **state}, opened)
    return path


def _save(state: dict[str, Any], opened: BinaryIO) -> None:
    """Write a state; into a path, torch would not tell of a full disk by an `OSError`."""
    try:
        torch.save(state, opened)
    except RuntimeError as error:
        # It ends the file after a write that failed, too, and raises that this cannot be.
        if error.__context__ is not None:
            raise error.__context__ from None
        raise


def weight_file(state: Mapping[str, Any]) -> bytes:
    """A file that `torch.load` reads with ``weights_only=True``; equal states give equal files.

    Raises:
        TypeError: The state holds more than tensors and plain data.
    """
    _require_plain("state", state)
    buffer = io.BytesIO()  # into a file, torch would write the file's name
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _require_plain(name: str, value: object) -> None:
    """Raise unless a value will load again: found at the first save, not after the last."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(f"{name}.{key}", key)
            _require_plain(f"{name}.{key}", item)
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):  # type: ignore[arg-type]
            _require_plain(f"{name}.{position}", item)
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN:
        raise TypeError(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: "
            "make it a tensor or plain data"
        )


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run as (step, path), oldest first."""
    found = [
        (int(match[1]), path)
        for path in (run / "checkpoints").glob("step-*.pt")
        if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found)


def newest_checkpoints(run: Path) -> list[Path]:
    """The newest checkpoint of a run, and of each run in its folder that it is made from."""
    found = (checkpoints(folder) for folder in (run, *sorted(run.glob("[!.]*"))))
    return [some[-1][1] for some in found if some]


def prune_checkpoints(
    run: Path, keep_last: int, kept_for_good: Callable[[int], bool] = lambda step: False
) -> None:
    """Remove the older checkpoints of a run.

    Args:
        run: Folder of the run.
        keep_last: Newest checkpoints to keep; 0 keeps all.
        kept_for_good: Whether the checkpoint of a step is kept however old it is.
    """
    for step, path in checkpoints(run)[:-keep_last]:
        if not kept_for_good(step):
            path.unlink()


def resolve_checkpoint(path: Path) -> Path:
    """The file that ``path`` means: itself, or the newest checkpoint of a run folder.

    Raises:
        MissingError: There is no such file, or the folder holds no checkpoint.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise MissingError(f"no checkpoint at {path}: expected a file or the folder of a run")
    found = checkpoints(path)
    if not found:
        raise MissingError(
            f"{path} holds no checkpoint: expected {path}/checkpoints/step-*.pt; "
            "name the folder of a finished run, or a weight file"
        )
    return found[-1][1]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a weight file of ours or of others, without running code from it.

    Args:
        path: A ``.safetensors`` file, or one that `torch.load` reads.  Files of the released MAE
            hold an ``argparse.Namespace``, which is on the safe list; nothing else unpickles.

    Returns:
        What the file holds; for safetensors ``{"model": tensors, **metadata}``.

    Raises:
        MissingError: There is no such file.
        DamageError: The file is damaged, not a weight file, or holds objects that are not tensors
            or plain data.
    """
    if not path.exists():
        raise MissingError(f"no checkpoint at {path}")
    try:
        state = _tensors_of(path) if path.suffix == ".safetensors" else _state_of(path)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamageError(
            f"{path} cannot be read as weights: it is damaged, or no such file"
        ) from error
    except Exception as error:  # pickle.UnpicklingError, and whatever a hostile pickle raises
        raise DamageError(
            f"{path} is damaged or no weight file, or holds more than tensors and plain data, "
            "and such files are not opened because they can run code"
        ) from error
    if not isinstance(state, dict):
        raise DamageError(f"{path} holds a {type(state).__name__}: expected a dict of weights")
    if isinstance(state.get("format"), int) and state["format"] > FORMAT:
        raise DamageError(
            f"{path} has checkpoint format {state['format']}, this semmae reads up to {FORMAT}: "
            "install a newer semmae"
        )
    return state


def _tensors_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return {**(opened.metadata() or {}), "model": tensors}


def _state_of(path: Path) -> object:
    if zipfile.is_zipfile(path):
        # torch writes checksums but does not look at them: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"wrong checksum of {broken}")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    return state


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        MissingError: There is no such file.
    """
    if not path.is_file():
        raise MissingError(f"no file at {path}")
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
