"""Blur over a grid of patches, between patches that are alike.

Legend of shapes: B images, L = h w patches, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def affinities(
    tokens: Tensor, grid: tuple[int, int], deviation: float, temperature: float
) -> Tensor:
    """How much each patch takes over from each other in a blur: a bilateral filter's weights.

    Ours.  A Gaussian of the distance, times the exponential of the tokens' cosine: the maps are
    smooth inside of things and sharp at their borders, which the Gaussian alone would wash out.

    Args:
        tokens: (B, L, D), standardised.
        grid: (h, w), with h w = L.
        deviation: Of the Gaussian, patches; above 0.
        temperature: That cosines are divided by; 0 leaves the Gaussian alone.

    Returns:
        (B, L, L), rows sum to 1; multiplied from the left, they blur what has a row a patch.
    """
    rows = torch.arange(grid[0], device=tokens.device, dtype=tokens.dtype)
    columns = torch.arange(grid[1], device=tokens.device, dtype=tokens.dtype)
    places = torch.cartesian_prod(rows, columns)
    apart = (places[:, None] - places).square().sum(dim=2)
    near = -apart / (2 * deviation**2)
    if not temperature:
        return near.softmax(dim=1).expand(len(tokens), -1, -1)
    unit = F.normalize(tokens, dim=2)
    return (unit @ unit.transpose(1, 2) / temperature + near).softmax(dim=2)


def within(weights: Tensor, objects: Tensor) -> Tensor:
    """Weights of a blur that stays on each patch's side of a mask.

    Args:
        weights: (B, L, L), from `affinities`.
        objects: (B, L), 1 on objects, 0 on background.

    Returns:
        (B, L, L), rows sum to 1.
    """
    kept = weights * (objects[:, :, None] == objects[:, None])
    return kept / kept.sum(dim=2, keepdim=True)
