"""Several looks at an image, made on the training device: where each was taken, in what colours.

Randomness is torch's own generator, which the trainer seeds from (seed, step): so views of a step
are the same however a run was interrupted.

Legend of shapes: B images, H W pixels of an image, h w patches of a view, L = h w.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""RGB to YIQ: the first row is lightness, the other two turn with the hue."""

ASPECT = (3 / 4, 4 / 3)
"""Least and largest width over height of what a view takes in, as in MAE's crops."""


@dataclass(frozen=True)
class View:
    """A look at each image of a batch.

    Attributes:
        pixels: float32 (B, 3, S, T), in [0, 1].
        frame: float32 (B, 2, 3): takes a place of the view to the place of the image that is seen
            there, both (x, y) with -1 and 1 at the borders.
    """

    pixels: Tensor
    frame: Tensor


def draw_view(
    images: Tensor, size: int | tuple[int, int], scale: float | tuple[float, float]
) -> View:
    """A random crop of each image, resized, half of them mirrored.

    Args:
        images: float32 (B, 3, H, W), in [0, 1].
        size: Pixels of the view: (S, T) down and across, or the side of a square.
        scale: Least and most share of the image's area in it; the most is 1 if not given.
    """
    least, most = scale if isinstance(scale, tuple) else (scale, 1.0)
    frame = _draw_frames(len(images), least, most).to(images.device)
    down, across = (size, size) if isinstance(size, int) else size
    places = F.affine_grid(frame, [len(images), 3, down, across], align_corners=False)
    pixels = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    return View(pixels, frame)


def _draw_frames(count: int, least: float, most: float) -> Tensor:
    area = torch.empty(count).uniform_(least, most)
    aspect = torch.empty(count).uniform_(math.log(ASPECT[0]), math.log(ASPECT[1])).exp()
    wide, tall = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    across, down = (torch.rand(2, count) * 2 - 1) * (1 - torch.stack([wide, tall]))
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    none = torch.zeros(count)
    x = torch.stack([wide * mirror, none, across], dim=1)
    y = torch.stack([none, tall, down], dim=1)
    return torch.stack([x, y], dim=1)


def recoloured(pixels: Tensor, strength: float) -> Tensor:
    """Each view in other colours: brightness, contrast, hue and saturation, at times in grey.

    Args:
        pixels: float32 (B, 3, S, S), in [0, 1].
        strength: 1 turns the hue to any other and changes brightness and contrast by up to 40 %;
            0 changes nothing.
    """
    if not strength:
        return pixels
    count = len(pixels)

    def factor(spread: float) -> Tensor:
        drawn = torch.empty(count, 1, 1, 1).uniform_(1 - spread * strength, 1 + spread * strength)
        return drawn.to(pixels.device)

    lit = pixels * factor(0.4)
    mean = lit.mean(dim=(1, 2, 3), keepdim=True)
    lit = (lit - mean) * factor(0.4) + mean
    hue = torch.empty(count).uniform_(-math.pi, math.pi) * strength
    saturation = torch.empty(count).uniform_(1 - 0.7 * strength, 1 + 0.4 * strength)
    saturation = torch.where(torch.rand(count) < 0.15 * strength, 0.0, saturation)
    luma = torch.tensor(_LUMA)
    turned = torch.zeros(count, 3, 3)
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * hue.cos()
    turned[:, 2, 1], turned[:, 1, 2] = saturation * hue.sin(), -saturation * hue.sin()
    mixed = torch.linalg.inv(luma) @ turned @ luma
    return torch.einsum("bij,bjhw->bihw", mixed.to(pixels.device), lit).clamp(0, 1)


def whole_frames(frame: Tensor) -> Tensor:
    """Frames (B, 2, 3) of whole images, as many as those of some views of them."""
    return torch.eye(2, 3, device=frame.device).expand_as(frame)


def meeting_places(source: Tensor, target: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where another view shows what each patch of a view shows.

    Args:
        source: Frame of the view, (B, 2, 3).
        target: Frame of the other one.
        grid: (h, w).

    Returns:
        (B, L, 2), the place (x, y) in the other view of each patch's centre; and bool (B, L),
        whether it lies in it.
    """
    places = F.affine_grid(source, [len(source), 1, *grid], align_corners=False).flatten(1, 2)
    scale = torch.diagonal(target[:, :, :2], dim1=1, dim2=2)[:, None]
    seen = (places - target[:, None, :, 2]) / scale
    return seen, (seen.abs() <= 1).all(dim=2)


def patches_at(tokens: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B, L, D) between the patches of a view, at places (B, M, 2): (B, M, D)."""
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    found = F.grid_sample(maps, places[:, :, None], padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


def recoloured_regions(pixels: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Each view with the colours of its regions turned at random, each region's its own way.

    What is left is shape: edges and patterns inside a region.  Neither a region's colours nor how
    they compare with another's tell what they were.

    Args:
        pixels: float32 (B, 3, S, S), in [0, 1].
        cells: Regions a side; the views of a batch are parted among these at random.

    Returns:
        Of the same shape, in [0, 1].
    """
    made = torch.empty_like(pixels)
    apart = pixels - pixels.mean(dim=(2, 3), keepdim=True)
    for count, chosen in zip(cells, torch.randperm(len(pixels)).chunk(len(cells)), strict=False):
        turns = torch.linalg.qr(torch.randn(len(chosen), count, count, 3, 3))[0]
        gains = torch.empty(len(chosen), count, count, 1, 1).uniform_(0.5, 1.3)
        shifts = torch.empty(len(chosen), 3, count, count).uniform_(-0.15, 0.15)
        matrices = (turns * gains).permute(0, 3, 4, 1, 2).flatten(1, 2)
        region = _spread(matrices.to(pixels.device), pixels.shape[2:])
        region = region.reshape(len(chosen), 3, 3, *pixels.shape[2:])
        turned = (region * apart[chosen, None]).sum(dim=2)
        made[chosen] = turned + 0.5 + _spread(shifts.to(pixels.device), pixels.shape[2:])
    return made.clamp(0, 1)


def _spread(cells: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(cells, (size[0], size[1]), mode="nearest")
