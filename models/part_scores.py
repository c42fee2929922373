"""How much each patch belongs to each part: the part tokens, and the baselines beside them.

Each variant is a module of one call, from what is known of a batch (`Patches`) to shares that sum
to 1 over parts at each place.  Background, blur and labels are `models.parts`', the same for all,
so that variants differ in nothing else.

Legend of shapes: B images, L patches, D width of features (in `Patches.looks` of patch tokens), S
of class tokens, A attention heads, N parts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STARTS = 4
"""Starts of the k-means inside an image; the one of least spread is kept."""

ROUNDS = 12
"""Rounds of Lloyd's algorithm inside an image."""


@dataclass(frozen=True)
class Patches:
    """What parts are told from.

    Attributes:
        features: (B, L, D), standardised: patch tokens, or the places or parts that they tell;
            blurred where there is an object mask.
        style: (B, S), standardised class tokens.
        attention: (B, A, L), the class token's attention, by head.
        objects: (B, L), 1 on objects, 0 on background.
        alike: (B, L, L), the blur's weights, rows sum to 1; None where nothing is blurred.
        colours: (B, L, 3), mean RGB of each patch, 0 to 255; None where no image was given.
        looks: (B, L, D), blurred standardised tokens; None where parts do not go by them.
    """

    features: Tensor
    style: Tensor
    attention: Tensor
    objects: Tensor
    alike: Tensor | None = None
    colours: Tensor | None = None
    looks: Tensor | None = None


@dataclass(frozen=True)
class Attending:
    """How part tokens and features of patches make shares (paper, figure 2).

    The paper leaves each of these open.

    Attributes:
        temperature: Of the softmax.
        similarity: ``cosine`` of token and feature, or their ``dot`` product over the root of D.
        normalisation: Over ``parts``, where the parts compete for each patch; or over ``places``,
            as attention is normalised elsewhere: each part has the same to give to the patches of
            objects, so that none owns most of them, and parts share a patch by what each gives it.
    """

    temperature: float
    similarity: Literal["cosine", "dot"] = "cosine"
    normalisation: Literal["parts", "places"] = "parts"

    def shares(self, tokens: Tensor, patches: Patches) -> Tensor:
        """Shares (B, N, L) of part tokens (B, N, D)."""
        features = patches.features
        if self.similarity == "cosine":
            tokens, features = F.normalize(tokens, dim=-1), F.normalize(features, dim=-1)
        else:
            tokens = tokens / features.shape[2] ** 0.5
        scores = tokens @ features.transpose(1, 2) / self.temperature
        if self.normalisation == "places":
            of_objects = scores + patches.objects[:, None].clamp_min(1e-6).log()
            scores = scores - of_objects.logsumexp(dim=2, keepdim=True)
        return scores.softmax(dim=1)


class AnchoredTokens(nn.Module):
    """Part tokens with a learned anchor each, and a small term from the class token.

    Deviation: the paper embeds the class token alone.  Anchored, an id keeps its meaning from image
    to image.

    Args:
        parts: N.
        width: D.
        style_width: S.
        class_share: Weight of the class-token term against the anchor, both of unit length.
        attending: How tokens and features make shares.
    """

    def __init__(
        self, parts: int, width: int, style_width: int, class_share: float, attending: Attending
    ) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(parts, width))
        self.from_class = _embedding(parts, width, style_width)
        self._share, self._attending = class_share, attending

    def tokens(self, style: Tensor) -> Tensor:
        """Part tokens (B, N, D) of standardised class tokens (B, S)."""
        made = self.from_class(style).unflatten(1, self.anchors.shape)
        return F.normalize(self.anchors, dim=-1) + self._share * F.normalize(made, dim=-1)

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, N, L)."""
        return self._attending.shares(self.tokens(patches.style), patches)


class ClassTokens(nn.Module):
    """Part tokens embedded from the class token (paper, section 3.1).

    Args:
        parts: N.
        width: D.
        style_width: S.
        attending: How tokens and features make shares.
    """

    def __init__(self, parts: int, width: int, style_width: int, attending: Attending) -> None:
        super().__init__()
        self.from_class = _embedding(parts, width, style_width)
        self._shape, self._attending = (parts, width), attending

    def tokens(self, style: Tensor) -> Tensor:
        """Part tokens (B, N, D) of standardised class tokens (B, S)."""
        return self.from_class(style).unflatten(1, self._shape)  # type: ignore[no-any-return]

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, N, L)."""
        return self._attending.shares(self.tokens(patches.style), patches)


def _embedding(parts: int, width: int, style_width: int) -> nn.Linear:
    made = nn.Linear(style_width, parts * width, bias=False)
    nn.init.normal_(made.weight, std=style_width**-0.5)
    return made


class SetCentres(nn.Module):
    """k-means over the data set: the comparator of the learned variants, softened like them.

    Args:
        parts: N.
        width: D.
        temperature: Of the softmax over parts of half the mean squared distance.
    """

    centres: Tensor

    def __init__(self, parts: int, width: int, temperature: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(parts, width))
        self._temperature = temperature

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, N, L)."""
        apart = torch.cdist(patches.features, self.centres).square() / patches.features.shape[2]
        return (-apart / (2 * self._temperature)).softmax(dim=2).transpose(1, 2)


class ImageCentres(nn.Module):
    """k-means inside each image, of patch tokens or of patch colours; ids mean nothing beyond it.

    Parts are ordered by area, the largest first.  Background patches take no part.

    Args:
        parts: N.
        colours: Of the patches' mean colours, instead of their tokens.
    """

    def __init__(self, parts: int, colours: bool) -> None:
        super().__init__()
        self._parts, self._colours = parts, colours

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, N, L), each 0 or 1."""
        points = patches.features
        if self._colours:
            assert patches.colours is not None, "colour regions need the images"
            points = patches.colours
        labels = kmeans_inside_images(points, patches.objects, self._parts)
        return F.one_hot(labels, self._parts).transpose(1, 2).to(points.dtype)


def kmeans_inside_images(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """k-means of the points of each image on its own.

    It starts from `STARTS` random choices of places, the same in every run and for every image.

    Args:
        points: (B, L, F).
        weights: (B, L), 0 for points that centres are not made of.
        clusters: N.

    Returns:
        int64 (B, L): the cluster of each point, by falling total weight; ties and clusters
        without weight come in the order of the start.
    """
    batch, count, _ = points.shape
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(STARTS)])
    best_spread = points.new_full((batch,), torch.inf)
    best = torch.zeros(batch, count, dtype=torch.long, device=points.device)
    for order in orders.to(points.device):
        # Points with weight first, in the random order.
        chosen = order[weights[:, order].argsort(dim=1, descending=True, stable=True)]
        first = chosen[:, :clusters, None].expand(-1, -1, points.shape[2])
        labels, spread = _lloyd(points, weights, points.gather(1, first))
        better = spread < best_spread
        best_spread = torch.where(better, spread, best_spread)
        best = torch.where(better[:, None], labels, best)
    sizes = (F.one_hot(best, clusters) * weights[..., None]).sum(dim=1)
    ranks = sizes.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks.gather(1, best)


def _lloyd(points: Tensor, weights: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, L) and weighted spread (B,) after `ROUNDS` rounds from the given centres."""
    clusters = centres.shape[1]
    if clusters < 1:
        raise ValueError("k-means needs a centre")
    for _ in range(ROUNDS):
        labels = torch.cdist(points, centres).argmin(dim=2)
        member = F.one_hot(labels, clusters).to(points.dtype) * weights[..., None]
        total = member.sum(dim=1)[..., None]
        means = member.transpose(1, 2) @ points / total.clamp_min(1e-6)
        centres = torch.where(total > 0, means, centres)
    apart = torch.cdist(points, centres)
    spread = (apart.amin(dim=2).square() * weights).sum(dim=1)
    return apart.argmin(dim=2), spread


class AttentionHeads(nn.Module):
    """The class token's attention in the encoder's last block: a part a head, nothing learned.

    The paper's comparison of raw iBOT attention with learned parts (table 4).
    """

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, A, L)."""
        return patches.attention / patches.attention.sum(dim=1, keepdim=True).clamp_min(1e-12)


class GridCells(nn.Module):
    """Cells of a fixed grid: parts that know nothing but place.

    Args:
        parts: N.
        places: L.
    """

    cells: Tensor

    def __init__(self, parts: int, places: int) -> None:
        super().__init__()
        self._parts = parts
        self.register_buffer("cells", torch.zeros(places, dtype=torch.long))

    def forward(self, patches: Patches) -> Tensor:
        """Shares (B, N, L), each 0 or 1, the same in every image."""
        shares = F.one_hot(self.cells, self._parts).T.to(patches.features.dtype)
        return shares.expand(len(patches.features), -1, -1)
