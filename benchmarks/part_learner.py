"""Variants of the part learner against true part labels, on tokens that are read once.

Run: ``python -m semmae.benchmarks.part_learner ENCODER IMAGES LABELS``, for instance
``stages/creature_encoder.safetensors work/creatures/images work/creatures/labels`` after
``semmae data make-creatures --output work/creatures``.  Percent; the learner trains on the very
images that it is measured on, without their labels, as it does on a user's.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from semmae.models.encoders import Tokens
from semmae.models.parts import diversity, part_labels, rebuilt_features
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.evals.metrics import (
    ari,
    ari_inside_images,
    coherence,
    fg_ari,
    fg_nmi,
    fixed_grid,
    information_share,
    nmi,
)
from semmae.stages.evals.parts import true_labels
from semmae.stages.learn_parts import LearnPartsOptions
from semmae.stages.networks import open_encoder
from semmae.stages.part_start import position_share, sample_tokens, started_learner

IMAGES, STEPS, BATCH = 1500, 300, 48

VARIANTS: dict[str, dict[str, object]] = {
    "positions kept": {"positions": "keep"},
    "positions removed": {"positions": "remove"},
    "positions removed, no background": {"positions": "remove", "background": "none"},
    "positions removed, blur 1.2": {"positions": "remove", "blur": 1.2},
}


def learned(
    tokens: Tokens, grid: tuple[int, int], settings: dict[str, object]
) -> NDArray[np.uint8]:
    """Part labels (N, L) of a learner trained on the tokens."""
    options = LearnPartsOptions(data="", encoder="", output=Path(), **settings)  # type: ignore[arg-type]
    learner = started_learner(tokens, grid, options)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, weight_decay=0.0)
    patches, style = learner.standardise(tokens)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(patches), (BATCH,))
        maps = learner.maps(patches[chosen], style[chosen], grid).flatten(2)
        loss = F.mse_loss(rebuilt_features(maps, patches[chosen]), patches[chosen])
        loss = loss + 0.1 * diversity(maps).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        labels = part_labels(learner.maps(patches, style, grid))[0]
    return np.asarray(labels.flatten(1).numpy())


def line(
    name: str, found: NDArray[np.uint8], true: NDArray[np.uint8], grid: tuple[int, int]
) -> str:
    places = np.broadcast_to(np.arange(found.shape[1]), found.shape)
    figures = (
        fg_nmi(found, true),
        fg_ari(found, true),
        nmi(found, true),
        ari(found, true),
        ari_inside_images(found, true),
        ari_inside_images(found, true, foreground=True),
        coherence(found.reshape(-1, *grid)),
        information_share(found, places),
    )
    return f"{name:34}" + "".join(f"{figure:8.1f}" for figure in figures)


def main() -> None:
    named, data, labels = sys.argv[1:4]
    encoder = open_encoder(named)
    images = ImageSource(list_images(data, "train"))
    size, patch = encoder.native_size, encoder.patch_size
    grid = (size[0] // patch, size[1] // patch)
    tokens = sample_tokens(encoder, images, size, IMAGES, seed=0)
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:IMAGES])
    true = true_labels(Path(labels), [str(images.plan.keys[i]) for i in chosen], grid)
    true = true.reshape(len(true), -1)
    print(f"place explains {position_share(tokens.patches):.0%} of the tokens' variance")
    heads = ("FG-NMI", "FG-ARI", "NMI", "ARI", "in-ARI", "in FG", "coher.", "place")
    print(" " * 34 + "".join(f"{head:>8}" for head in heads))
    cells = np.broadcast_to(fixed_grid(*grid, 7).astype(np.uint8), true.shape)
    print(line("fixed grid of 7", cells, true, grid))
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        print(line(name, learned(tokens, grid, settings), true, grid), flush=True)


if __name__ == "__main__":
    main()
