"""What is kept of an evaluation, so that it can be run again from any folder."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sklearn
import timm
import torch

from ... import __version__
from ...pipeline.options import plain_options
from ...storage.checkpoints import resolve_checkpoint
from ...storage.connections import whole_place
from ...storage.files import refuse_unwritable
from ...storage.remote_path import RemotePath
from ...storage.results import write_result

Options = TypeVar("Options")

TRAINED = "trained"
"""Key of a record's configuration under which stands what tells the measured learner from others:
no option of the evaluation, and no part of running it again."""

_PLACES = ("output", "parts", "labels")


def pinned(options: Options) -> Options:
    """The options with absolute paths, and the checkpoint file that a run's folder means now.

    A run that is trained further then does not change what its record measured.

    Args:
        options: Of an evaluation, with an ``output``.

    Returns:
        The same where all is pinned already; ``timm:`` names and URLs stay.

    Raises:
        MissingError: There is no checkpoint.
        UserError: ``output`` is a file, lies in one or cannot be written to.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if field.name == "data" and value is not None:
            found["data"] = whole_place(value)
        elif field.name in _PLACES and value is not None and not isinstance(value, RemotePath):
            found[field.name] = type(value)(_absolute(Path(value)))
        elif field.name == "checkpoint" and not value.startswith("timm:"):
            found["checkpoint"] = str(resolve_checkpoint(_absolute(Path(value))))
    refuse_unwritable(found["output"])  # before the work, which would be lost
    return dataclasses.replace(options, **found)  # type: ignore[type-var]


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def record_of(
    kind: str,
    configuration: dict[str, Any],
    checkpoint: str,
    checkpoint_hash: str,
    seed: int,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """What is kept of an evaluation, as `write_result` takes it.

    Args:
        kind: ``knn``, ``linear`` or ``parts``.
        configuration: Its options as plain data, of `pinned` ones; of a learner also `TRAINED`.
        checkpoint: The weight file, ``timm:<name>``, or the folder of a part store.
        checkpoint_hash: SHA-256, 64 hex digits.
        seed: Its seed.
        metrics: Name to number.
    """
    return {
        "kind": kind,
        "configuration": configuration,
        "checkpoint": checkpoint,
        "checkpoint_hash": checkpoint_hash,
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="microseconds"),
        "versions": {
            "semmae": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "sklearn": sklearn.__version__,
        },
        "metrics": metrics,
    }


def keep_result(
    kind: str,
    options: Any,
    checkpoint: str,
    checkpoint_hash: str,
    metrics: dict[str, float],
    trained: dict[str, Any] | None = None,
) -> Path:
    """Write the record of an evaluation into its results folder.

    Args:
        kind: ``knn``, ``linear`` or ``parts``.
        options: `pinned` options, with ``output`` and ``seed``.
        checkpoint: The weight file, ``timm:<name>``, or the folder of a part store.
        checkpoint_hash: SHA-256, 64 hex digits.
        metrics: Name to number.
        trained: How the measured learner was trained, plain data; kept under `TRAINED` in the
            configuration.

    Returns:
        The file of the record.
    """
    configuration = plain_options(options)
    if trained is not None:
        configuration[TRAINED] = trained
    record = record_of(kind, configuration, checkpoint, checkpoint_hash, options.seed, metrics)
    return write_result(options.output, record)
