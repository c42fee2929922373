"""Result records: what an evaluation found, with what it takes to run it again.

records/<id>.json   one checked record an evaluation, never changed; the truth
results.parquet     one row a record, made anew from the records: for tables and notebooks
"""

import json
import math
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import MissingError, SettingError
from .files import atomic_file, read_json, write_json

KINDS = ("knn", "linear", "parts")
"""The evaluations there are."""

_TYPES: dict[str, type] = {
    "kind": str,
    "configuration": Mapping,
    "checkpoint": str,
    "checkpoint_hash": str,
    "seed": int,
    "date": str,
    "versions": Mapping,
    "metrics": Mapping,
}


def _moment(date: str) -> datetime:
    """The UTC time of a record's date."""
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise SettingError(
            f"date of a result must be an ISO 8601 time with its zone, such as "
            f"2025-01-31T12:00:00+00:00, not {date!r}"
        )
    return moment.astimezone(UTC)


def _checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it is stored, after checking its fields."""
    if set(record) != set(_TYPES):
        odd = sorted(set(record) ^ set(_TYPES))
        raise SettingError(f"a result must have the fields {list(_TYPES)}; at odds: {odd}")
    for name, kind in _TYPES.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            came = type(record[name]).__name__
            raise SettingError(f"{name} of a result must be {kind.__name__}, not {came}")
    if record["kind"] not in KINDS:
        raise SettingError(f"kind of a result must be one of {KINDS}, not {record['kind']!r}")
    metrics: dict[str, float | None] = {}
    for name, value in record["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SettingError(f"metric {name!r} must be a number, not {type(value).__name__}")
        # JSON has no word for NaN; a figure that came to nothing must not lose the other ones.
        metrics[str(name)] = float(value) if math.isfinite(value) else None
    return {**record, "metrics": metrics}


def _read(place: Path) -> dict[str, Any]:
    """One record with its id, undefined metrics as NaN."""
    record = read_json(place)
    metrics = record["metrics"].items()
    record["metrics"] = {name: math.nan if v is None else v for name, v in metrics}
    return {"id": place.stem, **record}


def _places(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "records").glob("*.json") if not p.name.startswith("."))


def _table(records: list[dict[str, Any]]) -> pa.Table:
    """One row a record; a metric that a record does not have is null."""
    texts = ("id", "kind", "checkpoint", "checkpoint_hash", "date")
    columns: dict[str, pa.Array] = {
        name: pa.array([record[name] for record in records], pa.string()) for name in texts
    }
    data = [record["configuration"].get("data") for record in records]
    columns["data"] = pa.array([d if d is None else str(d) for d in data], pa.string())
    columns["seed"] = pa.array([record["seed"] for record in records], pa.int64())
    for name in sorted({name for record in records for name in record["metrics"]}):
        values = [record["metrics"].get(name) for record in records]
        columns[f"metric.{name}"] = pa.array(values, pa.float64())
    for name in ("configuration", "versions"):
        held = [json.dumps(record[name], sort_keys=True) for record in records]
        columns[name] = pa.array(held, pa.string())
    return pa.table(columns)


def write_result(folder: Path, record: Mapping[str, Any]) -> Path:
    """Keep the outcome of one evaluation and make the table of all anew.

    Args:
        folder: The results folder; made if absent.
        record: ``kind`` (one of `KINDS`), ``configuration`` (plain JSON; its ``data`` becomes a
            column), ``checkpoint`` (path), ``checkpoint_hash`` (SHA-256), ``seed``, ``date``
            (ISO 8601 with its zone), ``versions`` (of the libraries) and ``metrics`` (name to
            number, flat; one that is not finite is kept as undefined).

    Returns:
        ``RESULTS/records/<id>.json``.  The id is the UTC time, the kind and 8 random hex digits,
        so names sort by time and two evaluations never clash.

    Raises:
        SettingError: A field is missing, unknown or of the wrong kind.
        DamageError: Another record of the folder is damaged; this one is kept all the same.
        UserError: The system refused a write.
    """
    kept = _checked(record)
    moment = _moment(kept["date"])
    name = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond:06d}Z-{kept['kind']}-{secrets.token_hex(4)}"
    place = folder / "records" / f"{name}.json"
    write_json(place, kept)
    seen: list[Path] = []
    # Another evaluation may finish while this one writes: whoever ends last has seen all records.
    while seen != (seen := _places(folder)):
        with atomic_file(folder / "results.parquet") as temporary:
            pq.write_table(_table([_read(p) for p in seen]), temporary, write_page_checksum=True)
    return place


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of a results folder, oldest first.

    Args:
        folder: The results folder.

    Returns:
        Each record as it was given to `write_result`, with its ``id``; undefined metrics are NaN.

    Raises:
        MissingError: The folder holds no result.
        DamageError: A record is not what was written; the message names it.
    """
    places = _places(folder)
    if not places:
        raise MissingError(
            f"there are no results in {folder}; write some with `semmae eval ... --output {folder}`"
        )
    return [_read(place) for place in places]
