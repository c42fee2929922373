"""The part learner: which patch of an image belongs to which part (paper, section 3.1, figure 2).

Part tokens, made with the class token, are compared with what the patch tokens of a frozen encoder
say; the softmax over parts, blurred, is the attention map of each part.  The maps are trained so
that the image, or the features of its patches, can be rebuilt from them, under a diversity
constraint.

Features of a patch are its token, or (ours, the default of ``anchored``) what `models.predictors`
reads from the tokens around: the places where content such as its own lies on objects or, in later
rounds, the parts that the round before found.  The blur goes over
patches that are alike; where there is an object mask it is part of that, of the features and of the
maps, and stays on each patch's side of the mask: alone, a patch says too little of its place.

What the paper leaves open stays available by name (`VARIANTS`).  Learned:

- ``anchored`` (default).  Deviation: a part token is a learned anchor, started from k-means over
  the data set, plus a small class-token term, and the maps rebuild the features from the mean
  feature of each part.  One id keeps one meaning.
- ``paper``: part tokens are linear in the class token, the maps rebuild pixels through the AdaIN
  decoder.  It segments each image well, but a part's id changes its meaning from image to image.

Baselines, with nothing to train: ``kmeans`` over the data set, ``image-kmeans`` of the tokens and
``colour`` regions inside each image, the raw class-token ``attention`` of each head, and a fixed
``grid``.  All variants share background, blur and labels.

Legend of shapes: B images, h w patches, L = h w, D width, S width of the class token, F width of
features, P channels of the part map, N parts that are told apart by the variant, C background
clusters.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingError
from .blur import affinities, within
from .decoder import PixelDecoder
from .encoders import Tokens
from .looks import refined
from .part_scores import (
    AnchoredTokens,
    Attending,
    AttentionHeads,
    ClassTokens,
    GridCells,
    ImageCentres,
    Patches,
    SetCentres,
)
from .places import CELLS, PlacePredictor
from .predictors import PartPredictor, PatchPredictor, Told

Variant = Literal["anchored", "paper", "kmeans", "image-kmeans", "colour", "attention", "grid"]

LEARNED: tuple[Variant, ...] = ("anchored", "paper")
"""Variants that are trained; the others are ready once they are started."""


@dataclass(frozen=True, kw_only=True)
class PartArchitecture:
    """Shape of a part learner; enough to build it again.

    Attributes:
        width: D.
        style_width: S; 0 for D.
        parts: Parts beside the background; for ``attention`` the encoder's heads.
        variant: How parts are told apart; see the module.
        background: ``predicted``: channel 0 is the background, as `models.predictors` predict it;
            ``voted``: it is voted for by clusters of patch tokens; ``token``: channel 0 is one
            more part token; ``none``: no channel is set apart.
        clusters: C, for ``voted``, and for the vote that ``predicted`` is learned from.
        look_rounds: Rounds in which patches also go by how parts look in their image; see `looks`.
        look_temperature: Of the distances there.
        class_share: Weight of the class-token term against the anchor, both of unit length.
        temperature: Of the softmax over parts.
        similarity: Of part tokens and features; see `part_scores.Attending`.
        normalisation: Of the part tokens' attention; see there.
        blur: Standard deviation of the blur, patches; 0 does not blur.
        affinity: Temperature of the cosines of patch tokens that the blur goes by, too; 0 blurs by
            distance alone.
        pixel_decoder: Whether there is an AdaIN decoder to pixels.
        decoder_width: C of its first layer.
        decoder_upsamplings: Doublings of the resolution in it: its image has two to that power
            pixels a patch.
        decoder_noise: Per-layer noise in it.
        places: Places of the grid whose mean token is taken off each token there; 0 takes off one
            mean for all places.
        grid_places: L of learners of one grid, ``grid`` and those with a predictor; else 0.
        predictor: What patches are asked for: nothing, their places on objects, or in later rounds
            their parts.
        place_cells: Cells a side of the places.
        told_by: Whether parts are told by what is predicted, or by the tokens themselves.
    """

    width: int
    style_width: int = 0
    parts: int = 6
    variant: Variant = "anchored"
    background: Literal["predicted", "voted", "token", "none"] = "voted"
    clusters: int = 128
    look_rounds: int = 0
    look_temperature: float = 0.05
    class_share: float = 0.2
    temperature: float = 0.1
    similarity: Literal["cosine", "dot"] = "cosine"
    normalisation: Literal["parts", "places"] = "parts"
    blur: float = 1.5
    affinity: float = 0.3
    pixel_decoder: bool = False
    decoder_width: int = 64
    decoder_upsamplings: int = 2
    decoder_noise: bool = False
    places: int = 0
    grid_places: int = 0
    predictor: Literal["none", "places", "parts"] = "none"
    place_cells: int = CELLS
    told_by: Literal["predictor", "tokens"] = "tokens"

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be.

        Raises:
            SettingError: A value is out of range.
        """
        if not 1 <= self.parts <= 250:
            raise SettingError(f"--num-parts is {self.parts}: expected 1 to 250")
        if self.masked and self.clusters < 2:
            raise SettingError(f"--clusters is {self.clusters}: expected 2 or more")
        if self.temperature <= 0 or min(self.blur, self.affinity) < 0:
            raise SettingError(
                f"--temperature is {self.temperature}, --blur {self.blur} and --affinity "
                f"{self.affinity}: expected above 0, 0 or more, and 0 or more"
            )
        if self.look_rounds < 0 or self.look_temperature <= 0:
            raise SettingError(
                f"--look-rounds is {self.look_rounds} and --look-temperature "
                f"{self.look_temperature}: expected 0 or more, and above 0"
            )
        if self.background == "token" and self.variant not in LEARNED:
            raise SettingError(
                f"--background token is one more part token, and --variant {self.variant} has "
                "none: expected predicted, voted or none"
            )

    @property
    def channels(self) -> int:
        """P: parts, and the background where there is one."""
        return self.parts + (self.background != "none")

    @property
    def tokens(self) -> int:
        """N; a voted or predicted background is none of them."""
        return self.parts + (self.background == "token")

    @property
    def feature_width(self) -> int:
        """F, channels of what parts are told by."""
        if self.told_by == "tokens":
            return self.width
        return self.parts if self.predictor == "parts" else self.place_cells**2 // 2

    @property
    def masked(self) -> bool:
        """Whether there is an object mask before there are parts."""
        return self.background in ("predicted", "voted")

    def to_record(self) -> dict[str, Any]:
        """Plain data, for checkpoints."""
        return asdict(self)


def _scores(shape: PartArchitecture, style_width: int) -> nn.Module:
    parts, width = shape.tokens, shape.feature_width
    attending = Attending(shape.temperature, shape.similarity, shape.normalisation)
    if shape.variant == "anchored":
        return AnchoredTokens(parts, width, style_width, shape.class_share, attending)
    if shape.variant == "paper":
        return ClassTokens(parts, width, style_width, attending)
    if shape.variant == "kmeans":
        return SetCentres(parts, width, shape.temperature)
    if shape.variant == "attention":
        return AttentionHeads()
    if shape.variant == "grid":
        return GridCells(parts, shape.grid_places)
    return ImageCentres(parts, colours=shape.variant == "colour")


def _predictor(shape: PartArchitecture) -> PatchPredictor | None:
    if shape.predictor == "none":
        return None
    if shape.predictor == "parts":
        return PartPredictor(shape.width, shape.parts, shape.grid_places)
    return PlacePredictor(shape.width, shape.place_cells, shape.grid_places)


class PartLearner(nn.Module):
    """Part maps of a frozen encoder's tokens, and what is rebuilt from them.

    Buffers ``token_mean`` (D, or L x D where the mean of each place is taken off) and
    ``token_std`` (D) standardise patch tokens over the data set, ``class_mean`` and ``class_std``
    (S) class tokens; ``centres`` (C, D) and ``objectness`` (C) hold the background vote.
    `stages.part_start` sets them, and where the variant begins, before training.

    Args:
        architecture: Shapes.
    """

    token_mean: Tensor
    token_std: Tensor
    class_mean: Tensor
    class_std: Tensor
    centres: Tensor
    objectness: Tensor

    def __init__(self, architecture: PartArchitecture) -> None:
        super().__init__()
        shape = self.architecture = architecture
        style_width = shape.style_width or shape.width
        self.scores = _scores(shape, style_width)
        self.predictor = _predictor(shape)
        if self.predictor is not None:
            self.predictor.requires_grad_(False)
        self.decoder = (
            PixelDecoder(
                shape.channels,
                style_width,
                shape.decoder_width,
                shape.decoder_upsamplings,
                shape.decoder_noise,
            )
            if shape.pixel_decoder
            else None
        )
        for name, width in (("token", shape.width), ("class", style_width)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        if shape.places:
            self.token_mean = torch.zeros(shape.places, shape.width)
        clusters = shape.clusters if shape.background == "voted" else 0
        self.register_buffer("centres", torch.zeros(clusters, shape.width))
        self.register_buffer("objectness", torch.zeros(clusters))

    def patches(
        self,
        tokens: Tokens,
        grid: tuple[int, int],
        colours: Tensor | None = None,
        told: Told | None = None,
    ) -> Patches:
        """What parts are told from: features of zero mean and unit variance, and the object mask.

        Args:
            tokens: Of the encoder.
            grid: (h, w), with h w = L.
            colours: (B, L, 3), from `patch_colours`; needed by the variant ``colour`` alone.
            told: What these tokens tell of themselves, where that is known already.
        """
        # The three digits of bf16 would tie parts, and the maps would not sum to 1.
        with torch.autocast(tokens.patches.device.type, enabled=False):
            shape, standard = self.architecture, self.standardised(tokens)
            if told is None and self.predictor is not None:
                told = self.predictor.told(tokens.patches, grid)
            alike = affinities(standard, grid, shape.blur, shape.affinity) if shape.blur else None
            objects = self._objects(standard, told, alike)
            if shape.masked and alike is not None:
                alike = within(alike, objects)
            return Patches(
                self._features(standard, told, alike),
                (tokens.class_token.float() - self.class_mean) / self.class_std,
                tokens.attention.float(),
                objects,
                alike,
                colours,
                _blurred(standard, alike) if shape.look_rounds else None,
            )

    def _features(self, standard: Tensor, told: Told | None, alike: Tensor | None) -> Tensor:
        """What parts are told by, (B, L, F), blurred where there is an object mask."""
        if not self.architecture.masked:
            alike = None
        if self.architecture.told_by == "tokens":
            return _blurred(standard, alike)
        assert self.predictor is not None
        assert told is not None
        return self.predictor.features(_blurred(told.shares, alike))

    def standardised(self, tokens: Tokens) -> Tensor:
        """Patch tokens (B, L, D) of zero mean and unit variance over the data set."""
        return (tokens.patches.float() - self.token_mean) / self.token_std

    def maps(self, patches: Patches, grid: tuple[int, int]) -> Tensor:
        """The soft part maps.

        Args:
            patches: What `patches` gives.
            grid: (h, w), with h w = L.

        Returns:
            (B, P, h, w), blurred, summing to 1 at each place; channel 0 is the background unless
            ``background`` is ``none``.
        """
        with torch.autocast(patches.features.device.type, enabled=False):
            shape, maps = self.architecture, self.scores(patches)
            if shape.look_rounds:
                assert patches.looks is not None
                maps = refined(
                    maps,
                    patches.looks,
                    patches.objects,
                    patches.alike,
                    shape.look_rounds,
                    shape.look_temperature,
                )
            if shape.masked:
                objects = patches.objects[:, None]
                maps = torch.cat([1 - objects, maps * objects], dim=1)
            if patches.alike is not None:
                maps = maps @ patches.alike.transpose(1, 2)
            return maps.unflatten(2, grid)  # type: ignore[no-any-return]

    def _objects(self, standard: Tensor, told: Told | None, alike: Tensor | None) -> Tensor:
        """Which patches belong to an object, by what they and others like them say, (B, L).

        1 on objects, 0 on background; all 1 where no mask is made.
        """
        if self.architecture.background == "predicted":
            assert told is not None
            votes = 0.5 - told.background
        elif self.architecture.background == "voted":
            votes = self.objectness[torch.cdist(standard, self.centres).argmin(dim=-1)]
        else:
            return standard.new_ones(standard.shape[:2])
        return (_blurred(votes[..., None], alike)[..., 0] > 0).to(standard.dtype)

    def forward(
        self, tokens: Tokens, grid: tuple[int, int], images: Tensor | None = None
    ) -> Tensor:
        """Soft part maps (B, P, h, w) of an encoder's tokens of the images uint8 (B, H, W, 3)."""
        colours = None if images is None else patch_colours(images, grid)
        return self.maps(self.patches(tokens, grid, colours), grid)


def _blurred(values: Tensor, alike: Tensor | None) -> Tensor:
    """Values of patches (B, L, ...), blurred by the weights (B, L, L) if there are any."""
    return values if alike is None else alike @ values


def patch_colours(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean colour of each patch, (B, L, 3), 0 to 255, of images uint8 (B, H, W, 3)."""
    pixels = images.permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(pixels, grid).flatten(2).transpose(1, 2)


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
