"""Dumps of training steps whose loss or gradients were not finite.

A dump is ``RUN/non-finite/step-<8 digits>.json``: what was computed of what, to be read by people
too.  Beside it are a ``.safetensors`` of its name with masks and whatever else is small, and the
weights it was computed with, ``weights-<8 digits>.safetensors`` of the first step of its row: steps
that are skipped change no weight, so a row of them shares one file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from ..errors import DamageError
from .files import describe, file_crc32, read_checked, read_json, write_atomically, write_json

Arrays = Mapping[str, NDArray[Any]]


class Dump(NamedTuple):
    """A dump as it is read back.

    Attributes:
        record: What `write_dump` was given.
        arrays: Likewise.
        weights: Tensors by name.
    """

    record: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    weights: dict[str, NDArray[Any]]


def dumps_folder(run: Path) -> Path:
    """Where the dumps of a run are."""
    return run / "non-finite"


def drop_dumps(run: Path, step: int) -> None:
    """Remove the dumps of steps after ``step``, which will be done again.

    Of weights, too: those of an earlier row are named after an earlier step.
    """
    # By name, so that no dump is left without what it names.
    for path in sorted(dumps_folder(run).glob("*-*")):
        named = re.fullmatch(r"(?:step|weights)-(\d{8,})\.(?:json|safetensors)", path.name)
        if named and int(named[1]) > step:
            path.unlink()


def write_dump(
    run: Path, step: int, first: int, record: Mapping[str, Any], arrays: Arrays, weights: Arrays
) -> Path:
    """Write the dump of a step.

    Args:
        run: Folder of the run.
        step: The step, from 1.
        first: First step of the row of skipped ones that it is in; only its dump writes the
            weights.
        record: Plain data; numbers that are not finite become the texts ``nan``, ``inf`` and
            ``-inf``.
        arrays: By name.
        weights: By name; not looked at where ``first`` wrote them, which are the same.

    Returns:
        The ``.json`` file.

    Raises:
        UserError: The system refused the write.
    """
    folder = dumps_folder(run)
    kept, path = folder / f"weights-{first:08d}.safetensors", folder / f"step-{step:08d}.json"
    if step == first or not kept.exists():
        weight_file = _write(kept, weights)
    else:
        size = kept.stat().st_size
        weight_file = {"name": kept.name, "size": size, "crc32": file_crc32(kept)}
    files = {"arrays": _write(path.with_suffix(".safetensors"), arrays), "weights": weight_file}
    write_json(path, {**_told(record), "files": files})
    return path


def _write(path: Path, arrays: Arrays) -> dict[str, Any]:
    """Write a file of arrays; its name, size and CRC-32."""
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    write_atomically(path, data)
    return {"name": path.name, **describe(data)}


def _told(value: Any) -> Any:
    """Plain data with every number as JSON can tell it."""
    if isinstance(value, Mapping):
        return {name: _told(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_told(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def read_dump(path: Path) -> Dump:
    """Read a dump.

    Args:
        path: Its ``.json`` file.

    Raises:
        MissingError: It is not there.
        DamageError: It or a file that belongs to it is not what was written.
    """
    record = read_json(path)
    if "files" not in record:
        raise DamageError(f"{path} is no dump: expected RUN/non-finite/step-*.json")
    parts = []
    for part in ("arrays", "weights"):
        name, size, crc32 = (record["files"][part][key] for key in ("name", "size", "crc32"))
        parts.append(load(read_checked(path.with_name(name), {"size": size, "crc32": crc32})))
    return Dump(record, *parts)
