"""Vision transformers from the weight files that people have, and from this project's own.

Legend of shapes: L patches, D width, p patch size.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import DamageError, SettingError
from .vision import sincos_positions

_WRAPPERS = ("teacher", "model", "student", "state_dict", "target_encoder", "encoder")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")
_FOREIGN = re.compile(r"decoder_|mask_token|masked_embed|head\.|predictor|projector|dino_|ibot_")
_RENAMED = {
    "register_tokens": "reg_token",
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w3.": ".mlp.fc2.",
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
}
"""Names of DINOv2, and of iBOT's layer scale, against timm's."""

_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")
"""What DINOv2's training puts before its blocks, whose own numbers count through all chunks."""

_UNCOMMON_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Heads of the published widths (huge, giant, gigantic) that do not have 64 channels a head."""


def encoder_weights(state: Mapping[str, Any], name: str = "the file") -> dict[str, Tensor]:
    """The encoder's tensors, by timm's names, of a weight file in any of the usual layouts.

    Known layouts: this project's runs; MAE (``model``); iBOT and DINO (``teacher`` or ``student``
    with ``module.`` and ``backbone.`` prefixes, or ``state_dict``); I-JEPA (``target_encoder`` or
    ``encoder`` with ``module.``); flat dicts such as DINOv2's.  Where a file holds several
    networks, the teacher comes first.

    Args:
        state: Content of the file.
        name: What to call it in errors.

    Raises:
        SettingError: No vision transformer of images is in it.
    """
    held = _innermost(state)
    named = _named(held)
    found = {key: tensor for key, tensor in named.items() if not _FOREIGN.match(key)}
    projection = found.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        raise SettingError(
            f"{name}: expected the weights of a vision transformer of images (a 4-dimensional "
            "patch_embed.proj.weight, blocks.0...), "
            f"came: {', '.join(list(found or held)[:4]) or 'nothing'}"
        )
    return found


def decoder_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The decoder's tensors, by MAE's names, of a weight file; none where it holds no decoder.

    Known layouts: this project's runs, and the training files of MAE and SemMAE.
    """
    named = _named(_innermost(state))
    if "decoder_embed.weight" not in named:
        return {}
    return {name: t for name, t in named.items() if name.startswith(("decoder_", "mask_token"))}


def _innermost(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dict that holds the tensors; of several networks the teacher's."""
    while (inner := _unwrapped(state)) is not None:
        state = inner
    return state


def _named(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among some values, by timm's names."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor):
            while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
                name = name.removeprefix(prefix)
            for theirs, ours in _RENAMED.items():
                name = name.replace(theirs, ours)
            found[_CHUNK.sub("blocks.", name)] = value
    return found


def _unwrapped(weights: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for name in _WRAPPERS:
        if isinstance(weights.get(name), Mapping):
            inner: Mapping[str, Any] = weights[name]
            return inner
    return None


def transformer_of(
    state: Mapping[str, Any],
    name: str,
    heads: int | None = None,
    image_size: tuple[int, int] = (0, 0),
) -> VisionTransformer:
    """A timm vision transformer with the weights of a file; its shape is read off the tensors.

    Args:
        state: Content of the file.
        name: What to call it in errors.
        heads: Attention heads; by default what the file's ``architecture`` says, else those of
            the published vision transformer of that width: D / 64, but 16 from huge on.
        image_size: Pixels that the positions were made for; by default what the file's
            ``architecture`` says, else what they themselves tell.

    Raises:
        SettingError: The file holds no vision transformer, or its positions do not tell their grid.
        DamageError: Tensors are missing or do not fit.
    """
    weights = encoder_weights(state, name)
    architecture = state.get("architecture")
    if isinstance(architecture, Mapping) and architecture.keys() >= {"heads", "image_size"}:
        heads = heads or int(architecture["heads"])
        image_size = tuple(architecture["image_size"]) if image_size == (0, 0) else image_size
    needed = ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    _refuse_misfits(name, [_missing(tensor) for tensor in needed if tensor not in weights])
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    heads = heads or _UNCOMMON_HEADS.get(width, max(width // 64, 1))
    if width % heads:
        _refuse_misfits(name, [f"its width {width} is no multiple of {heads} heads"])
    if image_size == (0, 0):
        rows, columns = _grid_of(weights, name)
        image_size = (rows * patch_size, columns * patch_size)
    patches = image_size[0] // patch_size * (image_size[1] // patch_size)
    weights = _fold_class_position(weights, patches)
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        num_heads=heads,
        no_embed_class=weights["pos_embed"].shape[1] == patches,
        **_shape_of(weights),
    )
    wanted = model.state_dict()
    _refuse_misfits(
        name,
        [_missing(tensor) for tensor in wanted if tensor not in weights]
        + [f"{tensor} is not known" for tensor in weights if tensor not in wanted]
        + [
            f"{tensor} has shape {tuple(value.shape)} in place of {tuple(wanted[tensor].shape)}"
            for tensor, value in weights.items()
            if tensor in wanted and value.shape != wanted[tensor].shape
        ],
    )
    model.load_state_dict(weights)
    return model


def _grid_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The patches, down and across, that positions were made for, as far as they tell it.

    Sine-cosine ones are those of one grid.  Learned ones are taken for a square's, but not where
    all of them would be patches beside a class token: k x k positions without one of that token
    are as many as (k - 1) x (k + 1) with it.  Beside registers they are patches, as timm's
    networks with registers have them.

    Raises:
        SettingError: They do not tell it.
    """
    positions = weights["pos_embed"]
    count, width = positions.shape[1], positions.shape[-1]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    others = {0, 1, 1 + registers} if "cls_token" in weights else {0, registers}
    patches = [count - other for other in others if count > other]
    if width % 4 == 0:
        for rows, columns in ((n, many // n) for many in patches for n in _divisors(many)):
            fixed = sincos_positions(width, (rows, columns))[:, -count:]
            if fixed.shape == positions.shape and torch.allclose(
                positions.float().cpu(), fixed, rtol=0, atol=1e-3
            ):
                return rows, columns
    squares = [many for many in patches if math.isqrt(many) ** 2 == many]
    if len(squares) != 1 or (squares[0] == count and len(others) > 1 and not registers):
        raise SettingError(
            f"the {count} positions of {name} do not tell how many patches are down and how many "
            "across: expected sine-cosine positions, or those of a square and one for the class "
            "token; say the size of its images in a config.json beside it, as timm does: "
            '{"pretrained_cfg": {"input_size": [3, HEIGHT, WIDTH]}}'
        )
    return math.isqrt(squares[0]), math.isqrt(squares[0])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _fold_class_position(weights: dict[str, Tensor], patches: int) -> dict[str, Tensor]:
    """Move the class token's position into the token where there are registers.

    DINOv2 gives a position to the class token and none to the registers that it puts between
    class token and patches; timm gives one to all of these or to none.
    """
    positions = weights["pos_embed"]
    if not weights.keys() >= {"cls_token", "reg_token"} or positions.shape[1] != patches + 1:
        return weights
    token = weights["cls_token"] + positions[:, :1]
    return {**weights, "cls_token": token, "pos_embed": positions[:, 1:]}


def _shape_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of timm's transformer that can be read off its tensors."""
    width = weights["patch_embed.proj.weight"].shape[0]
    blocks = [name.split(".")[1] for name in weights if name.startswith("blocks.")]
    hidden, behind = (weights[f"blocks.0.mlp.fc{i}.weight"].shape[i - 1] for i in (1, 2))
    gated = hidden == 2 * behind
    pools = "cls_token" not in weights or "fc_norm.weight" in weights
    return {
        "embed_dim": width,
        "depth": 1 + max(int(block) for block in blocks if block.isdecimal()),
        # timm cuts the product to an integer: half a channel more keeps rounding out of it.
        "mlp_ratio": (hidden + 0.5) / width,
        "mlp_layer": SwiGLUPacked if gated else Mlp,
        "act_layer": nn.SiLU if gated else nn.GELU,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "class_token": "cls_token" in weights,
        "global_pool": "avg" if pools else "token",
        # Fine-tuned MAE files have their final norm behind the pooling: without it the features
        # would not be those of the fine-tuned network.
        "fc_norm": "fc_norm.weight" in weights,
        "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "num_classes": 0,
        "dynamic_img_size": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }


def _missing(tensor: str) -> str:
    rotary = " (rotary and relative positions, such as DINOv3's and BEiT's, are not read)"
    return f"{tensor} is missing{rotary if tensor == 'pos_embed' else ''}"


def _refuse_misfits(name: str, misfits: list[str]) -> None:
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise DamageError(
            f"the weights of {name} do not make a vision transformer as timm builds it: "
            f"{', '.join(misfits[:3])}{more}; get the file again, or use another checkpoint"
        )
