import hashlib
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semmae import cli
from semmae.errors import MismatchError, MissingError, SettingError, UserError
from semmae.pipeline.sources import list_images
from semmae.stages.evals.features import LabelledFeatures, accuracies
from semmae.stages.evals.history import newest_results, rerun, results_tables
from semmae.stages.evals.knn import KnnOptions, knn, vote
from semmae.stages.evals.linear import LinearOptions, linear
from semmae.stages.evals.parts import (
    PartsOptions,
    evaluate_parts,
    measure_parts,
    store_hash,
)
from semmae.stages.evals.records import keep_result, pinned, record_of
from semmae.storage.results import read_results, write_result
from semmae.tests.world import World


def knn_options(world: World, output: Path, checkpoint: str | None = None) -> KnnOptions:
    return KnnOptions(
        checkpoint=checkpoint or str(world.encoder), data=world.data, output=output, neighbours=5
    )


def slow_vote(
    train: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float
) -> np.ndarray:
    """The vote, one query and neighbour at a time."""
    mean = train.mean(axis=0)
    unit = [(row - mean) / np.linalg.norm(row - mean) for row in train]
    scores = np.zeros((len(queries), labels.max() + 1))
    for i, query in enumerate(queries):
        direction = (query - mean) / np.linalg.norm(query - mean)
        cosines = np.array([float(direction @ row) for row in unit])
        nearest = sorted(range(len(train)), key=lambda j: -cosines[j])[:k]
        for j in nearest:
            scores[i, labels[j]] += math.exp((cosines[j] - cosines[nearest[0]]) / temperature)
    return scores


def test_vote__equals_the_slow_reference() -> None:
    generator = np.random.default_rng(0)
    train, queries = generator.normal(size=(60, 8)) + 3, generator.normal(size=(11, 8)) + 3
    labels = generator.integers(0, 4, 60)
    labels[0] = 3
    bank = LabelledFeatures(torch.from_numpy(train).float(), torch.from_numpy(labels))
    found = vote(bank, torch.from_numpy(queries).float(), 7, 0.07)
    expected = slow_vote(train, labels, queries, 7, 0.07)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_vote__takes_all_neighbours_of_a_small_set() -> None:
    bank = LabelledFeatures(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    assert vote(bank, torch.randn(2, 4), 20, 0.07).shape == (2, 2)


def test_accuracies__counts_first_and_first_five() -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5.0, 4, 3, 2, 1, 0], [5.0, 4, 3, 2, 1, 0]])
    found = accuracies(scores, torch.tensor([0, 4, 5]))
    assert found["top1"] == pytest.approx(100 / 3, abs=1e-3)
    assert found["top5"] == pytest.approx(200 / 3, abs=1e-3)


def test_knn__records_checkpoint_and_baselines(world: World, tmp_path: Path) -> None:
    metrics = knn(knn_options(world, tmp_path))
    assert {"top1", "top5", "untrained.top1", "pixels.top1"} <= metrics.keys()
    (record,) = read_results(tmp_path)
    assert record["metrics"] == metrics
    assert record["configuration"]["neighbours"] == 5
    assert len(record["checkpoint_hash"]) == 64
    assert {"semmae", "torch", "timm"} <= record["versions"].keys()


def test_rerun__gives_the_same_figures_from_the_stored_checkpoint(
    world: World, tmp_path: Path
) -> None:
    knn(knn_options(world, tmp_path))
    linear(
        LinearOptions(
            checkpoint=str(world.encoder),
            data=world.data,
            output=tmp_path,
            cached_views=2,
            epochs=3,
            warmup_epochs=1,
            batch_size=32,
        )
    )
    evaluate_parts(
        PartsOptions(parts=world.store, data=world.data, labels=world.labels, output=tmp_path)
    )
    evaluate_parts(PartsOptions(learner=world.learner, data=world.data, output=tmp_path, images=12))
    table = rerun(tmp_path)
    assert set(table["kind"]) == {"knn", "linear", "parts"}
    assert (table["change"] == 0).all()
    assert (table["note"] == "").all()
    assert table["measured"].all()
    assert len(read_results(tmp_path)) == 4


def test_rerun__names_a_checkpoint_that_is_gone(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(world.encoder, moved)
    knn(knn_options(world, tmp_path / "results", str(moved)))
    shutil.rmtree(moved)
    table = rerun(tmp_path / "results")
    assert table["new"].isna().all()
    assert not table["measured"].any()
    assert table["note"].str.contains("no checkpoint").all()


def test_linear__learns_what_features_tell(world: World, tmp_path: Path) -> None:
    metrics = linear(
        LinearOptions(
            checkpoint=str(world.encoder),
            data=world.data,
            output=tmp_path,
            epochs=2,
            warmup_epochs=0,
            batch_size=24,
            loader_workers=0,
            baselines=False,
        )
    )
    assert metrics.keys() == {"top1", "top5"}
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 100


def test_results_tables__has_a_table_a_kind_and_a_row_a_record(tmp_path: Path) -> None:
    for kind, metrics in (
        ("knn", {"top1": 1.0}),
        ("parts", {"nmi": 2.0}),
        ("knn", {"top1": 3.0}),
    ):
        write_result(tmp_path, record_of(kind, {}, "x", "0" * 64, 0, metrics))
    tables = results_tables(tmp_path)
    assert tables.keys() == {"knn", "parts"}
    assert tables["knn"]["top1"].tolist() == [1.0, 3.0]
    assert "nmi" not in tables["knn"]
    newest = newest_results(tmp_path)
    assert newest["knn"].dropna().to_dict() == {"top1": 3.0}
    assert newest["parts"].dropna().to_dict() == {"nmi": 2.0}


def test_knn__data_without_classes_is_refused(world: World, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "flat" / split / "x.png")
    with pytest.raises(MissingError, match="no classes"):
        knn(KnnOptions(checkpoint=str(world.encoder), data=str(tmp_path / "flat"), output=tmp_path))


def test_knn__a_part_learner_is_no_encoder(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="part learner"):
        knn(knn_options(world, tmp_path, str(world.learner)))


def test_evaluate_parts__has_truth_and_baselines(world: World, tmp_path: Path) -> None:
    metrics = evaluate_parts(
        PartsOptions(parts=world.store, data=world.data, labels=world.labels, output=tmp_path)
    )
    assert {"fg_nmi", "grid.fg_nmi", "colour.fg_nmi", "coherence", "dead_parts"} <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())


def test_evaluate_parts__missing_labels_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no label image"):
        evaluate_parts(
            PartsOptions(parts=world.store, data=world.data, labels=tmp_path, output=tmp_path)
        )


def test_evaluate_parts__needs_data_for_labels_alone(world: World, tmp_path: Path) -> None:
    metrics = measure_parts(PartsOptions(parts=world.store, output=tmp_path))
    assert metrics.keys() == {"coherence", "dead_parts", "position_share", "area_entropy"}
    with pytest.raises(SettingError, match="--labels needs --data"):
        PartsOptions(parts=world.store, output=tmp_path, labels=world.labels)


def test_evaluate_parts__records_the_sha256_of_the_store(world: World, tmp_path: Path) -> None:
    evaluate_parts(PartsOptions(parts=world.store, output=tmp_path))
    (record,) = read_results(tmp_path)
    told = (world.store / "complete.json").read_bytes()
    assert record["checkpoint_hash"] == hashlib.sha256(told).hexdigest()
    assert {"semmae", "torch", "timm", "numpy", "sklearn"} == record["versions"].keys()


def test_evaluate_parts__other_images_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "other.png")
    options = PartsOptions(
        parts=world.store, data=str(tmp_path), labels=world.labels, output=tmp_path / "results"
    )
    with pytest.raises(MismatchError, match="72 of its 72"):
        evaluate_parts(options)
    assert not (tmp_path / "results").exists()


def spoilt_copy(data: str, folder: Path, *splits: str) -> str:
    """The data with the first image of each split overwritten by as many zeros."""
    shutil.copytree(data, folder)
    for split in splits:
        place = folder / list_images(folder, split).keys[0]  # type: ignore[arg-type]
        place.write_bytes(bytes(place.stat().st_size))
    return str(folder)


def test_evaluate_parts__images_gone_bad_are_left_out_of_the_colours(
    world: World, tmp_path: Path
) -> None:
    data = spoilt_copy(world.data, tmp_path / "data", "train")
    whole, spoilt = (
        measure_parts(PartsOptions(parts=world.store, data=d, labels=world.labels, output=tmp_path))
        for d in (world.data, data)
    )
    assert "bad_images" not in whole
    assert spoilt["bad_images"] == 1
    assert spoilt["nmi"] == whole["nmi"]
    assert spoilt["colour.nmi"] != whole["colour.nmi"]


def test_records__name_the_file_measured_and_hold_from_any_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.encoder, tmp_path / "run")
    monkeypatch.chdir(world.root)
    options = KnnOptions(
        checkpoint=str(tmp_path / "run"), data="creatures/images", output=tmp_path / "results"
    )
    metrics = knn(options)
    monkeypatch.chdir(tmp_path)
    (old,) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    further = old.with_name("step-99999999.pt")
    further.write_bytes(b"a run that was trained further")
    table = rerun(Path("results"))
    assert dict(zip(table["metric"], table["new"], strict=True)) == metrics
    assert (table["note"] == "").all()
    (record,) = read_results(tmp_path / "results")
    assert record["checkpoint"] == record["configuration"]["checkpoint"] == str(old)
    assert record["configuration"]["data"] == world.data


def test_pinned__makes_every_path_absolute_and_leaves_timm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    parts = pinned(
        PartsOptions(
            parts=Path("store"), data="creatures", labels=Path("labels"), output=Path("new/results")
        )
    )
    assert parts.parts == world.store
    assert parts.data == str(world.root / "creatures")
    assert parts.labels == world.root / "labels"
    assert parts.output == world.root / "new" / "results"
    assert pinned(parts) == parts
    named = KnnOptions(checkpoint="timm:vit_tiny_patch16_224", data="x", output=Path("results"))
    assert pinned(named).checkpoint == named.checkpoint


@pytest.mark.parametrize("below", ["", "deeper"])
def test_evaluations__output_that_is_a_file_is_refused_before_the_work(
    world: World, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / below if below else tmp_path / "file"
    # Nothing else of these would stand: the refusal comes first.
    with pytest.raises(UserError, match=r"cannot write .*a part of the path is a file"):
        knn(KnnOptions(checkpoint=str(world.encoder), data="nowhere", output=output))
    with pytest.raises(UserError, match=r"cannot write .*a part of the path is a file"):
        evaluate_parts(PartsOptions(parts=tmp_path / "nowhere", output=output))


def test_rerun__an_undefined_metric_is_no_failure(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = pinned(PartsOptions(parts=world.store, output=tmp_path))
    from semmae.stages.evals import history

    undefined = history.EVALUATIONS["parts"]._replace(
        measure=lambda configuration, fingerprint: {"coherence": math.nan, "nmi": 1.0}
    )
    monkeypatch.setitem(history.EVALUATIONS, "parts", undefined)
    fingerprint = undefined.hash(str(world.store))
    keep_result("parts", options, str(world.store), fingerprint, {"coherence": math.nan, "nmi": 1})
    table = rerun(tmp_path)
    assert table["new"].isna().tolist() == [True, False]
    assert table["measured"].all()
    assert (table["note"] == "").all()


def test_rerun__says_that_the_checkpoint_has_changed(world: World, tmp_path: Path) -> None:
    options = pinned(PartsOptions(parts=world.store, output=tmp_path))
    keep_result("parts", options, str(world.store), "0" * 64, {"coherence": 1.0})
    table = rerun(tmp_path)
    assert table["measured"].all()
    assert table["note"].str.contains("has changed").all()


@pytest.mark.parametrize("cached_views", [0, 2])
def test_evaluations__count_images_that_cannot_be_read(
    world: World, tmp_path: Path, cached_views: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spoilt_copy(world.data, tmp_path / "data", "train", "val")
    settings = {"checkpoint": str(world.encoder), "data": data, "output": tmp_path / "results"}
    probed = linear(
        LinearOptions(
            **settings,  # type: ignore[arg-type]
            cached_views=cached_views,
            epochs=1,
            warmup_epochs=0,
            batch_size=24,
            loader_workers=0,
        )
    )
    assert [name for name in probed if "bad" in name] == ["bad_images"]
    if cached_views:
        assert probed["bad_images"] == 2
        found = knn(KnnOptions(**settings))  # type: ignore[arg-type]
        assert found["bad_images"] == 2
    else:
        assert probed["bad_images"] == 1
        assert "skipped train/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 1),
        ("base_learning_rate", 0.0),
        ("base_learning_rate", math.nan),
        ("warmup_epochs", -1.0),
        ("warmup_epochs", math.inf),
        ("epochs", 0),
        ("loader_workers", -1),
        ("seed", -1),
    ],
)
def test_linear_options__what_cannot_be_names_its_flag(option: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"--{option.replace('_', '-')} is {value}"):
        LinearOptions(
            **{"checkpoint": "x", "data": "x", "output": Path("x"), option: value}  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_knn_options__temperature_must_be_finite_and_above_0(value: float) -> None:
    with pytest.raises(SettingError, match=f"--temperature is {value}"):
        KnnOptions(checkpoint="x", data="x", output=Path("x"), temperature=value)


def test_linear__a_batch_that_cannot_be_filled_is_refused_before_the_features(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semmae.stages.evals import linear as module

    monkeypatch.setattr(module, "subjects_of", lambda options: pytest.fail("features were made"))
    with pytest.raises(SettingError, match="--batch-size is 73"):
        linear(
            LinearOptions(
                checkpoint=str(world.encoder), data=world.data, output=tmp_path, batch_size=73
            )
        )


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_evaluations__hash_the_checkpoint_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from semmae.stages.evals import knn as knn_module
    from semmae.stages.evals import linear as linear_module

    hashed: list[str] = []

    def counted(named: str) -> str:
        hashed.append(named)
        return "0" * 64

    for module in (knn_module, linear_module):
        monkeypatch.setattr(module, "checkpoint_hash", counted)
    settings = {"checkpoint": str(world.encoder), "data": world.data, "output": tmp_path}
    if kind == "knn":
        knn(KnnOptions(**settings))  # type: ignore[arg-type]
    else:
        probe_settings = {"cached_views": 1, "epochs": 1, "warmup_epochs": 0.0, "batch_size": 32}
        linear(LinearOptions(**settings, **probe_settings))  # type: ignore[arg-type]
    assert len(hashed) == 1
    assert read_results(tmp_path)[0]["checkpoint_hash"] == "0" * 64


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["semmae", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_cli__tables_of_mixed_kinds_hold_no_gaps(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = pinned(PartsOptions(parts=world.store, output=tmp_path))
    for kind, metrics in (("knn", {"top1": 1.0}), ("parts", {"coherence": 2.0})):
        keep_result(kind, options, str(world.store), "0" * 64, metrics)
    assert run_cli(monkeypatch, "eval", "table", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "NaN" not in shown
    assert [line for line in shown.splitlines() if line in ("knn", "parts")] == ["knn", "parts"]


def test_cli__rerun_fails_only_where_a_record_cannot_be_measured(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = pinned(PartsOptions(parts=world.store, output=tmp_path))
    fingerprint = store_hash(str(world.store))
    keep_result("parts", options, str(world.store), fingerprint, {"absent.now": math.nan})
    assert run_cli(monkeypatch, "eval", "rerun", tmp_path) == 0
    gone = replace(options, parts=tmp_path / "gone")
    keep_result("parts", gone, str(gone.parts), fingerprint, {"coherence": 1.0})
    assert run_cli(monkeypatch, "eval", "rerun", tmp_path) == 1
