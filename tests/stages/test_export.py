import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from semmae.errors import DamageError, MissingError, SettingError
from semmae.models.autoencoder import Architecture
from semmae.models.vision import normalise
from semmae.stages.export import ExportOptions, export
from semmae.stages.networks import open_autoencoder, open_encoder, open_start
from semmae.storage.checkpoints import checkpoints
from semmae.tests.released_mae import ReleasedMae, trained_mae, training_file
from semmae.tests.world import World

SHAPE = Architecture(
    image_size=(32, 32),
    patch_size=8,
    width=64,
    depth=2,
    heads=1,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=1,
)
POOLED: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fine_tuned": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "positions_on_patches": {"no_embed_class": True},
    "no_class_token": POOLED,
    "no_qkv_bias": {"qkv_bias": False},
    "odd_mlp": {"mlp_ratio": 48 / 11},
    "layer_scale": {"init_values": 1e-5},
    "gated": {
        "mlp_ratio": 5.5,
        "mlp_layer": SwiGLUPacked,
        "act_layer": nn.SiLU,
        "init_values": 1e-5,
    },
    "gated_unscaled": {"mlp_ratio": 5.5, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU},
}


def weight_file_of(folder: Path, **changes: Any) -> Path:
    """A file of a transformer as timm names it, every tensor away from where it starts.

    Beside it is what says the grid of positions that do not tell it.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}
    model = VisionTransformer(**{**shape, "num_heads": 1, "num_classes": 0, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    config = {"pretrained_cfg": {"input_size": [3, *model.patch_embed.img_size]}}
    (folder / "config.json").write_text(json.dumps(config))
    return path


def mae_file(folder: Path, **changes: Tensor) -> Path:
    state = training_file(trained_mae(SHAPE))
    torch.save({**state, "model": {**state["model"], **changes}}, folder / "mae.pth")
    return folder / "mae.pth"


def exported(checkpoint: object, output: Path, **settings: Any) -> Path:
    export(ExportOptions(checkpoint=str(checkpoint), output=output, **settings))
    return output


def made_by_timm(folder: Path, **changes: Any) -> VisionTransformer:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()


def random_images(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def assert_features_equal(checkpoint: object, model: VisionTransformer, pooling: str = "") -> None:
    """That timm's network gives what ours gives of images of the size that timm's wants."""
    encoder = open_encoder(str(checkpoint))
    size = tuple(model.pretrained_cfg["input_size"][1:])
    images = random_images(size)
    pixels = normalise(images, encoder.mean, encoder.std)
    tokens = encoder(images)
    found = model.forward_features(pixels)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model.fc_norm(found), tokens.patches, rtol=0, atol=1e-6)
    summary = tokens.patches.mean(dim=1) if pooling == "avg" else tokens.class_token
    torch.testing.assert_close(model(pixels), summary, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_export__timm_loads_it_strictly_and_gives_our_features(kind: str, tmp_path: Path) -> None:
    checkpoint = weight_file_of(tmp_path, **KINDS[kind])
    folder = exported(checkpoint, tmp_path / "out")
    assert_features_equal(checkpoint, made_by_timm(folder))


def test_export__a_run_of_ours_keeps_its_heads_and_size(world: World, tmp_path: Path) -> None:
    folder = exported(world.encoder, tmp_path / "out")
    model = made_by_timm(folder)
    assert model.blocks[0].attn.num_heads == 4  # 32 channels a head, unlike published networks
    assert_features_equal(world.encoder, model)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 0
    assert config["num_features"] == 128
    assert config["global_pool"] == "token"
    preprocessing = timm.data.resolve_model_data_config(model)
    assert preprocessing["input_size"] == (3, 32, 32)
    assert preprocessing["interpolation"] == "bicubic"
    assert tuple(preprocessing["mean"]) == timm.data.IMAGENET_DEFAULT_MEAN
    assert tuple(preprocessing["std"]) == timm.data.IMAGENET_DEFAULT_STD
    # Back again, by both of its names, with the right number of heads.
    for again in (f"timm:local-dir:{folder}", str(folder / "model.safetensors")):
        assert_features_equal(again, model)


def test_export__an_encoder_that_was_learned_is_its_teacher(world: World, tmp_path: Path) -> None:
    state = torch.load(checkpoints(world.encoder)[-1][1], weights_only=True)
    weights = {k: t for k, t in state["model"].items() if k.startswith("encoder.")}
    teacher = {k.replace("encoder.", "teacher."): t + 0.01 for k, t in weights.items()}
    student = {k.replace("encoder.", "student."): t for k, t in weights.items()}
    run = tmp_path / "run.pt"
    torch.save({**state, "kind": "encoder", "model": {**student, **teacher}}, run)
    folder = exported(run, tmp_path / "out")
    assert_features_equal(run, made_by_timm(folder))


@pytest.mark.parametrize("size", ["48", "24x40", "16x64"])
@pytest.mark.parametrize("learned", [False, True])
def test_export__positions_for_another_size_are_those_our_encoder_uses_there(
    size: str, learned: bool, world: World, tmp_path: Path
) -> None:
    checkpoint = weight_file_of(tmp_path) if learned else world.encoder
    model = made_by_timm(exported(checkpoint, tmp_path / "out", image_size=size))
    sides = [int(side) for side in size.split("x")]
    assert model.pretrained_cfg["input_size"] == (3, sides[0], sides[-1])
    assert_features_equal(checkpoint, model)


def test_export__timm_may_ask_for_another_size_and_for_classes(tmp_path: Path) -> None:
    folder = exported(weight_file_of(tmp_path), tmp_path / "out", image_size="24x40")
    model = made_by_timm(folder, img_size=(40, 24), num_classes=7)
    assert model(torch.zeros(1, 3, 40, 24)).shape == (1, 7)


def test_export__the_pooling_is_a_choice_where_both_were_trained(tmp_path: Path) -> None:
    checkpoint = weight_file_of(tmp_path)
    model = made_by_timm(exported(checkpoint, tmp_path / "out", global_pool="avg"))
    assert model.global_pool == "avg"
    assert_features_equal(checkpoint, model, "avg")
    assert_features_equal(f"timm:local-dir:{tmp_path / 'out'}", model)  # read as it was exported
    tuned = weight_file_of(tmp_path, global_pool="avg")
    with pytest.raises(SettingError, match=r"--global-pool is token, and .*mean patch token"):
        exported(tuned, tmp_path / "tuned", global_pool="token")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch_size", "name"),
    [
        (192, 12, 3, 16, "vit_tiny_patch16_224"),
        (384, 12, 6, 8, "vit_small_patch8_224"),
        (192, 12, 3, 8, "vit_base_patch16_224"),
    ],
)
def test_export__names_timms_own_network_where_there_is_one(
    width: int, depth: int, heads: int, patch_size: int, name: str, tmp_path: Path
) -> None:
    checkpoint = weight_file_of(
        tmp_path, embed_dim=width, depth=depth, num_heads=heads, patch_size=patch_size
    )
    folder = exported(checkpoint, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architecture"] == name
    assert_features_equal(checkpoint, made_by_timm(folder))


def test_export__maes_network_loads_it_strictly_and_has_our_losses(
    world: World, tmp_path: Path
) -> None:
    path = exported(world.encoder, tmp_path / "mae.pth", format="mae")
    state = torch.load(path, weights_only=True)  # nothing on a safe list is needed
    assert state["epoch"] == 0  # one epoch, counted from 0
    assert "optimizer" not in state
    ours = open_autoencoder(world.encoder)
    released = ReleasedMae(ours.architecture).eval()
    released.load_state_dict(state["model"])
    images, mask = random_images((32, 32)), torch.arange(16).flip(0).expand(2, 16) >= 4
    with torch.no_grad():
        found = ours(images, mask, 4)
    expected = released.loss(normalise(images, ours.mean, ours.std), mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    start = open_start(str(path))
    assert start.architecture() == ours.architecture
    assert_same_file(exported(path, tmp_path / "again.pth", format="mae"), path)


def assert_same_file(one: Path, other: Path) -> None:
    assert one.read_bytes() == other.read_bytes()


def test_export__a_training_file_of_mae_goes_through_unchanged(tmp_path: Path) -> None:
    path = exported(mae_file(tmp_path), tmp_path / "out.pt", format="mae")
    state = torch.load(path, weights_only=True)
    given = training_file(trained_mae(SHAPE))
    assert state["epoch"] == 799
    assert state["model"].keys() == given["model"].keys()
    for name, tensor in given["model"].items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", ["48", "24x40"])
def test_export__a_training_file_for_another_size_is_one_of_a_network_made_for_it(
    size: str, tmp_path: Path
) -> None:
    checkpoint = mae_file(tmp_path)
    path = exported(checkpoint, tmp_path / "out.pth", format="mae", image_size=size)
    start = open_start(str(path))
    sides = [int(side) for side in size.split("x")]
    assert start.architecture().image_size == (sides[0], sides[-1])
    released = ReleasedMae(start.architecture())
    released.load_state_dict(torch.load(path, weights_only=True)["model"])


def test_export__run_again_it_leaves_what_is_there_and_mends_half_of_it(
    world: World, tmp_path: Path
) -> None:
    folder, path = tmp_path / "out", tmp_path / "mae.pth"
    for _ in range(2):
        exported(world.encoder, folder)
        exported(world.encoder, path, format="mae")
    before = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    (folder / "config.json").unlink()  # as if it had been interrupted
    exported(world.encoder, folder)
    assert before == (
        (folder / "config.json").read_bytes(),
        (folder / "model.safetensors").read_bytes(),
    )
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_export__replaces_nothing(world: World, tmp_path: Path) -> None:
    other = weight_file_of(tmp_path)
    folder, path = (
        exported(other, tmp_path / "out"),
        exported(mae_file(tmp_path), tmp_path / "m.pth", format="mae"),
    )
    before = {p: p.read_bytes() for p in (*folder.iterdir(), path)}
    with pytest.raises(SettingError, match=r"model.safetensors is there and is not this export"):
        exported(world.encoder, folder)
    with pytest.raises(SettingError, match=r"config.json is there and is not this export"):
        exported(other, folder, global_pool="avg")
    with pytest.raises(SettingError, match=r"m.pth is there and is not this export"):
        exported(world.encoder, path, format="mae")
    with pytest.raises(SettingError, match=r"is not empty \(checkpoints"):
        exported(world.encoder, world.encoder)
    assert before == {p: p.read_bytes() for p in (*folder.iterdir(), path)}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"format": "timm", "output": "a.txt"}, "is a file: name a folder"),
        ({"format": "mae", "output": "folder"}, "expected a file such as mae.pth"),
        ({"format": "mae", "output": "a.safetensors"}, "expected a file such as mae.pth"),
        ({"format": "mae", "output": "a.pth", "global_pool": "avg"}, "--global-pool belongs to"),
        ({"format": "timm", "output": "new", "image_size": "33"}, "multiples of"),
        ({"format": "timm", "output": "new", "image_size": "big"}, "--image-size is 'big'"),
        ({"format": "mae", "output": "b.pth", "image_size": "33"}, "multiples of"),
    ],
    ids=str,
)
def test_export__settings_that_cannot_be_are_one_sentence(
    settings: dict[str, str], told: str, world: World, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("mine")
    output = tmp_path / settings.pop("output")
    held = set(tmp_path.iterdir())
    with pytest.raises(SettingError, match=told) as caught:
        exported(world.encoder, output, **settings)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == held


def test_export__checkpoints_that_cannot_be_are_one_sentence(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MissingError, match="nowhere"):
        exported(tmp_path / "nowhere", out)
    with pytest.raises(MissingError, match=r"timm cannot load the folder .*nowhere.*config.json"):
        exported(f"timm:local-dir:{tmp_path / 'nowhere'}", out)
    with pytest.raises(SettingError, match="is a part learner: expected an encoder"):
        exported(world.learner, out)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(DamageError, match=r"text.pth"):
        exported(tmp_path / "text.pth", out)
    alone = weight_file_of(tmp_path)
    with pytest.raises(SettingError, match="holds no decoder: expected a run"):
        exported(alone, tmp_path / "out.pth", format="mae")
    moved = mae_file(tmp_path, decoder_pos_embed=torch.rand(1, 17, 32))
    with pytest.raises(SettingError, match=r"no decoder of MAE's kind: .*not sine-cosine"):
        exported(moved, tmp_path / "out.pth", format="mae")
    folder = exported(alone, tmp_path / "made")
    with pytest.raises(SettingError, match="create_model makes it already"):
        exported(f"timm:local-dir:{folder}", out)
    assert not out.exists()
    assert not (tmp_path / "out.pth").exists()


def test_export__a_namespace_in_the_file_is_read_and_not_passed_on(tmp_path: Path) -> None:
    source = mae_file(tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert "args" in torch.load(source, weights_only=True)
    path = exported(source, tmp_path / "out.pth", format="mae")
    assert "args" not in torch.load(path, weights_only=True)
