import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from semmae import cli
from semmae.errors import MismatchError, MissingError, SettingError
from semmae.models.encoders import FrozenEncoder
from semmae.pipeline.image_source import drawn
from semmae.pipeline.sources import list_images
from semmae.stages.evals import part_learners, part_probe
from semmae.stages.evals.history import rerun
from semmae.stages.evals.metrics import coherence, fg_nmi
from semmae.stages.evals.part_baselines import BASELINES
from semmae.stages.evals.part_learners import CLUSTERS, class_clusters, measure_learner
from semmae.stages.evals.parts import (
    PartsOptions,
    evaluate_parts,
    measure_parts,
    parts_hash,
    store_hash,
)
from semmae.stages.import_parts import ImportPartsOptions, import_parts
from semmae.stages.label_images import true_labels
from semmae.stages.learn_parts import learn_parts
from semmae.stages.networks import open_learner, save_encoder
from semmae.storage.part_store import PartStore
from semmae.storage.results import read_results
from semmae.tests.world import World, learn_options


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_probe, "STEPS", 30)


def options_for(world: World, output: Path, **changes: object) -> PartsOptions:
    settings = {"learner": world.learner, "data": world.data, "output": output}
    return PartsOptions(**{**settings, **changes})  # type: ignore[arg-type]


def test_measure_parts__of_a_learner_has_every_figure_and_every_baseline(
    world: World, tmp_path: Path
) -> None:
    metrics = measure_parts(options_for(world, tmp_path, labels=world.labels))
    names = {
        *("coherence", "dead_parts", "position_share", "area_entropy", "confidence"),
        *("class_share", "cluster_share", "flip_agreement", "flip_agreement_fg"),
        *("shift_agreement", "shift_agreement_fg", "crop_agreement", "crop_agreement_fg"),
        *("fg_nmi", "fg_ari", "nmi", "ari", "in_image_ari", "in_image_fg_ari"),
    }
    baselines = {f"{baseline}.{name}" for baseline in BASELINES for name in names}
    probe = {f"probe.{name}" for name in ("fg_nmi", "fg_ari", "accuracy")}
    assert metrics.keys() == names | baselines | probe | {"true.coherence"}
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(-100 <= value <= 100 for value in metrics.values())


def test_measure_parts__without_labels_or_baselines_is_the_learner_alone(
    world: World, tmp_path: Path
) -> None:
    options = options_for(world, tmp_path, baselines=False)
    metrics = measure_parts(options)
    assert not [name for name in metrics if "." in name or "nmi" in name]
    whole = measure_parts(replace(options, baselines=True))
    assert {name: whole[name] for name in metrics} == metrics


def test_measure_parts__a_learner_and_its_store_agree_on_the_same_images(
    world: World, tmp_path: Path
) -> None:
    of_learner = measure_parts(
        options_for(world, tmp_path, labels=world.labels, split="train", baselines=False)
    )
    of_store = measure_parts(
        PartsOptions(parts=world.store, data=world.data, labels=world.labels, output=tmp_path)
    )
    shared = of_learner.keys() & of_store.keys()
    assert {"fg_nmi", "in_image_fg_ari", "coherence", "true.coherence"} <= shared
    for name in shared:
        assert of_learner[name] == pytest.approx(of_store[name], abs=1), name


def test_measure_parts__leaves_out_a_baseline_that_cannot_be(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = learn_parts(learn_options(world, tmp_path / "learner", num_parts=19))
    of_learner = measure_parts(
        options_for(world, tmp_path, learner=learner.parent.parent, probe_images=0, images=9)
    )
    given: dict[str, Any] = {"labels": world.labels, "data": world.data}
    import_parts(ImportPartsOptions(**given, output=tmp_path / "store", grid="4", num_parts=20))
    of_store = measure_parts(PartsOptions(**given, parts=tmp_path / "store", output=tmp_path))
    told = capsys.readouterr().err
    for metrics in (of_learner, of_store):
        assert [name for name in metrics if name.startswith("colour.")]
        assert not [name for name in metrics if name.startswith("grid.")]
    assert told.count("the baseline grid is left out: a grid of 4 x 4 patches cannot be cut") == 2


def test_measure_parts__leaves_out_the_attention_of_no_class_token_and_the_shift_of_one_row(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    save_encoder(FrozenEncoder(model), tmp_path / "pooled.safetensors")
    changes = {"variant": "kmeans", "background": "none", "image_size": "8x32"}
    encoder = str(tmp_path / "pooled.safetensors")
    learn_parts(learn_options(world, tmp_path / "learner", encoder=encoder, **changes))
    metrics = measure_parts(options_for(world, tmp_path, learner=tmp_path / "learner", images=9))
    assert {"flip_agreement", "crop_agreement", "kmeans.coherence"} <= metrics.keys()
    assert not [name for name in metrics if "shift" in name or name.startswith("attention.")]
    told = capsys.readouterr().err
    assert "the baseline attention is left out: it is of the class token, and" in told
    assert "agreement under shift is left out: of 1 x 4 patches none stays in view" in told


def test_measure_parts__the_sample_follows_the_seed_for_stores(
    world: World, tmp_path: Path
) -> None:
    options = PartsOptions(
        parts=world.store, data=world.data, labels=world.labels, output=tmp_path, images=9, seed=4
    )
    store = PartStore.open(world.store)
    chosen = drawn(72, 9, 4)
    labels = np.asarray(store.labels()[chosen])
    keys = [list_images(world.data, "train").keys[index] for index in chosen]
    true = true_labels(world.labels, keys, store.identity.grid, store.identity.image_size)
    metrics = measure_parts(options)
    assert metrics["coherence"] == coherence(labels)
    assert metrics["fg_nmi"] == fg_nmi(labels, true)
    assert metrics["true.coherence"] == coherence(true)
    plain = measure_parts(replace(options, baselines=False))
    assert plain == {name: value for name, value in metrics.items() if name in plain}
    assert [name for name in metrics if name.startswith("grid.")]
    assert not [name for name in plain if name.startswith(("grid.", "colour."))]


def test_drawn__is_sorted_without_doubles_and_follows_the_seed() -> None:
    found = drawn(100, 30, 0)
    assert len(set(found.tolist())) == 30
    assert found.tolist() == sorted(found)
    assert not np.array_equal(found, drawn(100, 30, 1))
    assert drawn(5, 30, 0).tolist() == [0, 1, 2, 3, 4]


def test_class_clusters__find_groups_of_class_tokens() -> None:
    torch.manual_seed(0)
    groups = torch.arange(60) % CLUSTERS
    tokens = 20 * torch.randn(CLUSTERS, 16)[groups] + 0.1 * torch.randn(60, 16)
    found = class_clusters(tokens, 0)
    assert len(set(zip(groups.tolist(), found.tolist(), strict=True))) == CLUSTERS
    assert class_clusters(tokens[:3], 0).shape == (3,)


def test_measure_learner__falls_back_to_all_images_without_a_val_split(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(world.data, "val"), tmp_path / "data")
    options = options_for(world, tmp_path, data=str(tmp_path / "data"), baselines=False)
    found = measure_learner(options)
    assert "has no val split" in capsys.readouterr().err
    expected = measure_learner(options_for(world, tmp_path, baselines=False))
    assert found == expected
    with pytest.raises(MissingError, match="does not exist"):
        measure_learner(replace(options, data=str(tmp_path / "nowhere")))


def test_measure_learner__leaves_bad_images_out_and_counts_them(
    world: World, tmp_path: Path
) -> None:
    data, labels = tmp_path / "data", tmp_path / "labels"
    shutil.copytree(world.data, data)
    shutil.copytree(world.labels, labels)
    first = list_images(data, "val").keys[0]
    (data / first).write_bytes(b"none")
    (labels / first).with_suffix(".png").unlink()
    metrics = measure_learner(options_for(world, tmp_path, data=str(data), labels=labels))
    assert metrics["bad_images"] == 1
    whole = measure_learner(options_for(world, tmp_path, labels=world.labels))
    assert "bad_images" not in whole
    assert metrics["probe.accuracy"] != whole["probe.accuracy"]


@pytest.mark.parametrize("case", ["same images", "no labels", "none asked for"])
def test_measure_learner__skips_the_probe_where_it_would_say_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    labels = world.labels
    changes: dict[str, object] = {"baselines": False, "images": 12}
    if case == "same images":
        changes["split"] = "train"
    elif case == "no labels":
        labels = tmp_path / "labels"
        shutil.copytree(world.labels / "val", labels / "val")
    else:
        changes["probe_images"] = 0
    metrics = measure_learner(options_for(world, tmp_path, labels=labels, **changes))
    assert not [name for name in metrics if name.startswith("probe.")]
    said = capsys.readouterr().err
    assert ("no linear probe" in said) == (case != "none asked for")
    assert {"same images": "beside those measured", "no labels": "no labels of train images"}.get(
        case, ""
    ) in said


def test_evaluate_parts__pins_the_checkpoint_of_a_learner(world: World, tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "results"
    shutil.copytree(world.learner, run)
    (checkpoint,) = sorted((run / "checkpoints").iterdir())
    metrics = evaluate_parts(options_for(world, results, learner=run, images=12))
    (record,) = read_results(results)
    assert record["metrics"] == metrics
    assert record["checkpoint"] == record["configuration"]["learner"] == str(checkpoint)
    assert record["checkpoint_hash"] == parts_hash(str(checkpoint)) == open_learner(run).hash
    checkpoint.with_name("step-99999999.pt").write_bytes(b"a run that was trained further")
    table = rerun(results)
    assert (table["change"] == 0).all()
    assert (table["note"] == "").all()
    checkpoint.unlink()
    gone = rerun(results)
    assert not gone["measured"].any()
    assert gone["note"].str.contains("no checkpoint at").all()


def test_parts_hash__of_another_file_is_refused_as_a_learner(world: World) -> None:
    file = world.learner / "encoder.safetensors"
    with pytest.raises(SettingError, match="expected a part learner"):
        parts_hash(str(file))


def test_parts_hash__of_a_store_is_its_own(world: World) -> None:
    assert parts_hash(str(world.store)) == store_hash(str(world.store))


def test_evaluate_parts__a_learner_goes_before_a_store(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = options_for(world, tmp_path, parts=world.store, baselines=False)
    metrics = evaluate_parts(both)
    assert "the store" in capsys.readouterr().err
    assert metrics == measure_parts(replace(both, parts=None))
    (record,) = read_results(tmp_path)
    assert record["configuration"]["parts"] is None


def test_parts_options__say_what_is_missing() -> None:
    with pytest.raises(SettingError, match=r"--learner.*or --parts"):
        PartsOptions(output=Path("x"))
    with pytest.raises(SettingError, match="--learner needs --data"):
        PartsOptions(output=Path("x"), learner=Path("y"))


@pytest.mark.parametrize(
    ("option", "value"), [("images", 0), ("feature_batch", 0), ("probe_images", -1), ("seed", -1)]
)
def test_parts_options__what_cannot_be_names_its_flag(option: str, value: int) -> None:
    with pytest.raises(SettingError, match=f"--{option.replace('_', '-')} is {value}"):
        PartsOptions(**{"parts": Path("x"), "output": Path("x"), option: value})  # type: ignore[arg-type]


def test_cli__eval_parts_prints_the_figures_of_a_learner(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "parts", "--learner", str(world.learner), "--data", world.data]
    arguments += ["--output", "results", "--no-baselines", "--images", "6"]
    monkeypatch.setattr(sys, "argv", ["semmae", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {"coherence", "crop_agreement", "confidence"} <= shown.keys()
    assert not [name for name in shown if "." in name]


def test_measure_learner__labels_are_tried_before_anything_is_encoded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded_views(*_: object) -> None:
        raise AssertionError("labels come first")

    monkeypatch.setattr(part_learners, "encoded_views", encoded_views)
    labels = tmp_path / "labels"
    shutil.copytree(world.labels, labels)
    options = PartsOptions(
        learner=world.learner, data=world.data, labels=labels, output=tmp_path / "results"
    )
    chosen = sorted(labels.rglob("*.png"))
    for place in chosen:
        with Image.open(place) as image:
            size = image.size
        Image.new("L", size).save(place)
    with pytest.raises(MismatchError, match="every true label is background"):
        measure_parts(options)
    for place in chosen:
        place.unlink()
    with pytest.raises(MissingError, match=r"no label image at .*expected one for each image"):
        measure_parts(options)
    shutil.rmtree(labels)
    with pytest.raises(MissingError, match=r"--labels is .* where there is no folder"):
        measure_parts(options)
