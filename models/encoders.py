"""Frozen encoders: any timm vision transformer, from timm or from a weight file.

Legend of shapes: B images, L patches, D width, A attention heads, p patch size.
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from ..errors import MissingError, SettingError, UserError
from .foreign import transformer_of
from .readings import DEFAULT_READING, Reading, class_attention, facet_of, outputs_kept
from .vision import IMAGENET_MEAN, IMAGENET_STD, normalise, sincos_positions

AT_ONCE = 128
"""Images whose tokens are looked at together where there are many, as when parts begin."""

PAIRS_AT_ONCE = AT_ONCE * 576**2
"""Pairs of patches of an image whose blur is weighed together, at most: `AT_ONCE` images of 24 x 24
patches.  Their weights are what takes the memory, 4 bytes a pair and copy."""


@dataclass(frozen=True)
class Tokens:
    """What an encoder makes of a batch.

    Attributes:
        class_token: (B, D), after the final norm; the mean patch token of the last block where the
            encoder pools or its reading is pooled.
        patches: (B, L, D times the blocks read), row by row; by default those of the last block
            after the final norm.
        attention: (B, A, L), the class token's attention in the last block, by head; softmaxed
            over all tokens, so a row sums to less than 1.  Uniform where there is no class token.
    """

    class_token: Tensor
    patches: Tensor
    attention: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three, in order."""
        return self.class_token, self.patches, self.attention

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """One change to all three, such as a move or a choice of images."""
        return Tokens(*map(change, self.parts))

    def split(self) -> Iterator["Tokens"]:
        """Of `AT_ONCE` images each, fewer of grids finer than 24 x 24, in order."""
        size = max(min(AT_ONCE, PAIRS_AT_ONCE // self.patches.shape[1] ** 2), 1)
        for start in range(0, len(self.patches), size):
            yield self.each(itemgetter(slice(start, start + size)))

    @classmethod
    def joined(cls, batches: Sequence["Tokens"]) -> "Tokens":
        """Batches as one."""
        return cls(*map(torch.cat, zip(*(tokens.parts for tokens in batches), strict=True)))


@dataclass(frozen=True)
class TimmNetwork:
    """What timm makes a network of once its weights are at hand.

    Attributes:
        name: Of timm's own, such as ``vit_small_patch16_224.dino``.
        arguments: Of its making, where a folder or a repository said more than that name.
        mean: Of the pixels in [0, 1] it was trained on.
        std: Likewise.
    """

    name: str
    arguments: dict[str, Any]
    mean: list[float]
    std: list[float]


class FrozenEncoder(nn.Module):
    """A vision transformer that is read, never trained.

    Args:
        transformer: timm's, without a classification head, for inputs of any size.
        mean: Of the pixels in [0, 1] it was trained on.
        std: Likewise.
        name: What to call it in records.
        reading: Which blocks to read, and what of them.
        timm: What timm can make the network of again, if it did.

    Raises:
        SettingError: The reading names blocks that the transformer has not.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        transformer: VisionTransformer,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        name: str = "encoder",
        reading: Reading = DEFAULT_READING,
        timm: TimmNetwork | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.name, self.reading, self.timm = name, reading, timm
        self._read = reading.indices(len(transformer.blocks))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def width(self) -> int:
        """D, channels of the class token."""
        return int(self.transformer.embed_dim)

    @property
    def patch_width(self) -> int:
        """Channels of a patch: D times the blocks read."""
        return self.width * len(self._read)

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

    @property
    def pools(self) -> bool:
        """Whether it sums an image up by the mean of its patch tokens.

        So do encoders without a class token, and those that were trained to be pooled, such as
        MAE's fine-tuned ones: nothing was ever read of their class token.
        """
        return self.transformer.cls_token is None or self.transformer.global_pool == "avg"

    def shape_record(self) -> dict[str, object]:
        """Plain data of its shape, for checkpoints of what is trained from it."""
        return {
            "heads": self.heads,
            "image_size": list(self.native_size),
            "width": self.width,
            "depth": len(self.transformer.blocks),
            "patch_size": self.patch_size,
        }

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
        return self.features(normalise(images, self.mean, self.std))

    def features(self, pixels: Tensor) -> Tokens:
        """Encode pixels that were made, such as a rebuilt image; gradients go back to them.

        Args:
            pixels: float (B, 3, H, W), normalised by ``mean`` and ``std``; H and W multiples of
                the patch size.

        Returns:
            As of `forward`.
        """
        model = self.transformer
        with outputs_kept(self._sources()) as kept:
            final = model.forward_features(pixels)
        prefix = model.num_prefix_tokens
        patches = self._patches(final, kept)
        if model.cls_token is None:
            count = patches.shape[1]
            attention = patches.new_full((len(patches), self.heads, count), 1 / count)
        else:
            last = model.blocks[-1].attn
            # Fused attention keeps no weights: they are made again.
            attention = class_attention(last, kept[last.qkv])[..., prefix:]
        pooled = self.reading.pooled or self.pools
        summary = final[:, prefix:].mean(dim=1) if pooled else final[:, 0]
        # Networks that pool have their final norm behind the pooling, and then none before it.
        return Tokens(model.fc_norm(summary), patches, attention)

    def _sources(self) -> set[nn.Module]:
        """The modules whose outputs a reading is made of, beside the transformer's own."""
        blocks = self.transformer.blocks
        read = [blocks[index] for index in self._read]
        if self.reading.kind != "tokens":
            return {block.attn.qkv for block in [*read, blocks[-1]]}
        return {block for block in read if block is not blocks[-1]} | {blocks[-1].attn.qkv}

    def _patches(self, final: Tensor, kept: dict[nn.Module, Tensor]) -> Tensor:
        """The patch features (B, L, D times the blocks) of the reading."""
        model, kind, found = self.transformer, self.reading.kind, []
        for block in (model.blocks[index] for index in self._read):
            if kind != "tokens":
                states = facet_of(block.attn, kept[block.attn.qkv], kind)
            else:
                last = block is model.blocks[-1]
                states = model.fc_norm(final if last else model.norm(kept[block]))
            found.append(states[:, model.num_prefix_tokens :])
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def timm_encoder(
    name: str, pretrained: bool = True, reading: Reading = DEFAULT_READING
) -> FrozenEncoder:
    """An encoder by its timm name, such as ``vit_small_patch16_224.dino``.

    Raises:
        SettingError: timm has no vision transformer, or no weights, of that name, or it has not
            the blocks of the reading.
        MissingError: Its weights cannot be had: no network, and none stored.
    """
    model = _made_by_timm(name, pretrained=pretrained)
    config = model.pretrained_cfg
    network = TimmNetwork(*_recipe_of(name), list(config["mean"]), list(config["std"]))
    return FrozenEncoder(model, network.mean, network.std, f"timm:{name}", reading, network)


def timm_encoder_again(
    network: TimmNetwork, weights: Mapping[str, Tensor], name: str, reading: Reading
) -> FrozenEncoder:
    """An encoder that timm made once, from its weights alone.

    Args:
        network: What timm made it of.
        weights: Of its transformer.
        name: What to call it in records and errors.
        reading: Which blocks to read, and what of them.

    Raises:
        SettingError: It has not the blocks of the reading, or this timm has no such network.
    """
    model = _made_by_timm(network.name, pretrained=False, **network.arguments)
    model.load_state_dict(weights)
    return FrozenEncoder(model, network.mean, network.std, name, reading, network)


def _made_by_timm(name: str, **arguments: Any) -> VisionTransformer:
    arguments = {**arguments, "num_classes": 0, "dynamic_img_size": True}
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as error:  # only vision transformers take inputs of any size
        raise SettingError(f"timm's {name} is {_NO_TRANSFORMER}") from error
    except Exception as error:  # the hub raises errors of many libraries when it is out of reach
        raise _refusal(name, error) from error
    if not (
        isinstance(model, VisionTransformer)
        and isinstance(model.patch_embed, PatchEmbed)
        and isinstance(getattr(model.blocks[-1], "attn", None), Attention)
    ):
        raise SettingError(f"timm's {name} is {_NO_TRANSFORMER}")
    return model


def _recipe_of(name: str) -> tuple[str, dict[str, Any]]:
    """The name and arguments that timm makes a network of, which it may read in a file."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        config = json.loads((Path(place) / "config.json").read_text())
        return config["architecture"], config.get("model_args") or {}
    if source == "hf-hub":
        _, architecture, arguments = timm.models.load_model_config_from_hf(place)
        return architecture, arguments or {}
    return name, {}


_NO_TRANSFORMER = (
    "no plain vision transformer: expected patches cut by one convolution and blocks with one "
    "attention layer each, such as vit_small_patch16_224.dino"
)


def _refusal(name: str, error: Exception) -> UserError:
    """Why timm could not make an encoder, in one sentence."""
    if name.startswith("local-dir:"):
        return MissingError(
            f"timm cannot load the folder {name.removeprefix('local-dir:')} "
            f"({type(error).__name__}): expected model.safetensors and config.json, as "
            "`semmae export --format timm` writes them"
        )
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        offered = timm.list_models(f"{architecture}.*", pretrained=True)
        if not offered or (tag and name not in offered):
            return SettingError(
                f"timm has no weights named {name!r}: expected "
                + (", ".join(offered[:6]) or "another network, it has none for this one")
            )
    elif ":" not in name:
        known = timm.list_models()
        close = difflib.get_close_matches(architecture, known, 3)
        hint = f"near it: {', '.join(close)}" if close else "timm.list_models('vit_*') names them"
        return SettingError(f"timm has no network named {name!r}; {hint}")
    return MissingError(
        f"the weights of timm:{name} cannot be had ({type(error).__name__}): expected a network "
        "connection to the hub, or the file in its cache; or name a checkpoint file instead"
    )


def build_encoder(
    state: Mapping[str, Any],
    name: str,
    heads: int | None = None,
    image_size: tuple[int, int] = (0, 0),
    reading: Reading = DEFAULT_READING,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> FrozenEncoder:
    """A frozen encoder from what a weight file holds, in any layout that `foreign` knows.

    Args:
        state: Content of the file.
        name: What to call it in records and errors.
        heads: As for `transformer_of`.
        image_size: Likewise.
        reading: Which blocks to read, and what of them.
        mean: Of the pixels in [0, 1] it was trained on.
        std: Likewise.

    Raises:
        SettingError: The file holds no vision transformer, or not the blocks of the reading, or
            its positions do not tell their grid.
        DamageError: Tensors are missing or do not fit.
    """
    model = transformer_of(state, name, heads, image_size)
    return FrozenEncoder(model, mean, std, name, reading)


def untrained(encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
    """The same network with fresh weights, to evaluate beside the trained one.

    Fixed sine-cosine positions stay, since they are no result of training.

    Args:
        encoder: The trained one; it stays as it is.
        seed: Of the weights, which are the same on every device.

    Returns:
        The fresh one, read as ``encoder`` is, on its device.
    """
    model = copy.deepcopy(encoder.transformer).cpu()
    positions = model.pos_embed.detach().clone()
    fixed = sincos_positions(encoder.width, model.patch_embed.grid_size)[:, -positions.shape[1] :]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # The init_weights of older timm leaves alone what can reset itself.
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.init_weights()
    if positions.shape == fixed.shape and torch.allclose(positions, fixed, atol=1e-5):
        model.pos_embed.data.copy_(fixed)
    mean, std = tuple(encoder.mean.tolist()), tuple(encoder.std.tolist())
    name = f"untrained {encoder.name}"
    fresh = FrozenEncoder(model, mean, std, name, encoder.reading, encoder.timm)
    return fresh.to(encoder.mean.device)
