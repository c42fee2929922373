import math
from pathlib import Path

import numpy as np
import pytest
import torch

from semmae.errors import MissingError, SettingError
from semmae.stages.evals.features import LabelledFeatures, accuracies
from semmae.stages.evals.history import rerun, results_table
from semmae.stages.evals.knn import KnnOptions, knn, vote
from semmae.stages.evals.linear import LinearOptions, linear
from semmae.stages.evals.parts import PartsOptions, evaluate_parts
from semmae.storage.results import read_results
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
    table = rerun(tmp_path)
    assert set(table["kind"]) == {"knn", "linear", "parts"}
    assert (table["change"] == 0).all()
    assert (table["note"] == "").all()
    assert len(read_results(tmp_path)) == 3


def test_rerun__names_a_checkpoint_that_is_gone(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    import shutil

    shutil.copytree(world.encoder, moved)
    knn(knn_options(world, tmp_path / "results", str(moved)))
    shutil.rmtree(moved)
    table = rerun(tmp_path / "results")
    assert table["new"].isna().all()
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


def test_results_table__has_a_row_a_record(world: World, tmp_path: Path) -> None:
    knn(knn_options(world, tmp_path))
    knn(knn_options(world, tmp_path))
    assert len(results_table(tmp_path)) == 2


def test_knn__data_without_classes_is_refused(world: World, tmp_path: Path) -> None:
    from PIL import Image

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
