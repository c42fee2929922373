import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from semmae.errors import DamageError, SettingError
from semmae.models.autoencoder import Architecture, MaskedAutoencoder
from semmae.models.encoders import FrozenEncoder, build_encoder
from semmae.models.foreign import encoder_weights
from semmae.models.vision import normalise, sincos_positions
from semmae.storage.checkpoints import load_checkpoint

WIDTH = 64

Weights = dict[str, Tensor]


def reference(seed: int = 0, **changes: Any) -> VisionTransformer:
    """timm's transformer with every tensor away from where it starts."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 1,
        "num_classes": 0,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    model = VisionTransformer(**{**shape, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def saved_and_built(state: dict[str, Any], folder: Path, **options: Any) -> FrozenEncoder:
    path = folder / "weights.pth"
    torch.save(state, path)
    return build_encoder(load_checkpoint(path), str(path), **options)


def random_images(size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def assert_same(built: FrozenEncoder, model: VisionTransformer, size: int = 32) -> None:
    images = random_images((size, size))
    expected = model.forward_features(normalise(images, built.mean, built.std))
    tokens = built(images)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(tokens.patches, expected[:, prefix:], rtol=0, atol=1e-5)
    pooled = model.forward_head(expected, pre_logits=True)
    torch.testing.assert_close(tokens.class_token, pooled, rtol=0, atol=1e-5)


def mae_file(weights: Weights) -> dict[str, Any]:
    decoder = {
        "mask_token": torch.rand(1, 1, 16),
        "decoder_pos_embed": torch.rand(1, 17, 16),
        "decoder_embed.weight": torch.rand(16, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.rand(48, 16),
        "decoder_norm.weight": torch.rand(16),
        "decoder_pred.weight": torch.rand(192, 16),
    }
    arguments = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75)
    optimiser = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "model": {**weights, **decoder},
        "optimizer": optimiser,
        "epoch": 799,
        "scaler": {},
        "args": arguments,
    }


def ibot_file(weights: Weights) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.rand(4, WIDTH), "head.last_layer.weight_g": torch.rand(4, 1)}
    student = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    student["masked_embed"] = torch.rand(1, WIDTH)
    return {
        "student": {**prefixed("module.backbone.", student), **prefixed("module.", head)},
        "teacher": {**prefixed("backbone.", weights), **head},
        "epoch": 800,
    }


def student_file(weights: Weights) -> dict[str, Any]:
    masked = {"masked_embed": torch.rand(1, WIDTH)}
    return {"student": prefixed("module.backbone.", {**weights, **masked}), "epoch": 3}


def dinov2_training_file(weights: Weights) -> dict[str, Any]:
    """With ``block_chunks`` 2 of 4 blocks: the chunks count on, and hold nothing in front."""
    chunked = {
        re.sub(r"^blocks\.(\d+)", lambda at: f"blocks.{int(at[1]) // 2}.{at[1]}", name): tensor
        for name, tensor in weights.items()
    }
    head = {f"{of}_head.mlp.0.weight": torch.rand(4, WIDTH) for of in ("dino", "ibot")}
    masked = {"mask_token": torch.rand(1, WIDTH)}
    return {"teacher": {**prefixed("backbone.", {**chunked, **masked}), **head}}


LAYOUTS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "mae": mae_file,
    "ibot": ibot_file,
    "dino": lambda weights: {"teacher": prefixed("module.backbone.", weights), "epoch": 1},
    "student": student_file,
    "state_dict": lambda weights: {"state_dict": weights},
    "flat": lambda weights: weights,
    "compiled": lambda weights: {"model": prefixed("_orig_mod.", weights)},
    "dinov2_training": dinov2_training_file,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_build_encoder__reads_the_layout(layout: str, tmp_path: Path) -> None:
    model = reference(depth=4)
    assert_same(saved_and_built(LAYOUTS[layout](model.state_dict()), tmp_path), model)


def test_build_encoder__reads_the_layer_scale_of_ibot(tmp_path: Path) -> None:
    model = reference(init_values=0.1)
    weights = {
        re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "blocks.1.gamma_2" in weights
    assert_same(saved_and_built(ibot_file(weights), tmp_path), model)


def test_build_encoder__takes_the_target_of_ijepa(tmp_path: Path) -> None:
    model = reference(class_token=False, global_pool="avg", fc_norm=False)
    other = reference(1, class_token=False, global_pool="avg", fc_norm=False)
    state = {
        "encoder": prefixed("module.", other.state_dict()),
        "predictor": {"module.predictor_embed.weight": torch.rand(8, WIDTH)},
        "target_encoder": prefixed("module.", model.state_dict()),
        "opt": {},
        "epoch": 300,
    }
    assert_same(saved_and_built(state, tmp_path), model)
    del state["target_encoder"]
    assert_same(saved_and_built(state, tmp_path), other)


@pytest.mark.parametrize("head", [{}, {"head.weight": torch.zeros(9, WIDTH)}], ids=["", "head"])
def test_build_encoder__a_fine_tuned_file_gives_the_features_of_the_fine_tuned_network(
    tmp_path: Path, head: Weights
) -> None:
    """MAE's layout of them: patch tokens are pooled, then comes fc_norm, and there is no norm."""
    model = reference(global_pool="avg")
    weights = model.state_dict()
    assert "fc_norm.weight" in weights
    assert "norm.weight" not in weights
    built = saved_and_built({"model": {**weights, **head}}, tmp_path)
    images = random_images()
    with torch.no_grad():
        expected = model(normalise(images, built.mean, built.std))
    assert built.pools
    torch.testing.assert_close(built(images).class_token, expected, rtol=0, atol=1e-5)
    linear_probe = {**reference().state_dict(), "head.0.running_mean": torch.zeros(WIDTH)}
    assert not saved_and_built({"model": linear_probe}, tmp_path).pools


def test_build_encoder__a_file_with_two_final_norms_is_refused() -> None:
    weights = {**reference().state_dict(), **reference(global_pool="avg").state_dict()}
    with pytest.raises(DamageError, match=r"norm.weight is not known"):
        build_encoder(weights, "file")


@pytest.mark.parametrize(
    ("removed", "added", "told"),
    [
        (["pos_embed"], ["rope_embed.periods", "storage_tokens"], "DINOv3"),
        (["pos_embed"], ["rel_pos_bias.relative_position_bias_table"], "BEiT"),
        (["patch_embed.", "blocks."], ["visual.conv1.weight"], "expected the weights of a vision"),
        (["patch_embed."], ["embeddings.patch_embeddings.weight"], "expected the weights of a vis"),
    ],
    ids=["dinov3", "beit", "clip", "transformers"],
)
def test_build_encoder__other_kinds_of_transformers_are_refused_in_one_sentence(
    removed: list[str], added: list[str], told: str
) -> None:
    weights = reference().state_dict()
    kept = {name: t for name, t in weights.items() if not name.startswith(tuple(removed))}
    with pytest.raises((DamageError, SettingError), match=told) as caught:
        build_encoder({**kept, **{name: torch.zeros(4) for name in added}}, "some/file.pth")
    assert "some/file.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("half", [False, True])
def test_build_encoder__reads_a_run_of_ours(tmp_path: Path, half: bool) -> None:
    torch.manual_seed(0)
    shape = Architecture(
        image_size=(16, 32),
        patch_size=8,
        width=48,
        depth=2,
        heads=4,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
    )
    model = MaskedAutoencoder(shape).eval()
    weights = {name: t.half().float() for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    stored = {name: t.half() if half else t for name, t in weights.items()}
    state = {"model": stored, "architecture": shape.to_record(), "kind": "pretraining"}
    built = saved_and_built(state, tmp_path)
    assert (built.heads, built.patch_size, built.native_size) == (4, 8, (16, 32))
    images = random_images((16, 32))
    with torch.no_grad():
        expected = model.encoder.forward_features(normalise(images, built.mean, built.std))
    torch.testing.assert_close(built(images).patches, expected[:, 1:], rtol=0, atol=1e-5)


def dinov2_file(model: VisionTransformer, class_position: Tensor) -> Weights:
    """The tensors that DINOv2 would store of a network that timm holds."""
    weights = dict(model.state_dict())
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
        weights["cls_token"] = weights["cls_token"] - class_position
        weights["pos_embed"] = torch.cat([class_position, weights["pos_embed"]], dim=1)
    weights["mask_token"] = torch.zeros(1, WIDTH)
    return weights


@torch.no_grad()
def dinov2_features(weights: Weights, images: Tensor, model: VisionTransformer) -> Tensor:
    """DINOv2's own way: positions on class token and patches, then the registers between."""
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    first = weights["cls_token"].expand(len(images), -1, -1)
    tokens = torch.cat([first, patches], dim=1) + weights["pos_embed"]
    if "register_tokens" in weights:
        registers = weights["register_tokens"].expand(len(images), -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
    tokens = model.norm(model.blocks(tokens))
    assert isinstance(tokens, Tensor)
    return tokens


@pytest.mark.parametrize("registers", [0, 4])
def test_build_encoder__reads_dinov2(registers: int, tmp_path: Path) -> None:
    model = reference(
        img_size=42,
        patch_size=14,
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,
    )
    weights = dinov2_file(model, torch.rand(1, 1, WIDTH))
    built = saved_and_built(weights, tmp_path)
    assert (built.patch_size, built.native_size) == (14, (42, 42))
    images = random_images((42, 42))
    expected = dinov2_features(weights, normalise(images, built.mean, built.std), model)
    tokens = built(images)
    torch.testing.assert_close(tokens.class_token, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.patches, expected[:, 1 + registers :], rtol=0, atol=1e-5)
    assert tokens.attention.shape == (2, 1, 9)


def test_build_encoder__reads_dinov2_giant(tmp_path: Path) -> None:
    model = reference(mlp_ratio=5.5, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    weights = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert_same(saved_and_built(weights, tmp_path), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 2, "no_embed_class": True},
        {"reg_tokens": 2},
        {"no_embed_class": True},
        {"qkv_bias": False},
        {"mlp_ratio": 48 / 11},
    ],
    ids=str,
)
def test_build_encoder__reads_what_timm_wrote(changes: dict[str, Any], tmp_path: Path) -> None:
    model = reference(**changes)
    assert_same(saved_and_built(model.state_dict(), tmp_path, image_size=(32, 32)), model)


RECTANGLE = (24, 64)
"""3 x 8 patches: with the class token's, 25 positions."""


@torch.no_grad()
def assert_same_rectangles(built: FrozenEncoder, model: VisionTransformer) -> None:
    images = random_images(RECTANGLE)
    expected = model.forward_features(normalise(images, built.mean, built.std))
    found = built(images).patches
    torch.testing.assert_close(found, expected[:, model.num_prefix_tokens :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_build_encoder__sine_cosine_positions_tell_their_grid(class_token: bool) -> None:
    pools: dict[str, Any] = {} if class_token else {"global_pool": "avg", "fc_norm": False}
    model = reference(img_size=RECTANGLE, class_token=class_token, **pools)
    fixed = sincos_positions(WIDTH, (3, 8))
    model.pos_embed.data.copy_(fixed if class_token else fixed[:, 1:])
    built = build_encoder(model.state_dict(), "file")
    assert built.native_size == RECTANGLE
    assert_same_rectangles(built, model)


def test_build_encoder__positions_beside_registers_are_of_patches_alone() -> None:
    model = reference(no_embed_class=True, reg_tokens=4)
    assert build_encoder(model.state_dict(), "file").native_size == (32, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": RECTANGLE},
        {"img_size": (24, 48)},
        {"no_embed_class": True},
        {"img_size": RECTANGLE, "class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
    ids=str,
)
def test_build_encoder__positions_that_do_not_tell_their_grid_are_refused(
    changes: dict[str, Any],
) -> None:
    model = reference(**changes)
    count = model.pos_embed.shape[1]
    with pytest.raises(SettingError, match=f"the {count} positions of some/file.pth do not tell"):
        build_encoder(model.state_dict(), "some/file.pth")
    size = changes.get("img_size", (32, 32))
    assert build_encoder(model.state_dict(), "file", image_size=size).native_size == size


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16)]
)
def test_build_encoder__gives_published_widths_their_heads(width: int, heads: int) -> None:
    with torch.device("meta"):
        weights = VisionTransformer(
            img_size=32, patch_size=16, embed_dim=width, depth=1, num_heads=1, num_classes=0
        ).state_dict()
    empty = {name: torch.zeros(tensor.shape) for name, tensor in weights.items()}
    assert build_encoder(empty, "file").heads == heads


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"model": {"conv1.weight": torch.rand(4, 3, 7, 7), "fc.bias": torch.rand(4)}},
        {"epoch": 3},
        {"patch_embed.proj.weight": torch.rand(8, 3, 2, 4, 4)},
    ],
    ids=["empty", "resnet", "no_tensors", "video"],
)
def test_encoder_weights__refuses_a_file_without_a_transformer(state: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="expected the weights of a vision transformer"):
        encoder_weights(state)


@pytest.mark.parametrize(
    ("dropped", "told"),
    [
        (["pos_embed"], "pos_embed is missing"),
        (["blocks."], "blocks.0.mlp.fc1.weight is missing"),
        (["norm."], "norm.weight is missing, norm.bias is missing"),
        (["blocks.1.attn"], "blocks.1.attn.qkv.weight is missing"),
        (["blocks.0.norm", "blocks.1.norm"], "and 5 more"),
    ],
)
def test_build_encoder__names_the_first_missing_tensors(dropped: list[str], told: str) -> None:
    weights = {
        name: tensor
        for name, tensor in reference().state_dict().items()
        if not name.startswith(tuple(dropped))
    }
    with pytest.raises(DamageError) as caught:
        build_encoder(weights, "some/file.pth")
    message = str(caught.value)
    assert told in message
    assert "some/file.pth" in message
    assert len(message) < 400
    assert "\n" not in message


def test_build_encoder__refuses_tensors_of_other_shapes_or_names() -> None:
    weights = reference().state_dict()
    wrong = {**weights, "norm.weight": torch.rand(WIDTH + 1)}
    with pytest.raises(DamageError, match=r"norm.weight has shape \(65,\) in place of \(64,\)"):
        build_encoder(wrong, "file")
    with pytest.raises(DamageError, match=r"blocks.0.attn.rel_pos is not known"):
        build_encoder({**weights, "blocks.0.attn.rel_pos": torch.rand(3)}, "file")
    with pytest.raises(DamageError, match="no multiple of 5 heads"):
        build_encoder(weights, "file", heads=5)
    with pytest.raises(DamageError, match="pos_embed has shape"):
        build_encoder(weights, "file", image_size=(32, 40))
