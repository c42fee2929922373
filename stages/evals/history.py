"""`semmae eval rerun` and `semmae eval table`: results on record, again and side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import UserError
from ...storage.results import read_results
from ..networks import checkpoint_hash
from .knn import KnnOptions, measure_knn
from .linear import LinearOptions, measure_linear

Measure = Callable[[Path, dict[str, Any]], dict[str, float]]


def _again_knn(folder: Path, configuration: dict[str, Any]) -> dict[str, float]:
    return measure_knn(KnnOptions(**{**configuration, "output": folder}))


def _again_linear(folder: Path, configuration: dict[str, Any]) -> dict[str, float]:
    return measure_linear(LinearOptions(**{**configuration, "output": folder / "rerun"}))


MEASURES: dict[str, Measure] = {"knn": _again_knn, "linear": _again_linear}
"""How each kind of evaluation is run again."""


def results_table(folder: Path) -> pd.DataFrame:
    """One row a record: date, kind, checkpoint and metrics.

    Raises:
        MissingError: There are no results in the folder.
    """
    return pd.DataFrame(
        [
            {
                "date": record["date"],
                "kind": record["kind"],
                "checkpoint": record["checkpoint"],
                "seed": record["seed"],
                **record["metrics"],
            }
            for record in read_results(folder)
        ]
    )


def rerun(folder: Path) -> pd.DataFrame:
    """Run every evaluation on record again from its stored checkpoint.

    Nothing on record is changed.

    Args:
        folder: Results folder.

    Returns:
        One row a record and metric: ``kind, checkpoint, metric, old, new, change`` and ``note``,
        which says why a record could not be run again or that its checkpoint is another one now.
    """
    rows: list[dict[str, Any]] = []
    for record in read_results(folder):
        new, note = _measured_again(folder, record)
        for metric, old in record["metrics"].items():
            rows.append(
                {
                    "kind": record["kind"],
                    "checkpoint": record["checkpoint"],
                    "metric": metric,
                    "old": old,
                    "new": new.get(metric, float("nan")),
                    "change": new.get(metric, float("nan")) - old,
                    "note": note,
                }
            )
    return pd.DataFrame(rows)


def _measured_again(folder: Path, record: dict[str, Any]) -> tuple[dict[str, float], str]:
    """The metrics now, and a note where the record no longer stands."""
    if record["kind"] not in MEASURES:
        return {}, f"no rerun of {record['kind']}"
    try:
        changed = checkpoint_hash(record["checkpoint"]) != record["checkpoint_hash"]
        new = MEASURES[record["kind"]](folder, record["configuration"])
    except UserError as error:
        return {}, str(error)
    return new, "the checkpoint has changed since" if changed else ""
