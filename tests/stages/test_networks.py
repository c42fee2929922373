import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from semmae.errors import DamageError, MismatchError, SettingError
from semmae.models.encoders import FrozenEncoder, timm_encoder
from semmae.models.readings import DEFAULT_READING, Facet, Reading
from semmae.stages.export import ExportOptions, export
from semmae.stages.networks import (
    ENCODER_FILE,
    image_size_of,
    open_encoder,
    open_learner,
    open_start,
    parse_reading,
    save_encoder,
)
from semmae.storage.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from semmae.tests.world import World

READING = Reading((1, -1), "keys", pooled=True)


def tiny(reading: Reading = DEFAULT_READING) -> FrozenEncoder:
    """Two blocks, with the 64 channels a head by which files of others are read."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=0
    )
    return FrozenEncoder(model, reading=reading)


def random_images(side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8)


def assert_same_tokens(one: FrozenEncoder, other: FrozenEncoder, side: int = 32) -> None:
    first, second = one(random_images(side)), other(random_images(side))
    for name in ("class_token", "patches", "attention"):
        torch.testing.assert_close(
            getattr(first, name), getattr(second, name), rtol=0, atol=1e-5, msg=name
        )


def saved(encoder: FrozenEncoder, folder: Path) -> str:
    path = folder / ENCODER_FILE
    save_encoder(encoder, path)
    return str(path)


@pytest.mark.parametrize("reading", [DEFAULT_READING, READING], ids=str)
def test_save_encoder__keeps_the_reading(tmp_path: Path, reading: Reading) -> None:
    encoder = tiny(reading)
    again = open_encoder(saved(encoder, tmp_path))
    assert again.reading == reading
    assert_same_tokens(encoder, again)


def test_save_encoder__an_encoder_of_timm_stays_timms_through_several_files(
    tmp_path: Path,
) -> None:
    encoder = timm_encoder("test_vit", pretrained=False, reading=Reading((-2,), "values"))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    once = open_encoder(saved(encoder, tmp_path / "one"))
    twice = open_encoder(saved(once, tmp_path / "two"))
    assert twice.timm == encoder.timm
    assert twice.timm is not None
    assert twice.timm.name == "test_vit"
    assert torch.equal(twice.mean, encoder.mean)
    assert not torch.equal(twice.mean, tiny().mean)  # which files of others are given
    assert twice.reading == encoder.reading
    assert_same_tokens(encoder, twice, 160)


@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_save_encoder__an_encoder_of_a_folder_of_timm_needs_that_folder_no_more(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    export(ExportOptions(checkpoint=saved(tiny(), tmp_path), output=folder))
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["norm_layer"] = "rmsnorm"  # what the shapes of the weights do not tell
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not re.search(r"norm\d?\.bias", k)}
    save_file(kept, folder / "model.safetensors")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "some/vit"
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    place = {"local-dir": folder, "hf-hub": "some/vit"}[source]
    encoder = open_encoder(f"timm:{source}:{place}", READING)
    path = saved(encoder, tmp_path)
    shutil.rmtree(folder)
    again = open_encoder(path)
    assert again.reading == READING
    assert torch.equal(again.mean, torch.tensor([0.1, 0.2, 0.3]))
    assert_same_tokens(encoder, again)


def test_open_encoder__a_stage_may_choose_another_reading(tmp_path: Path) -> None:
    path = saved(tiny(READING), tmp_path)
    assert open_encoder(path, Reading((2,))).reading == Reading((2,))
    assert open_encoder(path, DEFAULT_READING).reading == DEFAULT_READING
    with pytest.raises(SettingError, match="the encoder has 2 blocks"):
        open_encoder(path, Reading((-3,)))


def test_open_encoder__other_files_are_read_by_the_last_block(world: World, tmp_path: Path) -> None:
    assert open_encoder(str(world.encoder)).reading == DEFAULT_READING
    assert open_encoder(str(world.encoder), READING).reading == READING
    foreign = tmp_path / "foreign.safetensors"
    weights = tiny().transformer.state_dict()
    for note in ("of a book", '{"blocks": 1}', "[1]", "null"):
        save_file(weights, str(foreign), {"reading": note})
        assert open_encoder(str(foreign)).reading == DEFAULT_READING


def written(model: VisionTransformer, folder: Path, config: object) -> str:
    """A file of weights, and beside it a ``config.json``."""
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "model.safetensors")


def test_open_encoder__takes_the_pixels_that_a_config_beside_the_file_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny().transformer
    config = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}}
    named = written(model, tmp_path, config)
    encoder = open_encoder(named)
    assert capsys.readouterr().err == (
        f"{named} is given pixels of mean (0.5, 0.5, 0.5) and deviation (0.25, 0.25, 0.25), as "
        "config.json beside it says\n"
    )
    assert_same_tokens(encoder, FrozenEncoder(model, [0.5] * 3, [0.25] * 3))
    (tmp_path / "learner").mkdir()
    assert_same_tokens(open_encoder(saved(encoder, tmp_path / "learner")), encoder)
    assert capsys.readouterr().err == ""
    with pytest.raises(SettingError, match=r"takes pixels of mean \(0.5, 0.5, 0.5\)"):
        open_start(named)


def test_open_encoder__says_which_pixels_it_assumes(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    named = written(tiny().transformer, tmp_path, {"hidden_size": 64})
    encoder = open_encoder(named)
    assert encoder.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert "and deviation (0.229, 0.224, 0.225), ImageNet's, as no" in capsys.readouterr().err
    open_encoder(str(world.encoder))
    assert capsys.readouterr().err == ""


def test_open_encoder__a_config_beside_the_file_says_the_grid(tmp_path: Path) -> None:
    model = VisionTransformer(
        img_size=(24, 64), patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0
    )
    named = written(model, tmp_path, {"pretrained_cfg": {"input_size": [3, 24, 64]}})
    assert open_encoder(named).native_size == (24, 64)


@pytest.mark.parametrize(
    "config",
    [[], {"pretrained_cfg": [1]}, {"pretrained_cfg": {"mean": 0.5}}]
    + [{"pretrained_cfg": {of: [1, 2]}} for of in ("input_size", "mean", "std")],
    ids=str,
)
def test_open_encoder__a_config_beside_the_file_that_is_none_is_one_sentence(
    tmp_path: Path, config: object
) -> None:
    named = written(tiny().transformer, tmp_path, config)
    with pytest.raises(DamageError, match=r"config.json is not what timm writes beside weights"):
        open_encoder(named)


def test_open_learner__its_encoder_reads_as_it_was_saved(world: World, tmp_path: Path) -> None:
    for path in world.learner.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(world.learner)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pooled = open_encoder(str(world.encoder), Reading(pooled=True))
    before = open_learner(tmp_path).hash
    save_encoder(pooled, tmp_path / ENCODER_FILE)
    trained = open_learner(tmp_path)
    assert trained.encoder.reading == Reading(pooled=True)
    assert trained.hash != before


def _rewritten(world: World, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the learner whose checkpoint was changed."""
    step, path = checkpoints(world.learner)[-1]
    state = load_checkpoint(path)
    change(state)
    save_checkpoint(folder, step, state)
    (folder / ENCODER_FILE).write_bytes((world.learner / ENCODER_FILE).read_bytes())
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].popitem(),
        lambda state: state["model"].update(of_an_older_version=torch.zeros(3)),
        lambda state: state["model"].update(token_std=torch.zeros(3)),
        lambda state: state["architecture"].update(of_a_later_version=1),
        lambda state: state["architecture"].pop("width"),
        lambda state: state["architecture"].pop("told_by"),
    ],
)
def test_open_learner__one_of_another_version_is_refused_in_one_sentence(
    world: World, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert open_learner(_rewritten(world, tmp_path / "same", lambda state: None)).grid == (4, 4)
    with pytest.raises(MismatchError, match=r"does not fit this semmae: .*learn-parts") as caught:
        open_learner(_rewritten(world, tmp_path / "other", change))
    assert str(tmp_path / "other") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [("-1", (-1,)), ("-4,-1", (-4, -1)), (" 12 , 6 ", (12, 6)), ("03", (3,))],
)
def test_parse_reading__takes_numbers_in_their_order(blocks: str, numbers: tuple[int, ...]) -> None:
    assert parse_reading(blocks, "tokens", False) == Reading(numbers)
    assert parse_reading(blocks, "keys", True) == Reading(numbers, "keys", pooled=True)


@pytest.mark.parametrize("blocks", ["", "last", "-1,", "1-3", "--1", "1.5", "0", "1,0", "9" * 6])
def test_parse_reading__other_text_is_one_sentence(blocks: str) -> None:
    with pytest.raises(SettingError, match=r"--blocks is .*: expected .*block") as caught:
        parse_reading(blocks, "tokens", False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["token", "", "heads"])
def test_parse_reading__an_unknown_facet_is_refused(kind: Facet) -> None:
    with pytest.raises(SettingError, match="--facet"):
        parse_reading("-1", kind, False)


@pytest.mark.parametrize(
    ("option", "size"),
    [
        *((0, (96, 64)), ("0", (96, 64))),
        *((224, (224, 224)), ("224", (224, 224)), ("448", (448, 448))),
        *(("224x320", (224, 320)), (" 224 x 320 ", (224, 320)), ("320x224", (320, 224))),
    ],
)
def test_image_size_of__is_height_then_width(option: int | str, size: tuple[int, int]) -> None:
    assert image_size_of(option, (96, 64), 16) == size


@pytest.mark.parametrize(
    "option",
    ["", "big", "224x", "x224", "224x320x3", "0x224", "224x0", "0x0", "-224", -1, "22.4", "9" * 6],
)
def test_image_size_of__other_text_is_one_sentence(option: int | str) -> None:
    with pytest.raises(SettingError) as caught:
        image_size_of(option, (96, 64), 16)
    message = str(caught.value)
    assert message.startswith(f"--image-size is {option!r}: expected")
    assert "224x320" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "told"), [(225, "225 x 225"), ("224x330", "224 x 330"), (0, "96 x 70")]
)
def test_image_size_of__sizes_that_cut_patches_are_refused(option: int | str, told: str) -> None:
    with pytest.raises(SettingError, match=f"--image-size is {told}: expected multiples .* 16"):
        image_size_of(option, (96, 70), 16)


@pytest.mark.parametrize(
    ("option", "grid"), [("224", (14, 14)), ("448", (28, 28)), ("224x320", (14, 20))]
)
def test_image_size_of__gives_the_grid_of_a_patch_16_encoder(
    option: str, grid: tuple[int, int]
) -> None:
    height, width = image_size_of(option, (224, 224), 16)
    assert (height // 16, width // 16) == grid


def test_save_encoder__equal_encoders_have_equal_files(tmp_path: Path, world: World) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "elsewhere" / "b.safetensors"
    second.parent.mkdir()
    for _ in range(8):
        save_encoder(open_encoder(str(world.encoder)), first)
        save_encoder(open_encoder(str(first)), second)
        assert first.read_bytes() == second.read_bytes()
    save_encoder(open_encoder(str(world.encoder), Reading((-2,))), second)
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_open_encoder__weights_that_are_not_finite_are_refused(
    world: World, tmp_path: Path, value: float
) -> None:
    weights = open_encoder(str(world.encoder)).transformer.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights["norm.weight"][3] = value
    path = tmp_path / "encoder.pth"
    torch.save({"model": weights}, path)
    told = rf"1 of {len(weights)} tensors of .*encoder\.pth hold weights that are not finite, norm"
    for opened in (open_encoder, open_start):
        with pytest.raises(DamageError, match=told):
            opened(str(path))
