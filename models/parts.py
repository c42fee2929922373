"""The part learner: which patch of an image belongs to which part (paper, section 3.1, figure 2).

Part tokens, made with the class token, are compared with the patch tokens of a frozen encoder; the
softmax over parts, blurred, is the attention map of each part.  The maps are trained so that the
image, or the encoder's features of it, can be rebuilt from them, under a diversity constraint.

Two variants of what the paper leaves open stay available by name:

- ``paper``: part tokens are linear in the class token, the maps rebuild pixels through the AdaIN
  decoder.  It segments each image well, but a part's id changes its meaning from image to image.
- ``anchored`` (default).  Deviation: a part token is a learned anchor, started from k-means over
  the data set, plus a small class-token term, and the maps rebuild the encoder's features from
  the mean feature of each part.  One id keeps one meaning.

Legend of shapes: B images, h w patches, L = h w, D width, P channels of the part map, N anchors,
C background clusters.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingError
from .decoder import PixelDecoder
from .encoders import Tokens


@dataclass(frozen=True, kw_only=True)
class PartArchitecture:
    """Shape of a part learner; enough to build it again.

    Attributes:
        width: D of the encoder.
        parts: Parts beside the background.
        variant: How part tokens are made and what is rebuilt; see the module.
        background: ``voted``: channel 0 is the background, voted for by clusters of patch tokens;
            ``token``: channel 0 is one more part token; ``none``: no channel is set apart.
        clusters: C, for ``voted``.
        class_share: Weight of the class-token term against the anchor, both of unit length.
        temperature: Of the softmax over parts of cosine similarities.
        blur: Standard deviation of the Gaussian blur of the maps, patches; 0 does not blur.
        pixel_decoder: Whether there is an AdaIN decoder to pixels.
        decoder_width: C of its first layer.
        decoder_noise: Per-layer noise in it.
        places: Places of the grid whose mean token is taken off each token there; 0 takes off one
            mean for all places.
    """

    width: int
    parts: int = 6
    variant: Literal["anchored", "paper"] = "anchored"
    background: Literal["voted", "token", "none"] = "voted"
    clusters: int = 24
    class_share: float = 0.2
    temperature: float = 0.1
    blur: float = 0.7
    pixel_decoder: bool = False
    decoder_width: int = 64
    decoder_noise: bool = False
    places: int = 0

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be.

        Raises:
            SettingError: A value is out of range.
        """
        if not 1 <= self.parts <= 250:
            raise SettingError(f"--num-parts is {self.parts}: expected 1 to 250")
        if self.background == "voted" and self.clusters < 2:
            raise SettingError(f"--clusters is {self.clusters}: expected 2 or more")
        if self.temperature <= 0 or self.blur < 0:
            raise SettingError(
                f"--temperature is {self.temperature} and --blur {self.blur}: "
                "expected above 0, and 0 or more"
            )

    @property
    def channels(self) -> int:
        """P: parts, and the background where there is one."""
        return self.parts + (self.background != "none")

    @property
    def tokens(self) -> int:
        """N: part tokens; the voted background has none."""
        return self.parts + (self.background == "token")

    def to_record(self) -> dict[str, Any]:
        """Plain data, for checkpoints."""
        return asdict(self)


class PartLearner(nn.Module):
    """Part tokens, their attention maps, and what is rebuilt from them.

    Buffers ``token_mean`` (D, or L x D where the mean of each place is taken off) and
    ``token_std`` (D) standardise patch tokens over the data set, ``class_mean`` and ``class_std``
    class tokens; ``centres`` (C, D) and ``is_object`` (C) hold the background vote.
    `stages.part_start` sets them, and the anchors, before training.

    Args:
        architecture: Shapes.
    """

    token_mean: Tensor
    token_std: Tensor
    class_mean: Tensor
    class_std: Tensor
    centres: Tensor
    is_object: Tensor
    kernel: Tensor

    def __init__(self, architecture: PartArchitecture) -> None:
        super().__init__()
        shape = self.architecture = architecture
        if shape.variant == "anchored":
            self.anchors = nn.Parameter(torch.randn(shape.tokens, shape.width))
        self.from_class = nn.Linear(shape.width, shape.tokens * shape.width, bias=False)
        nn.init.normal_(self.from_class.weight, std=shape.width**-0.5)
        self.decoder = (
            PixelDecoder(
                shape.channels, shape.width, shape.decoder_width, noise=shape.decoder_noise
            )
            if shape.pixel_decoder
            else None
        )
        for name in ("token", "class"):
            self.register_buffer(f"{name}_mean", torch.zeros(shape.width))
            self.register_buffer(f"{name}_std", torch.ones(shape.width))
        if shape.places:
            self.token_mean = torch.zeros(shape.places, shape.width)
        clusters = shape.clusters if shape.background == "voted" else 0
        self.register_buffer("centres", torch.zeros(clusters, shape.width))
        self.register_buffer("is_object", torch.zeros(clusters))
        self.register_buffer("kernel", _gaussian(shape.blur), persistent=False)

    def standardise(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, L, D) and class tokens (B, D), zero mean and unit variance each."""
        patches = (tokens.patches.float() - self.token_mean) / self.token_std
        return patches, (tokens.class_token.float() - self.class_mean) / self.class_std

    def part_tokens(self, style: Tensor) -> Tensor:
        """The part tokens of each image.

        Args:
            style: (B, D), standardised class tokens.

        Returns:
            (B, N, D).
        """
        shape = self.architecture
        made = self.from_class(style).view(-1, shape.tokens, shape.width)
        if shape.variant == "paper":
            return made  # type: ignore[no-any-return]
        return F.normalize(self.anchors, dim=-1) + shape.class_share * F.normalize(made, dim=-1)

    def maps(self, patches: Tensor, style: Tensor, grid: tuple[int, int]) -> Tensor:
        """The soft part maps.

        Args:
            patches: (B, L, D), standardised patch tokens.
            style: (B, D), standardised class tokens.
            grid: (h, w), with h w = L.

        Returns:
            (B, P, h, w), blurred, summing to 1 at each place; channel 0 is the background unless
            ``background`` is ``none``.
        """
        # The three digits of bf16 would tie parts, and the maps would not sum to 1.
        with torch.autocast(patches.device.type, enabled=False):
            queries = F.normalize(self.part_tokens(style.float()), dim=-1)
            similarity = queries @ F.normalize(patches.float(), dim=-1).transpose(1, 2)
            maps = (similarity / self.architecture.temperature).softmax(dim=1)
            if self.architecture.background == "voted":
                objects = self.object_mask(patches.float())[:, None]
                maps = torch.cat([1 - objects, maps * objects], dim=1)
            return self._blurred(maps.reshape(*maps.shape[:2], *grid))

    def object_mask(self, patches: Tensor) -> Tensor:
        """Which patches belong to an object, by the vote of their cluster.

        Args:
            patches: (B, L, D), standardised patch tokens.

        Returns:
            float (B, L), 1 on objects, 0 on background.
        """
        return self.is_object[torch.cdist(patches, self.centres).argmin(dim=-1)]

    def _blurred(self, maps: Tensor) -> Tensor:
        """Gaussian blur of each map; the border goes on outside, so that maps still sum to 1."""
        if len(self.kernel) == 1:
            return maps
        channels, reach = maps.shape[1], len(self.kernel) // 2
        row = self.kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        padded = F.pad(maps, (reach, reach, reach, reach), mode="replicate")
        blurred = F.conv2d(padded, row, groups=channels)
        return F.conv2d(blurred, row.transpose(2, 3), groups=channels)

    def forward(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        """Soft part maps (B, P, h, w) of an encoder's tokens."""
        patches, style = self.standardise(tokens)
        return self.maps(patches, style, grid)


def rebuilt_features(maps: Tensor, patches: Tensor) -> Tensor:
    """Each place rebuilt from the mean feature of each part in its image.

    Args:
        maps: (B, P, L), summing to 1 at each place.
        patches: (B, L, D).

    Returns:
        (B, L, D): the sum over parts of map times mean feature.
    """
    means = maps @ patches / maps.sum(dim=2, keepdim=True).clamp_min(1e-6)
    return maps.transpose(1, 2) @ means


def diversity(maps: Tensor) -> Tensor:
    """The diversity constraint L_d: parts attend to different places (paper, section 3.1).

    Ours: the paper does not give the formula.  This is the mean cosine between the blurred maps
    of two different parts, 0 where no two parts overlap, 1 where all are the same map.

    Args:
        maps: (B, P, L).

    Returns:
        (B,), in [0, 1].
    """
    unit = F.normalize(maps, dim=2)
    parts = maps.shape[1]
    cosines = unit @ unit.transpose(1, 2)
    off_diagonal = cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    return off_diagonal / max(parts * (parts - 1), 1)


def part_labels(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each patch and how sure it is.

    Args:
        maps: (B, P, h, w).

    Returns:
        uint8 (B, h, w), the argmax over parts, the lowest id where parts tie; and the margin
        float (B, h, w) in [0, 1], the largest map value less the second largest, if there is one.
    """
    labels = maps.argmax(dim=1).to(torch.uint8)
    largest = maps.topk(min(2, maps.shape[1]), dim=1).values
    margin = largest[:, 0] - largest[:, 1:].sum(dim=1)
    return labels, margin.clamp(0, 1)


def _gaussian(deviation: float) -> Tensor:
    """A one-dimensional Gaussian that sums to 1, cut at two deviations (at least one place)."""
    reach = max(int(2 * deviation + 0.5), 1) if deviation > 0 else 0
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (places / max(deviation, 1e-6)) ** 2)
    return weights / weights.sum()
