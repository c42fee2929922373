"""Where a part learner begins: token statistics, the background vote, anchors from k-means."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from ..errors import SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.gathering import Gathered
from ..models.part_scores import AnchoredTokens, GridCells, SetCentres
from ..models.parts import PartLearner
from ..models.places import PlacePredictor
from ..models.predictors import PartPredictor, PatchPredictor
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .background_vote import objectness_of
from .clustering import clustered
from .evals.metrics import fixed_grid

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions

TOKENS_FOR_CLUSTERS = 60_000
"""Patch tokens that the k-means starts are made from, at most."""

OBJECT_SHARE = (0.1, 0.6)
"""Least and largest share of patches that a background vote may call object; outside it the vote
found something else, and parts are learned without it."""

INSTEAD: dict[str, tuple[Literal["voted", "none"], str]] = {
    "predicted": ("voted", "taking the vote that it was learned from"),
    "voted": ("none", "learning without a background"),
}
"""What takes the place of a background that calls too many or too few patches object."""

POSITION_SHARE = 0.5
"""Share of the tokens' variance that place may explain before parts would be places."""


@torch.no_grad()
def sample_tokens(
    encoder: FrozenEncoder, images: ImageSource, size: tuple[int, int], count: int, seed: int
) -> Tokens:
    """Tokens of some images, drawn without replacement, on the CPU in float32."""
    chosen = drawn(len(images), count, seed)
    made = Gathered(len(chosen))
    device = encoder.mean.device
    with Progress("reading tokens", len(chosen), "image") as progress:
        for _, pixels in batches_in_order(images, size, 64, "squash", chosen):
            tokens = encoder(torch.from_numpy(pixels).to(device))
            made.add(*(part.float().cpu() for part in tokens.parts))
            progress.update(len(pixels))
    if not made:
        raise SettingError(
            f"not one image of {images.plan.root} can be read: nothing to learn from"
        )
    return Tokens(*made.parts)


def voting_learner(
    tokens: Tokens, grid: tuple[int, int], options: "LearnPartsOptions"
) -> PartLearner:
    """A learner that knows the background alone, by the vote of clusters of patch tokens.

    Args:
        tokens: Of a sample of the data.
        grid: (h, w).
        options: The learner's settings.

    Returns:
        On the CPU.  Without a background, where the settings set none apart before there are
        parts, or the vote found none.

    Raises:
        SettingError: There are fewer patches than clusters.
    """
    if options.masked:
        voter = _shaped(tokens, replace(options, told_by="tokens", background="voted"), None)
        _vote(voter, tokens, grid, options.seed)
        _, share = object_features(voter, tokens, grid)
        if _sensible(share, "voted"):
            return voter
    return _shaped(tokens, replace(options, told_by="tokens", background="none"), None)


def started_learner(
    tokens: Tokens,
    grid: tuple[int, int],
    options: "LearnPartsOptions",
    predictor: PatchPredictor | None = None,
) -> PartLearner:
    """A learner at its start: token statistics, background, anchors from k-means.

    Args:
        tokens: Of a sample of the data.
        grid: (h, w).
        options: The learner's settings.
        predictor: What patches tell of themselves; needed where parts or background go by it.

    Raises:
        SettingError: There are fewer patches than clusters.
    """
    learner = _shaped(tokens, options, predictor)
    learner.class_mean.copy_(tokens.class_token.mean(0))
    learner.class_std.copy_(tokens.class_token.std(0, correction=0) + 1e-6)
    if learner.architecture.background == "voted":
        _vote(learner, tokens, grid, options.seed)
    points, share = object_features(learner, tokens, grid)
    background = learner.architecture.background
    if learner.architecture.masked and not _sensible(share, background):
        options = replace(options, background=INSTEAD[background][0])
        return started_learner(tokens, grid, options, predictor)
    start_scores(learner, points.numpy(), grid, options.seed, options.part_order)
    if learner.architecture.places and options.positions == "auto":
        print(
            f"place explains {position_share(tokens.patches):.0%} of what differs between the "
            "encoder's tokens: taking the mean token of each place off",
            file=sys.stderr,
        )
    return learner


def _shaped(
    tokens: Tokens, options: "LearnPartsOptions", predictor: PatchPredictor | None
) -> PartLearner:
    """A learner of the shape that tokens and options ask for, its weights drawn by the seed."""
    patches = tokens.patches
    predictor = predictor if options.learns_places else None
    keeps_place = not _positions_go(patches, options)
    mean = patches.mean(dim=(0, 1)) if keeps_place else patches.mean(dim=0)
    torch.manual_seed(options.seed)
    measured: dict[str, Any] = {
        "style_width": tokens.class_token.shape[1],
        "places": 0 if keeps_place else patches.shape[1],
        "grid_places": patches.shape[1] if options.variant == "grid" or predictor else 0,
        "predictor": "none",
        "told_by": "predictor" if predictor and options.by_places else "tokens",
    }
    if isinstance(predictor, PlacePredictor):
        measured |= {"predictor": "places", "place_cells": predictor.cells}
    elif isinstance(predictor, PartPredictor):
        measured["predictor"] = "parts"
    if options.variant == "attention":
        measured["parts"] = tokens.attention.shape[1]
    learner = PartLearner(options.architecture(patches.shape[2], **measured))
    learner.token_mean.copy_(mean)
    learner.token_std.copy_((patches - mean).flatten(0, 1).std(0) + 1e-6)
    learner.predictor = predictor
    return learner


def _vote(learner: PartLearner, tokens: Tokens, grid: tuple[int, int], seed: int) -> None:
    """Set the clusters of patch tokens, and how much each is object."""
    clusters = learner.architecture.clusters
    flat = learner.standardised(tokens).flatten(0, 1).numpy()
    kmeans = _cluster(flat, clusters, seed)
    assigned = kmeans.predict(flat).reshape(tokens.patches.shape[:2]).astype(np.int64)
    attention = tokens.attention.mean(dim=1).numpy()
    learner.centres.copy_(torch.from_numpy(kmeans.cluster_centers_))
    learner.objectness.copy_(torch.from_numpy(objectness_of(assigned, attention, grid, clusters)))


@torch.no_grad()
def object_features(
    learner: PartLearner, tokens: Tokens, grid: tuple[int, int]
) -> tuple[Tensor, float]:
    """What parts are told from in the patches of objects, and the share of such patches.

    Args:
        learner: On the CPU.
        tokens: Of the encoder, on the CPU.
        grid: (h, w).

    Returns:
        float32 (M, F), and 0 to 1.
    """
    found, places = [], tokens.patches.shape[0] * tokens.patches.shape[1]
    for some in tokens.split():
        patches = learner.patches(some, grid)
        found.append(patches.features[patches.objects > 0])
    points = torch.cat(found)
    return points, len(points) / places


def _sensible(share: float, background: str) -> bool:
    """Whether this share of patches can be objects; says so, and what is done then, if not.

    Args:
        share: 0 to 1.
        background: How objects were told from it.
    """
    if OBJECT_SHARE[0] <= share <= OBJECT_SHARE[1]:
        return True
    print(
        f"{share:.0%} of the patches would be object and the others background, outside "
        f"{OBJECT_SHARE[0]:.0%} to {OBJECT_SHARE[1]:.0%}: {INSTEAD[background][1]}",
        file=sys.stderr,
    )
    return False


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
        of_parts: What parts are told from, (M, F), of objects alone where there is an object
            mask.
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
    return position_share(patches) > POSITION_SHARE


def _cluster(tokens: NDArray[np.float32], clusters: int, seed: int) -> KMeans:
    """k-means with three starts, on at most `TOKENS_FOR_CLUSTERS` tokens."""
    chosen = np.random.default_rng(seed).permutation(len(tokens))[:TOKENS_FOR_CLUSTERS]
    if len(chosen) < clusters:
        raise SettingError(
            f"{len(chosen)} patches cannot make {clusters} clusters: expected more images, "
            "or fewer --num-parts and --clusters"
        )
    return clustered(tokens[np.sort(chosen)], clusters, 3, seed)
