"""Where a part learner begins: token statistics, the background vote, anchors from k-means."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from ..errors import SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.part_scores import AnchoredTokens, GridCells, SetCentres
from ..models.parts import LEARNED, PartArchitecture, PartLearner
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .evals.metrics import fixed_grid

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions

TOKENS_FOR_CLUSTERS = 60_000
"""Patch tokens that the k-means starts are made from, at most."""

OBJECT_SHARE = (0.1, 0.6)
"""Least and largest share of patches that a background vote may call object; outside it the vote
found something else, and parts are learned without it."""


LEAST_AGREEMENT = 0.3
"""Least correlation, over clusters, of attention and absence from the border, for both to vote."""

AWAY_FROM_BORDER = 0.8
"""Share of a cluster's patches on the border, over that of all patches, below which the border
alone calls it object."""

POSITION_SHARE = 0.5
"""Share of the tokens' variance that place may explain before parts would be places."""


@torch.no_grad()
def sample_tokens(
    encoder: FrozenEncoder, images: ImageSource, size: tuple[int, int], count: int, seed: int
) -> Tokens:
    """Tokens of some images, drawn without replacement, on the CPU in float32."""
    chosen = drawn(len(images), count, seed)
    made: list[Tokens] = []
    device = encoder.mean.device
    with Progress("reading tokens", len(chosen), "image") as progress:
        for _, pixels in batches_in_order(images, size, 64, "squash", chosen):
            tokens = encoder(torch.from_numpy(pixels).to(device))
            made.append(tokens.each(lambda part: part.float().cpu()))
            progress.update(len(pixels))
    if not made:
        raise SettingError(
            f"not one image of {images.plan.root} can be read: nothing to learn from"
        )
    return Tokens.joined(made)


def vote_for_objects(
    assigned: NDArray[np.int64],
    attention: NDArray[np.float32],
    grid: tuple[int, int],
    clusters: int,
) -> NDArray[np.bool_]:
    """Which clusters of patch tokens are object, without labels.

    Ours.  A cluster is object if the class token attends to it more than to the average patch by
    more than it lies on the border of the image more than the average patch does.  Where the
    attended clusters are not those away from the border, as with a class token that was never
    trained, the border alone votes.

    Args:
        assigned: Cluster of each patch, (B, L).
        attention: The class token's attention to each patch, mean over heads, (B, L).
        grid: (h, w).
        clusters: C.

    Returns:
        bool (C,).
    """
    rows, columns = np.divmod(np.arange(assigned.shape[1]), grid[1])
    border = (rows == 0) | (rows == grid[0] - 1) | (columns == 0) | (columns == grid[1] - 1)
    relative = attention / attention.mean(axis=1, keepdims=True)
    counts = np.maximum(np.bincount(assigned.ravel(), minlength=clusters), 1)
    attended = np.bincount(assigned.ravel(), relative.ravel(), clusters) / counts
    at_border = np.broadcast_to(border, assigned.shape).ravel()
    bordering = np.bincount(assigned.ravel(), at_border, clusters) / counts / border.mean()
    if _correlation(attended, bordering, counts) < -LEAST_AGREEMENT:
        return np.asarray(attended > bordering)
    print(
        "the class token's attention has nothing to do with what lies away from the border: the "
        "border alone votes for the background",
        file=sys.stderr,
    )
    return np.asarray(bordering < AWAY_FROM_BORDER)


def _correlation(
    first: NDArray[np.float64], second: NDArray[np.float64], weights: NDArray[np.integer]
) -> float:
    """Of two figures of each cluster, weighted; 0 where one does not vary."""
    covariance = np.cov(first, second, aweights=weights)
    spread = float(np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return float(covariance[0, 1]) / spread if spread else 0.0


def started_learner(
    tokens: Tokens, grid: tuple[int, int], options: "LearnPartsOptions"
) -> PartLearner:
    """A learner at its start: token statistics, background vote, anchors from k-means.

    Args:
        tokens: Of a sample of the data.
        grid: (h, w).
        options: The learner's settings.

    Raises:
        SettingError: There are fewer patches than clusters.
    """
    patches, width = tokens.patches, tokens.patches.shape[2]
    mean = patches.mean(dim=(0, 1))
    if _positions_go(patches, options):
        mean = patches.mean(dim=0)
    std = (patches - mean).flatten(0, 1).std(0) + 1e-6
    standard = ((patches - mean) / std).numpy()
    vote = _voted(standard, tokens, grid, options) if options.background_kind == "voted" else None
    background = options.background_kind
    if background == "voted" and vote is None:
        background = "none"
    learner = _shaped(tokens, mean, background, options)
    learner.token_mean.copy_(mean)
    learner.token_std.copy_(std)
    learner.class_mean.copy_(tokens.class_token.mean(0))
    learner.class_std.copy_(tokens.class_token.std(0, correction=0) + 1e-6)
    of_parts = standard.reshape(-1, width)
    if vote is not None:
        learner.centres.copy_(torch.from_numpy(vote.centres))
        learner.is_object.copy_(torch.from_numpy(vote.objects.astype(np.float32)))
        of_parts = standard[vote.objects[vote.assigned]]
    start_scores(learner, of_parts, grid, options.seed, options.part_order)
    return learner


@dataclass(frozen=True)
class _Vote:
    """Clusters of patch tokens (C, D), the cluster of each patch (B, L), which are object (C,)."""

    centres: NDArray[np.float32]
    assigned: NDArray[np.int64]
    objects: NDArray[np.bool_]


def _voted(
    standard: NDArray[np.float32],
    tokens: Tokens,
    grid: tuple[int, int],
    options: "LearnPartsOptions",
) -> _Vote | None:
    """The background vote; None where it found something else."""
    flat = standard.reshape(-1, standard.shape[2])
    kmeans = _cluster(flat, options.clusters, options.seed)
    assigned = kmeans.predict(flat).reshape(standard.shape[:2]).astype(np.int64)
    attention = tokens.attention.mean(dim=1).numpy()
    objects = vote_for_objects(assigned, attention, grid, options.clusters)
    share = float(objects[assigned].mean())
    if OBJECT_SHARE[0] <= share <= OBJECT_SHARE[1]:
        return _Vote(kmeans.cluster_centers_, assigned, objects)
    print(
        f"the background vote calls {share:.0%} of the patches object, outside "
        f"{OBJECT_SHARE[0]:.0%} to {OBJECT_SHARE[1]:.0%}: learning without a background",
        file=sys.stderr,
    )
    return None


def _shaped(
    tokens: Tokens,
    mean: Tensor,
    background: Literal["voted", "token", "none"],
    options: "LearnPartsOptions",
) -> PartLearner:
    """A learner of the shape that tokens and options ask for, its weights drawn by the seed."""
    _, places, width = tokens.patches.shape
    torch.manual_seed(options.seed)
    return PartLearner(
        PartArchitecture(
            width=width,
            style_width=tokens.class_token.shape[1],
            parts=tokens.attention.shape[1]
            if options.variant == "attention"
            else options.num_parts,
            variant=options.variant,
            background=background,
            clusters=options.clusters,
            class_share=options.class_share,
            temperature=options.temperature,
            blur=options.blur,
            pixel_decoder=options.variant in LEARNED and options.rebuilds_pixels,
            decoder_width=options.decoder_width,
            decoder_noise=options.decoder_noise,
            places=places if mean.ndim == 2 else 0,
            grid_places=places if options.variant == "grid" else 0,
        )
    )


PartOrder = Literal["area", "direction"]


def start_scores(
    learner: PartLearner,
    of_parts: NDArray[np.float32],
    grid: tuple[int, int],
    seed: int,
    order: PartOrder = "area",
) -> None:
    """Set what a variant begins with: anchors or centres from k-means, cells of the grid.

    Args:
        learner: Changed in place; variants without such a start are left as they are.
        of_parts: Standardised patch tokens to cluster, (M, D), those of objects alone where there
            is a voted background.
        grid: (h, w).
        seed: Of k-means.
        order: As in `part_order`.

    Raises:
        SettingError: There are fewer patches than parts, or the grid has too few places.
    """
    scores, parts = learner.scores, learner.architecture.tokens
    if isinstance(scores, GridCells):
        scores.cells.copy_(torch.from_numpy(fixed_grid(*grid, parts)))
    elif isinstance(scores, (AnchoredTokens, SetCentres)):
        kmeans = _cluster(of_parts, parts, seed)
        ranked = part_order(kmeans.cluster_centers_, kmeans.labels_, order)
        centres = torch.from_numpy(kmeans.cluster_centers_[ranked])
        own = scores.anchors.data if isinstance(scores, AnchoredTokens) else scores.centres
        own.copy_(centres)


def part_order(
    centres: NDArray[np.float32], assigned: NDArray[np.integer], by: PartOrder
) -> NDArray[np.int64]:
    """An order of clusters that does not hang on how k-means happened to number them.

    Args:
        centres: (N, D).
        assigned: Cluster of each patch, (M,).
        by: ``area``: the largest first; ``direction``: along the first principal direction of the
            centres, whose largest component counts as positive.

    Returns:
        int64 (N,), old numbers in the new order.
    """
    if by == "area":
        sizes = np.bincount(assigned, minlength=len(centres))
        return np.argsort(-sizes, kind="stable")
    apart = centres - centres.mean(axis=0)
    direction = np.linalg.svd(apart, full_matrices=False)[2][0]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])
    return np.argsort(apart @ direction, kind="stable")


def position_share(patches: Tensor) -> float:
    """Share of the variance of patch tokens (B, L, D) that their place explains, 0 to 1."""
    mean = patches.mean(dim=(0, 1))
    explained = (patches.mean(dim=0) - mean).square().mean()
    return float(explained / (patches - mean).square().mean().clamp_min(1e-12))


def _positions_go(patches: Tensor, options: "LearnPartsOptions") -> bool:
    """Whether the mean token of each place is taken off.

    Ours.  Tokens of a masked autoencoder are mostly position (two thirds of their variance), and
    k-means of them finds a grid of cells; those of encoders trained to recognise are not.
    """
    if options.positions != "auto":
        return options.positions == "remove"
    share = position_share(patches)
    if share > POSITION_SHARE:
        print(
            f"place explains {share:.0%} of what differs between the encoder's tokens: taking the "
            "mean token of each place off",
            file=sys.stderr,
        )
    return share > POSITION_SHARE


def _cluster(tokens: NDArray[np.float32], clusters: int, seed: int) -> KMeans:
    """k-means with three starts, on at most `TOKENS_FOR_CLUSTERS` tokens."""
    chosen = np.random.default_rng(seed).permutation(len(tokens))[:TOKENS_FOR_CLUSTERS]
    if len(chosen) < clusters:
        raise SettingError(
            f"{len(chosen)} patches cannot make {clusters} clusters: expected more images, "
            "or fewer --num-parts and --clusters"
        )
    return KMeans(clusters, n_init=3, random_state=seed).fit(tokens[np.sort(chosen)])
