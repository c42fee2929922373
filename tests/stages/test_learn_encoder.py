import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semmae.errors import MissingError, SettingError
from semmae.models.encoders import Tokens
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.loaders import SquashedData
from semmae.pipeline.schedule import Draw
from semmae.pipeline.sources import list_images
from semmae.stages.distilling import Distilling
from semmae.stages.learn_encoder import LearnEncoderOptions, learn_encoder
from semmae.stages.networks import open_encoder
from semmae.storage.checkpoints import load_checkpoint
from semmae.tests.world import World

METHODS = ["appearance", "distil"]


def options_of(world: World, output: Path, **changes: object) -> LearnEncoderOptions:
    settings: dict[str, object] = {
        "data": world.data,
        "output": output,
        "start": str(world.encoder),
        "size": "micro",
        "patch_size": 8,
        "image_size": 32,
        "view_size": 24,
        "epochs": 1,
        "batch_size": 16,
        "prototypes": 12,
        "loader_workers": 0,
    }
    return LearnEncoderOptions(**{**settings, **changes})  # type: ignore[arg-type]


def task_of(world: World, options: LearnEncoderOptions) -> Distilling:
    data = SquashedData(ImageSource(list_images(world.data, "train")), (32, 32))
    return Distilling(open_encoder(str(world.encoder)), data, options)


def tokens(named: Path) -> Tokens:
    images = torch.randint(
        0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found: Tokens = open_encoder(str(named))(images)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_learn_encoder__gives_an_encoder_that_opens(
    world: World, tmp_path: Path, method: str
) -> None:
    learn_encoder(options_of(world, tmp_path / "run", method=method))
    learned, started = tokens(tmp_path / "run"), tokens(world.encoder)
    assert learned.patches.shape == started.patches.shape
    assert not torch.allclose(learned.patches, started.patches, atol=1e-3)
    assert open_encoder(str(tmp_path / "run")).native_size == (32, 32)


def test_learn_encoder__pretrains_a_start_of_its_own(world: World, tmp_path: Path) -> None:
    options = options_of(
        world, tmp_path / "run", start=None, start_epochs=4, start_learning_rate=1e-4
    )
    learn_encoder(options)
    record = load_checkpoint(next((tmp_path / "run-start" / "checkpoints").glob("*.pt")))
    assert record["kind"] == "pretraining"
    assert record["options"]["masking"] == "random"
    assert tokens(tmp_path / "run").patches.shape == (2, 16, 128)
    shutil.rmtree(tmp_path / "run-start")
    learn_encoder(options)
    assert not (tmp_path / "run-start").exists()


def test_learn_encoder__refuses_a_start_of_another_size(world: World, tmp_path: Path) -> None:
    told = r"has width, depth and heads \(128, 6, 4\), and --size tiny is \(192, 12, 3\)"
    with pytest.raises(SettingError, match=told):
        learn_encoder(options_of(world, tmp_path / "run", size="tiny"))
    assert not list(tmp_path.iterdir())


def test_learn_encoder__refuses_too_few_patches_before_it_begins(
    world: World, tmp_path: Path
) -> None:
    options = options_of(world, tmp_path / "run", start=None, prototypes=5000)
    with pytest.raises(SettingError, match="--prototypes is 5000, but the images have 1152"):
        learn_encoder(options)
    assert not list(tmp_path.iterdir())


def test_learn_encoder__says_that_lightly_lacks_before_anything_is_trained(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "semmae.stages.distilling")
    monkeypatch.setitem(sys.modules, "lightly", None)
    for name in [name for name in sys.modules if name.startswith("lightly.")]:
        monkeypatch.delitem(sys.modules, name)
    options = options_of(world, tmp_path / "run", start=None, method="distil")
    with pytest.raises(MissingError, match="pip install"):
        learn_encoder(options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_learn_encoder__goes_on_to_the_same_weights(
    world: World, tmp_path: Path, method: str
) -> None:
    changes = {"method": method, "epochs": 2}
    whole = load_checkpoint(learn_encoder(options_of(world, tmp_path / "whole", **changes)))
    options = options_of(
        world, tmp_path / "parted", checkpoint_steps=1, keep_checkpoints=0, **changes
    )
    parted = learn_encoder(options)
    for path in sorted(parted.parent.glob("*.pt"))[1:]:
        path.unlink()
    again = load_checkpoint(learn_encoder(options))
    for name, weights in whole["model"].items():
        assert torch.equal(again["model"][name], weights), name


def test_after_step__teacher_is_a_moving_average_that_slows_down(
    world: World, tmp_path: Path
) -> None:
    task = task_of(world, options_of(world, tmp_path))
    student = next(p for p in task.model.student.parameters() if p.requires_grad)  # type: ignore[union-attr]
    teacher = task.model.teacher.get_parameter(  # type: ignore[union-attr]
        next(n for n, p in task.model.student.named_parameters() if p is student)  # type: ignore[union-attr]
    )
    began = teacher.detach().clone()
    with torch.no_grad():
        student += 1
    for progress in (0.0, 0.5, 1.0):
        before = teacher.detach().clone()
        task.after_step(progress, torch.ones(()))
        share = 0.01 * (1 + math.cos(math.pi * progress)) / 2
        torch.testing.assert_close(teacher - before, share * (student - before))
    assert not torch.equal(teacher, began)
    before = teacher.detach().clone()
    task.after_step(0.0, torch.zeros(()))  # of a step that is skipped
    assert torch.equal(teacher, before)


def test_loss__teaches_the_student_alone(world: World, tmp_path: Path) -> None:
    options = options_of(world, tmp_path)
    task = task_of(world, options)
    batch = task.data.__getitems__([Draw(index, 0, 0.0) for index in range(8)])
    torch.manual_seed(0)
    loss, scalars = task.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in task.model.named_parameters():
        taught = name.startswith("student") and parameter.requires_grad
        # The student's class token has no patch to answer for, but is attended to.
        assert (parameter.grad is not None) is taught, name
    assert 1 <= float(scalars["prototypes"]) <= options.prototypes + 1e-3
    # Scores are cosines, so that at a temperature of 0.1 they lie within 20 of each other.
    assert 0 < float(loss.detach()) < math.log(options.prototypes) + 20


def test_learn_encoder__a_start_of_another_size_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="has patches of 8 pixels and images of 32 x 32"):
        learn_encoder(options_of(world, tmp_path / "run", image_size=48))
    assert not (tmp_path / "run").exists()


def test_learn_encoder__a_start_of_other_pixels_is_refused(world: World, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    weights = open_encoder(str(world.encoder)).transformer.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, start)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}')
    with pytest.raises(SettingError, match="takes pixels of mean"):
        learn_encoder(options_of(world, tmp_path / "run", start=str(start)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kept_share": 0.0}, "--kept-share is 0.0"),
        ({"view_size": 20}, "--view-size is 20"),
        ({"prototypes": 1}, "--prototypes is 1"),
    ],
)
def test_options__refuse_what_cannot_be(
    world: World, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(SettingError, match=told):
        options_of(world, tmp_path, **changes)


def test_learn_encoder_options__an_image_of_one_patch_is_refused(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"--image-size is 8: expected .* two patches or more"):
        options_of(world, tmp_path / "run", image_size=8)
