"""What a record tells of the learner it measured, and means over the seeds learners came from."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from ...pipeline.options import FREE_ON_RESUME
from ...storage.checkpoints import file_hash, load_checkpoint
from ..networks import ENCODER_FILE
from .records import TRAINED

_NOT_COMPARED = frozenset(
    {"output", "learner", "parts", "device", "feature_batch", "baselines", "probe_images", TRAINED}
)
"""Settings of `eval parts` that change no figure of the learner itself."""


def training_of(checkpoint: Path) -> dict[str, Any]:
    """What tells a part learner from others, to be kept with what is measured of it.

    Args:
        checkpoint: Its file, in the folder of its ``learn-parts`` run.

    Returns:
        Plain JSON: ``variant``, ``seed`` (of its training), ``encoder_hash`` (of its file),
        ``steps`` done, ``train_data`` (fingerprint of the images it was trained on) and
        ``options``, the other settings of its training that its weights follow from.

    Raises:
        MissingError: The learner or its encoder is not there.
        DamageError: One of them cannot be read.
    """
    state = load_checkpoint(checkpoint)
    told = dict(state["options"])
    apart = FREE_ON_RESUME | {"variant", "seed", "encoder"}
    return {
        "variant": told["variant"],
        "seed": told["seed"],
        "encoder_hash": file_hash(checkpoint.parent.parent / ENCODER_FILE),
        "steps": state["step"],
        "train_data": state["data"]["images"],
        "options": {name: value for name, value in told.items() if name not in apart},
    }


def means_over_seeds(records: list[dict[str, Any]]) -> pd.DataFrame:
    """The records of `eval parts` whose learners differ in nothing but their seed, as one row.

    Left out are records of stores, which do not tell how their learner was trained, and those of
    older versions, which did not keep it.  A learner that was measured twice counts once.

    Args:
        records: As `storage.results.read_results` gives them, oldest first; of any kind.

    Returns:
        One row a group, in the order of its first record: ``variant``, ``encoder`` (first 12
        digits of its hash), ``seeds`` (count), a column for each setting in which rows differ
        (those of the evaluation as ``eval.<name>``), and for each metric ``<metric>.mean`` and
        ``<metric>.std``, the sample standard deviation.  A mean is NaN where not every seed has
        the metric, and a standard deviation is for fewer than two seeds.  Empty if there is no
        such record.
    """
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] != "parts" or TRAINED not in record["configuration"]:
            continue
        told = _settings(record["configuration"])
        group = json.dumps(told, sort_keys=True)
        settings[group] = told
        seed = int(record["configuration"][TRAINED]["seed"])
        groups.setdefault(group, {})[seed] = record["metrics"]  # the newest of a seed
    differing = _differing(list(settings.values()))
    rows = [
        {
            "variant": settings[group]["variant"],
            "encoder": settings[group]["encoder_hash"][:12],
            "seeds": len(found),
            **{name: settings[group].get(name) for name in differing},
            **_mean_and_spread(list(found.values())),
        }
        for group, found in groups.items()
    ]
    return pd.DataFrame(rows)


def _settings(configuration: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal for two records to differ in nothing but the learner's seed."""
    trained = {name: v for name, v in configuration[TRAINED].items() if name != "seed"}
    options = trained.pop("options")
    measured = {
        f"eval.{name}": value for name, value in configuration.items() if name not in _NOT_COMPARED
    }
    return {**trained, **options, **measured}


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names of settings that are not the same in all; variant and encoder have their columns."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [
        name
        for name in names
        if name not in ("variant", "encoder_hash")
        and any(one.get(name) != settings[0].get(name) for one in settings)
    ]


def _mean_and_spread(metrics: list[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for one in metrics for name in one):
        values = pd.Series([one.get(name, math.nan) for one in metrics], dtype=float)
        found[f"{name}.mean"] = float(values.mean(skipna=False))
        found[f"{name}.std"] = float(values.std(ddof=1, skipna=False))
    return found


def shown_means(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `means_over_seeds` as text, one column a metric.

    Args:
        table: What `means_over_seeds` gives.

    Returns:
        The same rows; a metric is ``"50.4 ± 0.7"``, without a standard deviation ``"50.4"``, and
        ``"-"`` where it is undefined.
    """
    columns: dict[str, Any] = {}
    for name in table.columns:
        metric, _, figure = str(name).rpartition(".")
        if figure == "mean":
            pairs = zip(table[name], table[f"{metric}.std"], strict=True)
            columns[metric] = [_shown(mean, spread) for mean, spread in pairs]
        elif figure != "std":
            columns[str(name)] = table[name]
    return pd.DataFrame(columns)


def _shown(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"
