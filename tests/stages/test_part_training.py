from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semmae.models.part_scores import AnchoredTokens
from semmae.models.parts import PartLearner
from semmae.models.vision import normalise
from semmae.pipeline.feeding import Batch
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.loaders import SquashedData
from semmae.pipeline.runs import Run
from semmae.pipeline.schedule import Draw
from semmae.pipeline.sources import list_images
from semmae.stages import part_training
from semmae.stages.learn_parts import LearnPartsOptions
from semmae.stages.networks import open_encoder
from semmae.stages.part_start import sample_tokens, started_learner
from semmae.stages.part_training import PartLearning
from semmae.tests.world import World, learn_options


def task_of(world: World, options: LearnPartsOptions) -> PartLearning:
    """What `learn_parts` would train, at its start, with nothing told by places."""
    background = options.background_kind.replace("predicted", "voted")
    options = replace(options, told_by="tokens", background=background)  # type: ignore[arg-type]
    encoder = open_encoder(options.encoder)
    images = ImageSource(list_images(world.data, "train"))
    tokens = sample_tokens(encoder, images, (32, 32), options.sample_images, options.seed)
    data = SquashedData(images, (32, 32))
    learner = started_learner(tokens, (4, 4), options)
    return PartLearning(encoder, learner, data, data, options, (32, 32))


def anchors_of(task: PartLearning) -> torch.nn.Parameter:
    assert isinstance(task.model, PartLearner)
    assert isinstance(task.model.scores, AnchoredTokens)
    return task.model.scores.anchors


def batch_of(task: PartLearning, count: int = 8) -> Batch:
    return task.data.__getitems__([Draw(index, 0, 0.0) for index in range(count)])


def test_finish_epoch__draws_images_of_all_classes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[NDArray[np.uint8]] = []

    def sheet(rows: list[list[NDArray[np.uint8]]], *_: Any) -> NDArray[np.uint8]:
        drawn.extend(rows[0])
        return rows[0][0]

    monkeypatch.setattr(part_training, "bands", sheet)
    task = task_of(world, learn_options(world, tmp_path))
    with Run(tmp_path / "run", 0, []) as run:
        task.finish_epoch(1, run)
    first, *_, last = task.data.__getitems__([Draw(i, 0, 0.0) for i in range(72)])["images"]
    assert len(drawn) == 16
    assert np.array_equal(drawn[0], first)
    assert np.array_equal(drawn[-1], last)


@pytest.mark.parametrize(("pixels", "perceptual"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_loss__rebuilds_pixels_where_a_weight_asks_for_it(
    world: World, tmp_path: Path, pixels: float, perceptual: float
) -> None:
    weights = {"pixel_weight": pixels, "perceptual_weight": perceptual}
    task = task_of(world, learn_options(world, tmp_path, diversity_weight=0.5, **weights))
    assert (task.model.decoder is not None) == (pixels + perceptual > 0)
    loss, terms = task.loss(batch_of(task))
    assert ("pixels" in terms) == (pixels > 0)
    assert ("perceptual" in terms) == (perceptual > 0)
    listed = {"features": 1.0, "diversity": 0.5, "pixels": pixels, "perceptual": perceptual}
    wanted = sum(weight * float(terms[name]) for name, weight in listed.items() if weight)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_loss__perceptual_gradients_reach_the_decoder_and_not_the_encoder(
    world: World, tmp_path: Path
) -> None:
    weights = {"feature_weight": 0.0, "pixel_weight": 0.0, "diversity_weight": 0.0}
    options = learn_options(world, tmp_path, variant="paper", perceptual_weight=1.0, **weights)
    task = task_of(world, options)
    loss, _ = task.loss(batch_of(task))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in task.model.named_parameters()}
    for name in ("decoder.to_pixels.weight", "decoder.first.convolution.weight"):
        gradient = gradients[name]
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
    assert any(g is not None and g.abs().sum() > 0 for n, g in gradients.items() if "scores" in n)
    assert all(parameter.grad is None for parameter in task.encoder.parameters())
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    rate = torch.optim.Adam(task.model.parameters(), lr=1e-2)
    first = loss.item()
    for _ in range(15):
        rate.zero_grad()
        loss, _ = task.loss(batch_of(task))
        loss.backward()  # type: ignore[no-untyped-call]
        rate.step()
    assert loss.item() < 0.9 * first
    assert any(not torch.equal(before[n], p) for n, p in task.model.named_parameters())


def test_loss__perceptual_is_0_for_an_image_that_is_rebuilt(world: World, tmp_path: Path) -> None:
    task = task_of(world, learn_options(world, tmp_path, perceptual_weight=1.0))
    batch = batch_of(task)
    # Images that survive being brought to 4 pixels a patch and back: of one colour.
    batch["images"] = batch["images"][:, :1, :1].expand(-1, 32, 32, -1).contiguous()
    pixels = normalise(batch["images"], task.encoder.mean, task.encoder.std)
    task.model.decoder.forward = lambda maps, style: pixels[:, :, ::2, ::2]  # type: ignore
    assert float(task.loss(batch)[1]["perceptual"]) == pytest.approx(0, abs=1e-6)
    task.model.decoder.forward = lambda maps, style: -pixels[:, :, ::2, ::2]  # type: ignore
    assert float(task.loss(batch)[1]["perceptual"]) > 0.01


def test_loss__gradients_of_consistency_flow(world: World, tmp_path: Path) -> None:
    weights = {"feature_weight": 1e-30, "diversity_weight": 0.0, "consistency_weight": 1.0}
    task = task_of(world, learn_options(world, tmp_path, **weights))
    loss, terms = task.loss(batch_of(task))
    assert loss.item() == pytest.approx(float(terms["consistency"]))
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = anchors_of(task).grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-6


def test_learning__tells_of_a_part_that_dies(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = learn_options(world, tmp_path, class_share=0.0, background="none", log_steps=10)
    task, shares = task_of(world, options), []
    batch = batch_of(task)
    capsys.readouterr()

    def steps(count: int) -> None:
        for _ in range(count):
            shares.append(float(task.loss(batch)[1]["smallest_share"]))
            task.after_step(0.25, torch.ones(()))

    steps(60)
    assert capsys.readouterr().err == ""
    assert shares[-1] > 0
    with torch.no_grad():  # the same token as part 0, which ties go to
        anchors_of(task)[2] = anchors_of(task)[0]
    steps(50)
    assert shares[-1] == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("part 2 owns")


def test_finish_epoch__tells_of_a_part_that_died_in_a_short_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(world, learn_options(world, tmp_path, class_share=0.0, background="none"))
    with torch.no_grad():
        anchors_of(task)[2] = anchors_of(task)[0]
    task.loss(batch_of(task))
    with Run(tmp_path / "run", 0, []) as run:
        task.finish_epoch(1, run)
    told = "part 2 owns 0.00% of the patches of the last 1 batches, 100% into the run"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["grid", "kmeans"])
def test_finish_epoch__tells_of_parts_without_patches_once(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    options = learn_options(world, tmp_path, variant=variant, background="none", epochs=3)
    task = task_of(world, options)

    def maps(owner: int) -> Any:
        return lambda *_: F.one_hot(torch.full((16, 4, 4), owner), 3).permute(0, 3, 1, 2).float()

    capsys.readouterr()
    with Run(tmp_path / "run", 0, []) as run:
        for epoch, owner in enumerate((1, 1, 2), 1):
            task.model.maps = maps(owner)
            task.finish_epoch(epoch, run)
    told = [line for line in capsys.readouterr().err.splitlines() if "own no patch" in line]
    way = "try fewer --num-parts" + (", or another --seed" if variant == "kmeans" else "")
    assert told == [
        f"parts 0, 2 own no patch of 16 images after epoch 1: {way}",
        f"parts 0, 1 own no patch of 16 images after epoch 3: {way}",
    ]
