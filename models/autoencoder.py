"""The masked autoencoder (MAE; He et al., CVPR 2022) that stage 2 pretrains.

Legend of shapes: B images, L patches, V visible ones, K = L - V masked ones, D width, p patch size.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import SettingError
from .vision import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise,
    patchify,
    sincos_positions,
    unpatchify,
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of a masked autoencoder; enough to build it again.

    Attributes:
        image_size: Pixels down and across, multiples of ``patch_size``.
        patch_size: p, pixels.
        width, depth, heads: Of the encoder.
        decoder_width, decoder_depth, decoder_heads: Of the decoder.
    """

    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit.

        Raises:
            SettingError: A number is below 1, the image is no multiple of the patch, or a width is
                none of its heads.
        """
        for name in ("patch_size", "depth", "heads", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}: expected 1 or more")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size or min(height, width) <= 0:
            raise SettingError(
                f"--image-size is {height} x {width}: expected multiples of --patch-size "
                f"{self.patch_size}"
            )
        for name in ("width", "decoder_width"):
            heads = self.heads if name == "width" else self.decoder_heads
            value = getattr(self, name)
            if value % heads or value % 4 or value < 1:
                raise SettingError(f"{name} is {value}: expected a multiple of 4 and of {heads}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def to_record(self) -> dict[str, Any]:
        """Plain data, for checkpoints."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @staticmethod
    def from_record(record: dict[str, Any]) -> "Architecture":
        """Undo `to_record`."""
        return Architecture(**{**record, "image_size": tuple(record["image_size"])})


SIZES: dict[str, dict[str, int]] = {
    "micro": {
        "width": 128,
        "depth": 6,
        "heads": 4,
        "decoder_width": 96,
        "decoder_depth": 2,
        "decoder_heads": 4,
    },
    "tiny": {
        "width": 192,
        "depth": 12,
        "heads": 3,
        "decoder_width": 128,
        "decoder_depth": 4,
        "decoder_heads": 4,
    },
    "small": {
        "width": 384,
        "depth": 12,
        "heads": 6,
        "decoder_width": 256,
        "decoder_depth": 8,
        "decoder_heads": 8,
    },
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}
"""Encoders by name; base, large and huge with MAE's decoder (512 wide, 8 deep, 16 heads).

Ours: MAE names nothing below base; the smaller decoders keep its share of the encoder's cost.
"""


class DecoderBlock(Block):  # type: ignore[misc]
    """timm's block, which can be asked for some of the tokens only."""

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """What becomes of the tokens from ``start`` on, which attend to all.

        Nothing else is computed, where ``start`` is above 0: of the last block of a decoder only
        the masked patches are asked.

        Args:
            tokens: (B, N, D).
            start: First token wanted.

        Returns:
            (B, N - start, D).
        """
        if not start:
            return super().forward(tokens)  # type: ignore[no-any-return]
        attention, normed = self.attn, self.norm1(tokens)
        weights, biases = attention.qkv.weight, attention.qkv.bias
        width = tokens.shape[2]
        queries = F.linear(normed[:, start:], weights[:width], biases[:width])
        both = F.linear(normed, weights[width:], biases[width:])
        batch, heads, deep = len(tokens), attention.num_heads, attention.head_dim
        keys, values = both.reshape(batch, -1, 2, heads, deep).permute(2, 0, 3, 1, 4)
        queries = queries.reshape(batch, -1, heads, deep).transpose(1, 2)
        if attention.fused_attn:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        else:
            mixed = (queries * attention.scale @ keys.transpose(2, 3)).softmax(dim=3) @ values
        made = tokens[:, start:] + attention.proj(mixed.transpose(1, 2).flatten(2))
        return made + self.mlp(self.norm2(made))  # type: ignore[no-any-return]


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all, loss on the masked ones.

    ``encoder`` is a timm ``VisionTransformer``, so its parameters have timm's names; the decoder's
    have MAE's.  Positions are fixed sine-cosine codes.

    Args:
        architecture: Shapes.
        normalise_target: Rebuild each patch relative to its own mean and standard deviation (MAE,
            section 4.2), else plain normalised pixels.

    Attributes:
        recomputes: Whether blocks keep nothing but their inputs for the backward pass, and compute
            the rest again: a third more time for a fraction of the memory.
    """

    recomputes = False

    mean: Tensor
    std: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, architecture: Architecture, normalise_target: bool = True) -> None:
        super().__init__()
        shape = self.architecture = architecture
        self.normalise_target = normalise_target
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.encoder = VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
            norm_layer=norm,
        )
        self.decoder_embed = nn.Linear(shape.width, shape.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(shape.decoder_width, shape.decoder_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = norm(shape.decoder_width)
        self.decoder_pred = nn.Linear(shape.decoder_width, shape.patch_size**2 * 3)
        self.register_buffer(
            "decoder_pos_embed",
            sincos_positions(shape.decoder_width, shape.grid),
            persistent=False,
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Weights as MAE starts them: Xavier for matrices, 0.02 for tokens, fixed positions."""
        self.apply(_initialise_linear)
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.data.flatten(1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        shape = self.architecture
        self.encoder.pos_embed.data.copy_(sincos_positions(shape.width, shape.grid))
        self.encoder.pos_embed.requires_grad_(False)

    def encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """Encode the visible patches only.

        Args:
            patches: float32 (B, L, p * p * 3), from `patchify` of normalised pixels.
            visible: int64 (B, V), indices of the visible patches.

        Returns:
            (B, 1 + V, D): class token, then the visible patches in the order of ``visible``.
        """
        encoder = self.encoder
        projection = encoder.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = F.linear(_take(patches, visible), weight, projection.bias)
        positions = encoder.pos_embed.expand(len(patches), -1, -1)
        tokens = tokens + _take(positions[:, 1:], visible)
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        for block in encoder.blocks:
            tokens = self._through(block, tokens)
        return encoder.norm(tokens)  # type: ignore[no-any-return]

    def _through(self, block: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            made: Tensor = checkpoint(block, tokens, use_reentrant=False)
            return made
        return block(tokens)

    def decode(self, tokens: Tensor, order: Tensor, visible: int) -> Tensor:
        """Predict the pixels of the masked patches.

        Args:
            tokens: (B, 1 + V, D), from `encode`.
            order: int64 (B, L), the visible patches' indices, then those of the masked ones to
                predict, of which some may be left out.
            visible: V.

        Returns:
            (B, K, p * p * 3), in the order of ``order[:, V:]``.
        """
        tokens = self.decoder_embed(tokens)
        batch, patches = order.shape
        masked = self.mask_token.to(tokens.dtype).expand(batch, patches - visible, -1)
        positions = self.decoder_pos_embed.expand(batch, -1, -1)
        # Attention does not care for order: the patches stay as they come, with their positions.
        tokens = torch.cat([tokens, masked], dim=1) + torch.cat(
            [positions[:, :1], _take(positions[:, 1:], order)], dim=1
        )
        *blocks, last = self.decoder_blocks
        for block in blocks:
            tokens = self._through(block, tokens)
        tokens = self._through(partial(last, start=1 + visible), tokens)
        return self.decoder_pred(self.decoder_norm(tokens))  # type: ignore[no-any-return]

    def target(self, patches: Tensor) -> Tensor:
        """What is to be predicted of patches (B, L, p * p * 3)."""
        if not self.normalise_target:
            return patches
        mean = patches.mean(dim=-1, keepdim=True)
        return (patches - mean) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()

    def forward(
        self, images: Tensor, mask: Tensor, visible: int, predicted: Tensor | None = None
    ) -> Tensor:
        """The loss of each image, float32 (B,): the mean of `patch_losses`."""
        return self.patch_losses(images, mask, visible, predicted)[0].mean(dim=1)

    def patch_losses(
        self, images: Tensor, mask: Tensor, visible: int, predicted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of each predicted patch.

        Args:
            images: uint8 (B, H, W, 3), RGB.
            mask: bool (B, L), True where masked; every row leaves exactly ``visible`` patches.
            visible: V.
            predicted: Which of each image's masked patches the decoder sees and predicts, int64
                (B, K) of places among them; None is all.  What is left out costs
                nothing: with patches of 8 pixels and a fourth of them predicted, the decoder's
                sequence is 344 instead of 785 tokens.

        Returns:
            float32 (B, K): squared error, mean over a patch's pixels; and int64 (B, K), which
            patches these are.
        """
        self._choose_attention(images.device.type)
        patches, order = self._prepare(images, mask)
        if predicted is not None:
            chosen = order[:, visible:].gather(1, predicted)
            order = torch.cat([order[:, :visible], chosen], dim=1)
        made = self.decode(self.encode(patches, order[:, :visible]), order, visible)
        target = self.target(_take(patches, order[:, visible:]))
        return (made.float() - target).square().mean(dim=2), order[:, visible:]

    def _choose_attention(self, device_type: str) -> None:
        """Take the faster of timm's two ways: the plain one in bfloat16 on CPUs, else the fused.

        Of a step of ViT-B/16 the fused one takes 20 % there, the plain one 8 %
        (``benchmarks/pretraining_step.py --precision bf16``).  GPUs are given the fused one.
        """
        fused = device_type != "cpu" or not torch.is_autocast_enabled("cpu")
        for block in [*self.encoder.blocks, *self.decoder_blocks]:
            block.attn.fused_attn = fused

    def _prepare(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        patches = patchify(normalise(images, self.mean, self.std), self.architecture.patch_size)
        return patches, mask.byte().argsort(dim=1, stable=True)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor, visible: int) -> Tensor:
        """Images whose masked patches are the prediction, for pictures.

        Args:
            images: As for `forward`.
            mask: As for `forward`.
            visible: V.

        Returns:
            float32 (B, H, W, 3) in [0, 1].  With a normalised target the true patch's mean and
            deviation are put back, since the model does not predict them.
        """
        patches, order = self._prepare(images, mask)
        predicted = self.decode(self.encode(patches, order[:, :visible]), order, visible).float()
        masked = order[:, visible:]
        if self.normalise_target:
            true = _take(patches, masked)
            deviation = (true.var(dim=-1, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * deviation + true.mean(dim=-1, keepdim=True)
        index = masked[..., None].expand(-1, -1, patches.shape[2])
        pixels = unpatchify(patches.scatter(1, index, predicted), self.architecture.grid)
        pixels = pixels * self.std.view(3, 1, 1) + self.mean.view(3, 1, 1)
        return pixels.clamp(0, 1).permute(0, 2, 3, 1)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (B, N, D) of tokens (B, L, D) by index (B, N)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _initialise_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
