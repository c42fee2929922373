"""Stages in two processes: the same run as in one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semmae.models.parts import PartLearner
from semmae.pipeline.gradients import Computed, Gradients
from semmae.pipeline.options import TrainingOptions
from semmae.stages import learn_parts as learning
from semmae.stages.learn_encoder import LearnEncoderOptions, learn_encoder
from semmae.stages.learn_parts import LearnPartsOptions, learn_parts
from semmae.stages.pretrain import pretrain
from semmae.storage.checkpoints import load_checkpoint
from semmae.tests.pipeline.peers import Told, together
from semmae.tests.pipeline.tiny import log_of
from semmae.tests.world import World, learn_options, pretrain_options


def encoder_options(world: World, output: Path, **changes: Any) -> LearnEncoderOptions:
    settings: dict[str, Any] = {
        "data": world.data,
        "output": output,
        "start": str(world.encoder),
        "size": "micro",
        "patch_size": 8,
        "image_size": 32,
        "prototypes": 16,
        "epochs": 1,
        "batch_size": 16,
        "loader_workers": 0,
    }
    return LearnEncoderOptions(**{**settings, **changes})


def run_stage(rank: int, stage: Callable[[Any], Path], given: TrainingOptions) -> Path:
    return stage(given)


def run_learning_apart(rank: int, given: LearnPartsOptions) -> Path:
    """Learn parts in a process whose own start is another one than those of the others."""
    started = learning._started

    def apart(
        encoder: Any, images: Any, size: Any, tokens: Any, options: LearnPartsOptions, begun: bool
    ) -> PartLearner:
        other = replace(options, seed=given.seed + rank)
        return started(encoder, images, size, tokens, other, begun)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "_started", apart)
        patch.setattr(learning, "LEAST_TOLD", -100.0)
        return learn_parts(given)


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(path)["model"]
    return state


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.launchers)


def test_learn_parts__all_processes_take_the_start_of_the_first(
    world: World, tmp_path: Path
) -> None:
    changes = {"cached_images": 16, "sample_images": 16, "micro_batch": 8}
    alone = run_learning_apart(0, learn_options(world, tmp_path / "one", **changes))
    given = learn_options(world, tmp_path / "two", **changes)
    together(2, partial(run_learning_apart, given=given))
    expected = weights(alone)
    for name, found in weights(tmp_path / "two" / "checkpoints" / alone.name).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)


IN_PARTS = {"predicted_share": 0.4, "micro_batch": 0}
"""One part in one process, two in two: what is predicted is drawn of the image, not of its part."""


@pytest.mark.parametrize(
    ("stage", "options", "changes"),
    [
        (pretrain, pretrain_options, {"sharding": "fsdp", "recompute": True, **IN_PARTS}),
        slow(pretrain, pretrain_options, {"sharding": "fsdp", **IN_PARTS}),
        slow(pretrain, pretrain_options, IN_PARTS),
        slow(pretrain, pretrain_options, {"compile": True, **IN_PARTS}),
        slow(pretrain, pretrain_options, {"compile": True, "sharding": "fsdp", **IN_PARTS}),
        slow(learn_parts, learn_options, {}),
        slow(learn_parts, learn_options, {"sharding": "fsdp"}),
        slow(learn_parts, learn_options, {"variant": "kmeans"}),
        slow(learn_encoder, encoder_options, {}),
        slow(learn_encoder, encoder_options, {"sharding": "fsdp"}),
        slow(learn_encoder, encoder_options, {"method": "distil"}),
        slow(learn_encoder, encoder_options, {"method": "distil", "sharding": "fsdp"}),
    ],
)
def test_stages__in_two_processes_train_as_in_one(
    stage: Callable[[Any], Path],
    options: Callable[..., TrainingOptions],
    changes: dict[str, Any],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    one, two = tmp_path / "one", tmp_path / "two"
    given = {"micro_batch": 8, **changes}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = stage(options(world, one, **given))
    torch.set_num_threads(before)
    told = together(2, partial(run_stage, stage=stage, given=options(world, two, **given)))
    path = two / "checkpoints" / alone.name
    assert told == [Told(value=path)] * 2
    expected = weights(alone)
    for name, found in weights(path).items():
        # AdamW turns a last bit of a small gradient into a share of the learning rate.
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)
    losses = [line["loss"] for line in log_of(one) if "loss" in line]
    assert [line["loss"] for line in log_of(two) if "loss" in line] == pytest.approx(
        losses, rel=1e-4
    )
    assert len(losses) == (changes.get("variant") != "kmeans")
    assert {p.name for p in two.glob("pictures/*")} == {p.name for p in one.glob("pictures/*")}


@pytest.mark.parametrize(
    ("stage", "options", "changes"),
    [
        (pretrain, pretrain_options, {"predicted_share": 0.4}),
        (learn_parts, learn_options, {"rounds": 1}),
        (learn_parts, learn_options, {"variant": "paper"}),
        (learn_encoder, encoder_options, {}),
        (learn_encoder, encoder_options, {"method": "distil"}),
    ],
)
def test_stages__give_every_parameter_a_gradient(
    stage: Callable[[Any], Path],
    options: Callable[..., TrainingOptions],
    changes: dict[str, Any],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs DDP waits for all of them (`pipeline.parallel`)."""
    found: list[bool] = []

    def looked_at(gradients: Gradients, *given: Any) -> Computed:
        computed = of_step(gradients, *given)
        trained = [p for p in gradients._task.model.parameters() if p.requires_grad]
        found.append(bool(trained) and all(p.grad is not None for p in trained))
        return computed

    of_step = Gradients.of_step
    monkeypatch.setattr(Gradients, "of_step", looked_at)
    stage(options(world, tmp_path / "run", **changes))
    assert found
    assert all(found)
