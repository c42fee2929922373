"""`semmae eval rerun` and `semmae eval table`: results on record, again and side by side."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ...errors import UserError
from ...storage.results import read_results
from ..networks import checkpoint_hash
from .knn import KnnOptions, measure_knn
from .linear import LinearOptions, measure_linear
from .parts import PartsOptions, measure_parts, store_hash


class Evaluation(NamedTuple):
    """How a kind of evaluation is run again.

    Attributes:
        measure: Metrics of a configuration on record; the folder is for what training needs.
        hash: Of the checkpoint or store as it is now.
    """

    measure: Callable[[dict[str, Any], Path], dict[str, float]]
    hash: Callable[[str], str]


def _knn(configuration: dict[str, Any], folder: Path) -> dict[str, float]:
    return measure_knn(KnnOptions(**{**configuration, "output": folder}))


def _linear(configuration: dict[str, Any], folder: Path) -> dict[str, float]:
    # In a folder of its own: in the old one the finished training would just be read back.
    with tempfile.TemporaryDirectory(prefix="semmae-") as fresh:
        return measure_linear(LinearOptions(**{**configuration, "output": Path(fresh)}))


def _parts(configuration: dict[str, Any], folder: Path) -> dict[str, float]:
    labels = configuration["labels"]
    paths = {"parts": Path(configuration["parts"]), "labels": labels and Path(labels)}
    return measure_parts(PartsOptions(**{**configuration, **paths, "output": folder}))


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(_knn, checkpoint_hash),
    "linear": Evaluation(_linear, checkpoint_hash),
    "parts": Evaluation(_parts, store_hash),
}
"""Every kind of evaluation that is kept."""


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
    evaluation = EVALUATIONS[record["kind"]]
    try:
        changed = evaluation.hash(record["checkpoint"]) != record["checkpoint_hash"]
        new = evaluation.measure(record["configuration"], folder)
    except UserError as error:
        return {}, str(error)
    return new, "the checkpoint has changed since" if changed else ""
