import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semmae import cli
from semmae.errors import MissingError
from semmae.stages.evals.history import rerun, seed_means
from semmae.stages.evals.parts import PartsOptions, evaluate_parts
from semmae.stages.evals.records import TRAINED, record_of
from semmae.stages.evals.seeds import means_over_seeds, shown_means, training_of
from semmae.stages.learn_parts import learn_parts
from semmae.storage.results import read_results
from semmae.tests.world import World, learn_options

EVALUATED = {"data": "/images", "labels": None, "split": "val", "images": 10, "seed": 0}


def record(
    seed: int,
    metrics: dict[str, float],
    evaluated: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **trained: Any,
) -> dict[str, Any]:
    told = {
        "variant": "anchored",
        "seed": seed,
        "encoder_hash": "a" * 64,
        "steps": 40,
        "train_data": "b" * 64,
        "options": {"blur": 0.7, **(options or {})},
    }
    free = {"learner": f"/learner-{seed}", "output": "/results", "device": "auto"}
    configuration = {**EVALUATED, **free, **(evaluated or {}), TRAINED: {**told, **trained}}
    return record_of("parts", configuration, f"/learner-{seed}", "0" * 64, 0, metrics)


def slow_mean_and_spread(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def test_means_over_seeds__equals_the_slow_reference() -> None:
    nmi, dead = [50.1, 51.3, 49.8], [0.0, 1.0, 0.0]
    records = [record(s, {"nmi": nmi[s], "dead_parts": dead[s]}) for s in range(3)]
    (row,) = means_over_seeds(records).to_dict("records")
    assert (row["variant"], row["encoder"], row["seeds"]) == ("anchored", "a" * 12, 3)
    assert (row["nmi.mean"], row["nmi.std"]) == pytest.approx(slow_mean_and_spread(nmi))
    assert (row["dead_parts.mean"], row["dead_parts.std"]) == pytest.approx(
        slow_mean_and_spread(dead)
    )
    assert row.keys() - {"variant", "encoder", "seeds"} == {
        *("nmi.mean", "nmi.std", "dead_parts.mean", "dead_parts.std")
    }


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"variant": "paper"}, "variant"),
        ({"encoder_hash": "c" * 64}, "encoder"),
        ({"steps": 41}, "steps"),
        ({"train_data": "c" * 64}, "train_data"),
        ({"options": {"blur": 1.2}}, "blur"),
        ({"evaluated": {"data": "/others"}}, "eval.data"),
        ({"evaluated": {"labels": "/labels"}}, "eval.labels"),
        ({"evaluated": {"split": "train"}}, "eval.split"),
        ({"evaluated": {"images": 9}}, "eval.images"),
        ({"evaluated": {"seed": 1}}, "eval.seed"),
    ],
)
def test_means_over_seeds__any_other_difference_is_another_row_that_shows_it(
    change: dict[str, Any], column: str
) -> None:
    table = means_over_seeds([record(0, {"nmi": 1.0}), record(1, {"nmi": 3.0}, **change)])
    assert table["nmi.mean"].tolist() == [1.0, 3.0]
    assert table["seeds"].tolist() == [1, 1]
    assert table[column].nunique(dropna=False) == 2
    beside = {"variant", "encoder", "seeds", "nmi.mean", "nmi.std"}
    assert set(table.columns) == beside | {column}


@pytest.mark.parametrize(
    "change",
    [{"device": "cuda"}, {"feature_batch": 8}, {"output": "/elsewhere"}, {"baselines": False}],
)
def test_means_over_seeds__what_changes_no_figure_of_the_learner_parts_no_rows(
    change: dict[str, Any],
) -> None:
    table = means_over_seeds([record(0, {"nmi": 1.0}), record(1, {"nmi": 3.0}, evaluated=change)])
    assert table["seeds"].tolist() == [2]


def test_means_over_seeds__a_learner_measured_twice_counts_once_by_its_newest_record() -> None:
    records = [record(0, {"nmi": 1.0}), record(1, {"nmi": 3.0}), record(0, {"nmi": 5.0})]
    (row,) = means_over_seeds(records).to_dict("records")
    assert (row["seeds"], row["nmi.mean"]) == (2, 4.0)


def test_means_over_seeds__leaves_out_records_that_name_no_training() -> None:
    store = record_of("parts", {"parts": "/store"}, "/store", "0" * 64, 0, {"nmi": 9.0})
    knn = record_of("knn", {TRAINED: {}}, "/run", "0" * 64, 0, {"top1": 9.0})
    assert means_over_seeds([store, knn]).empty
    assert means_over_seeds([store, record(0, {"nmi": 1.0}), knn])["nmi.mean"].tolist() == [1.0]


def test_means_over_seeds__a_metric_that_a_seed_lacks_is_undefined_not_a_mean_of_fewer() -> None:
    records = [
        record(0, {"nmi": 1.0, "grid.nmi": 2.0, "fg_nmi": math.nan}),
        record(1, {"nmi": 3.0, "fg_nmi": 4.0}),
    ]
    (row,) = means_over_seeds(records).to_dict("records")
    assert row["nmi.mean"] == 2.0
    assert all(math.isnan(row[f"{name}.mean"]) for name in ("grid.nmi", "fg_nmi"))
    assert all(math.isnan(row[f"{name}.std"]) for name in ("grid.nmi", "fg_nmi"))


def test_shown_means__mean_and_spread_stand_in_one_column() -> None:
    table = pd.DataFrame(
        {
            "variant": ["anchored", "paper"],
            "eval.data": ["/a", "/b"],
            "seeds": [3, 1],
            "nmi.mean": [50.42, 7.0],
            "nmi.std": [0.68, math.nan],
            "grid.nmi.mean": [math.nan, 1.0],
            "grid.nmi.std": [math.nan, 0.0],
        }
    )
    shown = shown_means(table)
    assert list(shown.columns) == ["variant", "eval.data", "seeds", "nmi", "grid.nmi"]
    assert shown["nmi"].tolist() == ["50.4 ± 0.7", "7.0"]
    assert shown["grid.nmi"].tolist() == ["-", "1.0 ± 0.0"]
    assert shown["seeds"].tolist() == [3, 1]


@pytest.fixture(scope="module")
def learners(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that differ in their seed alone, each of its own copy of the encoder, and a third."""
    root = tmp_path_factory.mktemp("learners")
    copied = root / "copied-encoder"
    shutil.copytree(world.encoder, copied)
    learn_parts(learn_options(world, root / "one", seed=1))
    learn_parts(learn_options(world, root / "two", seed=2, encoder=str(copied), loader_workers=1))
    learn_parts(learn_options(world, root / "blurred", seed=2, blur=1.2))
    return {name: root / name for name in ("one", "two", "blurred")}


def test_training_of__two_seeds_differ_in_their_seed_alone(learners: dict[str, Path]) -> None:
    told = {}
    for name, run in learners.items():
        (checkpoint,) = sorted((run / "checkpoints").iterdir())
        told[name] = training_of(checkpoint)
    assert (told["one"].pop("seed"), told["two"].pop("seed")) == (1, 2)
    assert told["one"] == told["two"]
    assert told["blurred"]["options"].pop("blur") == 1.2
    assert told["one"]["options"].pop("blur") == 1.5
    assert told["blurred"]["options"] == told["one"]["options"]


def test_training_of__a_learner_without_its_encoder_is_refused(
    learners: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(learners["one"], tmp_path / "run")
    (tmp_path / "run" / "encoder.safetensors").unlink()
    (checkpoint,) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(MissingError, match=r"encoder\.safetensors"):
        training_of(checkpoint)


def test_eval_table__two_seeds_are_one_row_and_can_be_run_again(
    world: World,
    learners: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"data": world.data, "output": tmp_path, "images": 12}
    options = {
        name: PartsOptions(learner=run, baselines=False, **settings)  # type: ignore[arg-type]
        for name, run in learners.items()
    }
    found = {name: evaluate_parts(one) for name, one in options.items()}
    evaluate_parts(PartsOptions(parts=world.store, output=tmp_path))
    means = seed_means(tmp_path)
    assert means["seeds"].tolist() == [2, 1]
    assert means["blur"].tolist() == [1.5, 1.2]
    pair = [found["one"]["coherence"], found["two"]["coherence"]]
    mean, spread = slow_mean_and_spread(pair)
    assert (means["coherence.mean"][0], means["coherence.std"][0]) == pytest.approx((mean, spread))
    assert [TRAINED in r["configuration"] for r in read_results(tmp_path)] == [True] * 3 + [False]
    again = rerun(tmp_path)
    assert again["measured"].all()
    assert (again["change"] == 0).all()
    assert (again["note"] == "").all()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["semmae", "eval", "table", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    records, below = capsys.readouterr().out.split("parts, mean ± standard deviation over seeds\n")
    assert records.startswith("parts\n")
    assert f"{mean:.1f} ± {spread:.1f}" in below
    rows = {line.split()[0]: line.split()[1:] for line in below.strip().splitlines()}
    assert (rows["seeds"], rows["blur"]) == (["2", "1"], ["1.5", "1.2"])
