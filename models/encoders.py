"""Frozen encoders: any timm vision transformer, and the weight files that people have.

Legend of shapes: B images, L patches, D width, A attention heads, p patch size.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import DamageError, MissingError, SettingError
from .vision import IMAGENET_MEAN, IMAGENET_STD, normalise, sincos_positions


@dataclass(frozen=True)
class Tokens:
    """What an encoder makes of a batch.

    Attributes:
        class_token: (B, D), after the last norm; the mean patch token where an encoder has none.
        patches: (B, L, D), after the last norm, row by row.
        attention: (B, A, L), the class token's attention in the last block, by head; softmaxed
            over all tokens, so a row sums to less than 1.  Uniform where there is no class token.
    """

    class_token: Tensor
    patches: Tensor
    attention: Tensor


class FrozenEncoder(nn.Module):
    """A vision transformer that is read, never trained.

    Args:
        transformer: timm's, without a classification head, for inputs of any size.
        mean: Of the pixels in [0, 1] it was trained on.
        std: Likewise.
        name: What to call it in records.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        transformer: VisionTransformer,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        name: str = "encoder",
    ) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.name = name
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self._last_input: Tensor | None = None
        transformer.blocks[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._last_input = arguments[0]

    @property
    def width(self) -> int:
        """D."""
        return int(self.transformer.embed_dim)

    @property
    def heads(self) -> int:
        """A, heads of the last block."""
        return int(self.transformer.blocks[-1].attn.num_heads)

    @property
    def patch_size(self) -> int:
        """p, pixels."""
        return int(self.transformer.patch_embed.patch_size[0])

    @property
    def native_size(self) -> tuple[int, int]:
        """The image size its positions were made for, pixels down and across."""
        height, width = self.transformer.patch_embed.img_size
        return int(height), int(width)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """Encode a batch.

        Args:
            images: uint8 (B, H, W, 3), RGB; H and W multiples of the patch size.  Positions are
                resampled where the size is not the native one.

        Returns:
            float tokens in the precision of the surrounding autocast.
        """
        model = self.transformer
        tokens = model.forward_features(normalise(images, self.mean, self.std))
        prefix = model.num_prefix_tokens
        patches = tokens[:, prefix:]
        if model.cls_token is None:
            attention = patches.new_full(
                (len(patches), self.heads, patches.shape[1]), 1 / patches.shape[1]
            )
            return Tokens(patches.mean(dim=1), patches, attention)
        return Tokens(tokens[:, 0], patches, self._class_attention(prefix))

    def _class_attention(self, prefix: int) -> Tensor:
        """Attention of the class token in the last block, from that block's kept input."""
        assert self._last_input is not None
        block, tokens = self.transformer.blocks[-1], self._last_input
        self._last_input = None
        batch, count, _ = tokens.shape
        attention = block.attn
        qkv = attention.qkv(block.norm1(tokens)).reshape(batch, count, 3, attention.num_heads, -1)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
        scores = (query * attention.scale) @ key.transpose(2, 3)
        return scores.softmax(dim=-1)[:, :, 0, prefix:]  # type: ignore[no-any-return]


def timm_encoder(name: str, pretrained: bool = True) -> FrozenEncoder:
    """An encoder by its timm name, such as ``vit_small_patch16_224.dino``.

    Raises:
        SettingError: timm has no vision transformer of that name.
        MissingError: Its weights cannot be had: no network, and none stored.
    """
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except (RuntimeError, TypeError, ValueError) as error:
        if _is_known(name) and not isinstance(error, TypeError):
            raise _weights_missing(name, error) from error
        close = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_patch')[0]}*")[:4])
        hint = f"; near it: {close}" if close else "; timm.list_models('vit_*') names them"
        raise SettingError(f"timm has no vision transformer named {name!r}{hint}") from error
    except Exception as error:  # the hub raises errors of many libraries when it is out of reach
        raise _weights_missing(name, error) from error
    if not isinstance(model, VisionTransformer):
        raise SettingError(
            f"timm's {name} is a {type(model).__name__}: expected a vision transformer (vit_*)"
        )
    config = model.pretrained_cfg
    return FrozenEncoder(model, config["mean"], config["std"], f"timm:{name}")


def _is_known(name: str) -> bool:
    return bool(timm.is_model(name.split(".")[0]))


def _weights_missing(name: str, error: Exception) -> MissingError:
    return MissingError(
        f"the weights of timm:{name} cannot be fetched ({type(error).__name__}): expected a "
        "network connection to the hub, or the file in its cache; a checkpoint file works without"
    )


_WRAPPERS = ("teacher", "model", "student", "state_dict", "target_encoder", "encoder")
_PREFIXES = ("module.", "backbone.", "encoder.", "model.")
_FOREIGN = re.compile(
    r"(decoder_|mask_token|head\.|fc_norm\.|predictor|mean$|std$|projector|dino_)"
)


def encoder_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder's tensors, by timm's names, of a weight file in any of the usual layouts.

    Known layouts: this project's runs; MAE (``model``); iBOT and DINO (``teacher`` or ``student``
    with ``module.`` and ``backbone.`` prefixes, or ``state_dict``); I-JEPA (``target_encoder`` or
    ``encoder`` with ``module.``); flat dicts such as DINOv2's.  Where a file holds several
    networks, the teacher comes first.

    Raises:
        SettingError: No vision transformer is in it.
    """
    weights: Mapping[str, Any] = state
    while (inner := _unwrapped(weights)) is not None:
        weights = inner
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor):
            while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
                name = name.removeprefix(prefix)
            if not _FOREIGN.match(name):
                found[name] = value
    if "patch_embed.proj.weight" not in found:
        raise SettingError(
            "expected the weights of a vision transformer (patch_embed.proj.weight, blocks.0...), "
            f"came: {', '.join(list(found or weights)[:4]) or 'nothing'}"
        )
    return found


def _unwrapped(weights: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for name in _WRAPPERS:
        if isinstance(weights.get(name), Mapping):
            inner: Mapping[str, Any] = weights[name]
            return inner
    return None


def build_encoder(
    state: Mapping[str, Any],
    name: str,
    heads: int | None = None,
    image_size: tuple[int, int] = (0, 0),
) -> FrozenEncoder:
    """A frozen encoder from what a weight file holds; its shape is read off the tensors.

    Args:
        state: Content of the file.
        name: What to call it in records and errors.
        heads: Attention heads; by default what the file's ``architecture`` says, else D / 64, the
            rule of the published vision transformers.
        image_size: Pixels that the positions were made for; by default a square.

    Raises:
        SettingError: The file holds no vision transformer.
        DamageError: Tensors are missing or do not fit.
    """
    weights = encoder_weights(state)
    architecture = state.get("architecture")
    if isinstance(architecture, Mapping):
        heads = heads or int(architecture["heads"])
        image_size = tuple(architecture["image_size"])
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    if registers:
        weights = dict(weights)
        weights["reg_token"] = weights.pop("register_tokens")
    positions = weights["pos_embed"].shape[1]
    side = int(positions**0.5)
    if image_size == (0, 0):
        image_size = (side * patch_size, side * patch_size)
    try:
        model = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads or max(width // 64, 1),
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
            qkv_bias="blocks.0.attn.qkv.bias" in weights,
            init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
            class_token="cls_token" in weights,
            global_pool="token" if "cls_token" in weights else "avg",
            fc_norm=False,
            reg_tokens=registers,
            no_embed_class=registers > 0,
            num_classes=0,
            dynamic_img_size=True,
            norm_layer=_norm,
        )
        model.load_state_dict(_fitted_positions(weights, model))
    except (RuntimeError, KeyError) as error:
        raise DamageError(
            f"the weights of {name} do not make a vision transformer: {error}"
        ) from error
    return FrozenEncoder(model, name=name)


def _fitted_positions(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Fold the class token's position into the token where a model's layout has none for it."""
    wanted = model.pos_embed.shape[1]
    positions = weights["pos_embed"]
    if positions.shape[1] == wanted + 1:
        folded = dict(weights)
        folded["cls_token"] = weights["cls_token"] + positions[:, :1]
        folded["pos_embed"] = positions[:, 1:]
        return folded
    return weights


def _norm(width: int, **options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def untrained(encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
    """The same network with fresh weights, to evaluate beside the trained one.

    Fixed sine-cosine positions stay, since they are no result of training.

    Args:
        encoder: The trained one; it stays as it is.
        seed: Of the weights.
    """
    model = copy.deepcopy(encoder.transformer)
    model.blocks[-1]._forward_pre_hooks.clear()
    fixed = sincos_positions(encoder.width, model.patch_embed.grid_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.init_weights()
    positions = encoder.transformer.pos_embed
    if positions.shape == fixed.shape and torch.allclose(positions.cpu(), fixed, atol=1e-5):
        model.pos_embed.data.copy_(fixed)
    mean, std = tuple(encoder.mean.tolist()), tuple(encoder.std.tolist())
    return FrozenEncoder(model, mean, std, f"untrained {encoder.name}")
