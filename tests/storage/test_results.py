import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from semmae.errors import DamageError, MissingError, SettingError
from semmae.storage import results
from semmae.storage.files import write_json


def record(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "knn",
        "configuration": {"data": "photos", "k": 20},
        "checkpoint": "run/last.pt",
        "checkpoint_hash": "ab" * 32,
        "seed": 0,
        "date": "2025-01-31T12:00:00+00:00",
        "versions": {"torch": "2.11.0"},
        "metrics": {"top1": 0.5},
        **changes,
    }


def test_results__come_back_oldest_first(tmp_path: Path) -> None:
    dates = [f"2025-01-{day:02d}T12:00:00+00:00" for day in (3, 1, 2)]
    # Ten in the morning in the far west is evening in UTC: after the noon of that day.
    dates.append("2025-01-01T10:00:00-08:00")
    for date in dates:
        results.write_result(tmp_path, record(date=date))
    found = results.read_results(tmp_path)
    assert [r["date"] for r in found] == [dates[1], dates[3], dates[2], dates[0]]
    ids = [r.pop("id") for r in found]
    assert found[0] == record(date=dates[1])
    assert len(set(ids)) == 4


def test_write_result__same_second_never_clashes(tmp_path: Path) -> None:
    places = {results.write_result(tmp_path, record()) for _ in range(5)}
    assert len(places) == 5
    assert all(place.is_file() and place.parent == tmp_path / "records" for place in places)
    assert len(results.read_results(tmp_path)) == 5


def test_results_table__has_one_row_a_record_and_one_column_a_metric(tmp_path: Path) -> None:
    results.write_result(tmp_path, record())
    results.write_result(
        tmp_path,
        record(kind="parts", configuration={}, metrics={"nmi": np.float32(0.25), "ari": 1}),
    )
    table = pd.read_parquet(tmp_path / "results.parquet").set_index("kind")
    assert set(table.columns) == {
        "id", "checkpoint", "checkpoint_hash", "date", "data", "seed", "configuration", "versions",
        "metric.top1", "metric.nmi", "metric.ari",
    }  # fmt: skip
    assert table.loc["knn", "metric.top1"] == 0.5
    assert math.isnan(float(str(table.loc["knn", "metric.nmi"])))
    assert table.loc["parts", "metric.nmi"] == 0.25
    assert table.loc["knn", "data"] == "photos"
    assert json.loads(str(table.loc["knn", "configuration"])) == {"data": "photos", "k": 20}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records", "results.parquet"]


def test_results__undefined_metric_is_nan_and_keeps_the_others(tmp_path: Path) -> None:
    results.write_result(tmp_path, record(metrics={"iou": math.nan, "nmi": 0.5}))
    (found,) = results.read_results(tmp_path)
    assert math.isnan(found["metrics"]["iou"])
    assert found["metrics"]["nmi"] == 0.5
    assert pd.read_parquet(tmp_path / "results.parquet")["metric.iou"].isna().all()


def test_write_result__table_also_holds_a_record_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = results._table
    pending = [record(seed=7)]

    def slow_table(records: list[dict[str, Any]]) -> Any:
        table = build(records)
        if pending:
            place = tmp_path / "records" / "20990101T000000.000000Z-knn-00000000.json"
            write_json(place, pending.pop())
        return table

    monkeypatch.setattr(results, "_table", slow_table)
    results.write_result(tmp_path, record())
    assert sorted(pd.read_parquet(tmp_path / "results.parquet")["seed"]) == [0, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "magic"},
        {"seed": "0"},
        {"seed": True},
        {"date": "yesterday"},
        {"date": "2025-01-31T12:00:00"},
        {"metrics": {"top1": "0.5"}},
        {"metrics": {"nested": {"a": 1.0}}},
        {"metrics": {"flag": True}},
        {"checkpoint": None},
        {"extra": 1},
    ],
)
def test_write_result__refuses_a_field_that_is_wrong(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(SettingError):
        results.write_result(tmp_path, record(**changes))
    with pytest.raises(MissingError, match="no results"):
        results.read_results(tmp_path)


def test_read_results__damaged_record_is_named(tmp_path: Path) -> None:
    results.write_result(tmp_path, record())
    place = results.write_result(tmp_path, record(seed=1))
    place.write_bytes(place.read_bytes().replace(b'"seed": 1', b'"seed": 2'))
    with pytest.raises(DamageError, match=place.name):
        results.read_results(tmp_path)
