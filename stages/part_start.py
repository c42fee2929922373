"""Where a part learner begins: token statistics, the background vote, anchors from k-means."""

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from ..errors import SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.parts import PartArchitecture, PartLearner
from ..pipeline.image_source import ImageSource, batches_in_order
from ..pipeline.progress import Progress

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions

TOKENS_FOR_CLUSTERS = 60_000
"""Patch tokens that the k-means starts are made from, at most."""

OBJECT_SHARE = (0.1, 0.6)
"""Least and largest share of patches that a background vote may call object; outside it the vote
found something else, and parts are learned without it."""


POSITION_SHARE = 0.5
"""Share of the tokens' variance that place may explain before parts would be places."""


@torch.no_grad()
def sample_tokens(
    encoder: FrozenEncoder, images: ImageSource, size: tuple[int, int], count: int, seed: int
) -> Tokens:
    """Tokens of some images, drawn without replacement, on the CPU in float32."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    made: list[Tokens] = []
    device = encoder.mean.device
    with Progress("reading tokens", len(chosen), "image") as progress:
        for _, pixels in batches_in_order(images, size, 64, "squash", np.sort(chosen)):
            tokens = encoder(torch.from_numpy(pixels).to(device))
            made.append(
                Tokens(
                    tokens.class_token.float().cpu(),
                    tokens.patches.float().cpu(),
                    tokens.attention.float().cpu(),
                )
            )
            progress.update(len(pixels))
    if not made:
        raise SettingError(
            f"not one image of {images.plan.root} can be read: nothing to learn from"
        )
    return Tokens(
        torch.cat([tokens.class_token for tokens in made]),
        torch.cat([tokens.patches for tokens in made]),
        torch.cat([tokens.attention for tokens in made]),
    )


def vote_for_objects(
    assigned: NDArray[np.int64],
    attention: NDArray[np.float32],
    grid: tuple[int, int],
    clusters: int,
) -> NDArray[np.bool_]:
    """Which clusters of patch tokens are object, without labels.

    Ours.  A cluster is object if the class token attends to it more than to the average patch by
    more than it lies on the border of the image more than the average patch does.

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
    return np.asarray(attended > bordering)


def started_learner(
    tokens: Tokens, grid: tuple[int, int], options: "LearnPartsOptions"
) -> PartLearner:
    """A learner at its start: token statistics, background vote, anchors from k-means.

    Args:
        tokens: Of a sample of the data.
        grid: (h, w).
        options: The learner's settings.
    """
    patches, width = tokens.patches, tokens.patches.shape[2]
    mean = patches.mean(dim=(0, 1))
    if _positions_go(patches, options):
        mean = patches.mean(dim=0)
    std = (patches - mean).flatten(0, 1).std(0) + 1e-6
    standard = ((patches - mean) / std).numpy()
    background = options.background_kind
    if background == "voted":
        kmeans = _cluster(standard.reshape(-1, width), options.clusters, options.seed)
        assigned = kmeans.predict(standard.reshape(-1, width)).reshape(patches.shape[:2])
        attention = tokens.attention.mean(dim=1).numpy()
        objects = vote_for_objects(assigned.astype(np.int64), attention, grid, options.clusters)
        is_object = objects[assigned]
        share = float(is_object.mean())
        if not OBJECT_SHARE[0] <= share <= OBJECT_SHARE[1]:
            print(
                f"the background vote calls {share:.0%} of the patches object, outside "
                f"{OBJECT_SHARE[0]:.0%} to {OBJECT_SHARE[1]:.0%}: learning without a background",
                file=sys.stderr,
            )
            background = "none"
    architecture = PartArchitecture(
        width=width,
        parts=options.num_parts,
        variant=options.variant,
        background=background,
        clusters=options.clusters,
        class_share=options.class_share,
        temperature=options.temperature,
        blur=options.blur,
        pixel_decoder=options.weights[1] > 0,
        decoder_width=options.decoder_width,
        decoder_noise=options.decoder_noise,
        places=len(mean) if mean.ndim == 2 else 0,
    )
    torch.manual_seed(options.seed)
    learner = PartLearner(architecture)
    learner.token_mean.copy_(mean)
    learner.token_std.copy_(std)
    learner.class_mean.copy_(tokens.class_token.mean(0))
    learner.class_std.copy_(tokens.class_token.std(0, correction=0) + 1e-6)
    of_parts = standard.reshape(-1, width)
    if background == "voted":
        learner.centres.copy_(torch.from_numpy(kmeans.cluster_centers_))
        learner.is_object.copy_(torch.from_numpy(objects.astype(np.float32)))
        of_parts = standard[is_object]
    if options.variant == "anchored":
        centres = _cluster(of_parts, architecture.tokens, options.seed).cluster_centers_
        learner.anchors.data.copy_(torch.from_numpy(centres))
    return learner


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
