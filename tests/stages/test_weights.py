from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from semmae.errors import SettingError
from semmae.stages.evals.features import subjects_of
from semmae.stages.evals.knn import KnnOptions, knn
from semmae.stages.export import WEIGHTS, ExportOptions, export
from semmae.stages.learn_encoder import LearnEncoderOptions
from semmae.stages.learn_parts import learn_parts
from semmae.stages.networks import ENCODER_FILE, open_encoder
from semmae.stages.pretrain import pretrain
from semmae.storage.checkpoints import load_checkpoint
from semmae.storage.results import read_results
from semmae.tests.world import World, learn_options, pretrain_options

QUERIES = "blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def averaged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept an average of its weights."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    pretrain(pretrain_options(world, run, ema=0.9, base_learning_rate=1e-2))
    return run


@pytest.fixture(scope="module")
def kept(averaged: Path) -> tuple[Tensor, Tensor]:
    """A weight of the encoder as it was trained last, and its average."""
    state: dict[str, Any] = load_checkpoint(next((averaged / "checkpoints").iterdir()))
    trained, average = (state[part][f"encoder.{QUERIES}"] for part in ("model", "ema"))
    assert not torch.equal(trained, average)
    return trained, average


def test_open_encoder__takes_the_trained_weights_or_their_average(
    averaged: Path, kept: tuple[Tensor, Tensor]
) -> None:
    trained, average = kept
    for found, expected in (
        (open_encoder(str(averaged)), trained),
        (open_encoder(str(averaged), weights="ema"), average),
    ):
        assert torch.equal(found.transformer.get_parameter(QUERIES), expected)


def test_export__writes_the_average(
    averaged: Path, kept: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    for number, weights in enumerate(("trained", "ema")):
        chosen: dict[str, Any] = {"checkpoint": str(averaged), "weights": weights}
        export(ExportOptions(output=tmp_path / weights, **chosen))
        assert torch.equal(load_file(tmp_path / weights / WEIGHTS)[QUERIES], kept[number])
        file = tmp_path / f"{weights}.pth"
        export(ExportOptions(output=file, format="mae", **chosen))
        assert torch.equal(load_checkpoint(file)["model"][QUERIES], kept[number])
        assert torch.equal(open_encoder(str(file)).transformer.get_parameter(QUERIES), kept[number])


def test_knn__evaluates_the_average_and_says_so(
    averaged: Path, world: World, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"checkpoint": str(averaged), "data": world.data, "output": tmp_path}
    options = [KnnOptions(**chosen, baselines=False, weights=w) for w in ("trained", "ema")]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    trained, average = (subjects_of(each)[0].features(images) for each in options)
    assert not torch.equal(trained, average)
    knn(options[1])
    assert [record["configuration"]["weights"] for record in read_results(tmp_path)] == ["ema"]


def test_learn_parts__learns_on_the_average(
    averaged: Path, kept: tuple[Tensor, Tensor], world: World, tmp_path: Path
) -> None:
    options = learn_options(world, tmp_path, encoder=str(averaged), weights="ema", variant="grid")
    learn_parts(options)
    encoder = open_encoder(str(tmp_path / ENCODER_FILE))
    assert torch.equal(encoder.transformer.get_parameter(QUERIES), kept[1])


def test_open_encoder__says_what_keeps_no_average(world: World) -> None:
    for named in (str(world.encoder), "timm:vit_tiny_patch16_224"):
        with pytest.raises(SettingError, match=f"{named} keeps no moving average"):
            open_encoder(named, weights="ema")


def test_learn_encoder_options__refuse_an_average_of_what_has_one(world: World) -> None:
    options: dict[str, Any] = {"output": Path("run"), "data": world.data, "ema": 0.9}
    with pytest.raises(SettingError, match="--method distil keeps a moving average already"):
        LearnEncoderOptions(method="distil", **options)
    LearnEncoderOptions(method="appearance", **options)
