"""How much of the true parts an encoder holds: a linear probe of its patch tokens, with labels.

Parts learned without labels can hardly be better than what a linear map finds with them, so this
judges the encoder where the rest judges the learner.

Legend of shapes: N images, L patches, D width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .metrics import agreement, fg_ari, fg_nmi

STEPS, PATCHES_A_STEP, LEARNING_RATE = 600, 8192, 1e-2

_IMAGES_AT_ONCE = 64


def probe_parts(
    train: Tensor,
    train_labels: NDArray[np.uint8],
    tokens: Tensor,
    true: NDArray[np.uint8],
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Fit a logistic regression to patches of some images, and judge it on others.

    Tokens are standardised by dimension over the training patches.  Adam from zero weights, cosine
    to 0, so that two calls give the same figures.

    Args:
        train: Patch tokens, float (N, L, D), also in half precision.
        train_labels: True part of each patch, uint8 (N, h, w) with h w = L.
        tokens: Patch tokens of the images that are judged, float (M, L, D).
        true: Their true parts, uint8 (M, h, w).
        seed: Of the patches drawn.
        device: Where to compute.

    Returns:
        Percent: ``fg_nmi``, ``fg_ari``, and ``accuracy`` over all patches.

    Raises:
        MismatchError: No true label is foreground.
    """
    mean, std = _statistics(train)
    points = train.flatten(0, 1)
    targets = torch.from_numpy(train_labels.reshape(-1).astype(np.int64))
    linear = _fitted(points, targets, (mean, std), seed, torch.device(device))
    guesses = []
    with torch.no_grad():
        for some in torch.split(tokens, _IMAGES_AT_ONCE):
            scores = linear(((some.float() - mean) / std).to(device))
            guesses.append(scores.argmax(dim=-1).cpu().numpy())
    found, truth = np.concatenate(guesses), true.reshape(len(true), -1)
    return {
        "fg_nmi": fg_nmi(found, truth),
        "fg_ari": fg_ari(found, truth),
        "accuracy": agreement(found, truth),
    }


def _statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, float32 (D,), in one pass of some images."""
    total = torch.zeros(tokens.shape[2], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for some in torch.split(tokens, _IMAGES_AT_ONCE):
        flat = some.flatten(0, 1).double()
        total += flat.sum(dim=0)
        squares += flat.square().sum(dim=0)
    count = tokens.shape[0] * tokens.shape[1]
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().float() + 1e-6


def _fitted(
    points: Tensor,
    targets: Tensor,
    statistics: tuple[Tensor, Tensor],
    seed: int,
    device: torch.device,
) -> nn.Linear:
    linear = nn.Linear(points.shape[1], int(targets.max()) + 1).to(device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    mean, std = statistics
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        chosen = torch.randint(0, len(points), (PATCHES_A_STEP,), generator=generator)
        batch = ((points[chosen].float() - mean) / std).to(device)
        loss = F.cross_entropy(linear(batch), targets[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return linear
