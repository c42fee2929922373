"""Pictures: part overlays, masks along the schedule, reconstructions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.nn import functional as F

from ..pipeline.crops import squash
from ..storage.files import atomic_file

Pixels = NDArray[np.uint8]

BACKGROUND_COLOUR = (40, 40, 40)
PART_COLOURS = (
    (230, 60, 60),
    (60, 180, 75),
    (65, 105, 225),
    (255, 210, 40),
    (210, 70, 220),
    (70, 220, 230),
    (245, 130, 48),
    (170, 110, 40),
    (145, 255, 120),
    (250, 190, 212),
    (0, 128, 128),
    (220, 190, 255),
    (128, 0, 0),
    (128, 128, 0),
    (0, 0, 128),
    (255, 250, 200),
)
"""Colours of parts, as far apart as sixteen can be; more parts begin again."""


def colours_of(parts: int, background: int | None) -> Pixels:
    """One RGB colour a channel, uint8 (parts, 3); the background is dark grey."""
    listed = [PART_COLOURS[i % len(PART_COLOURS)] for i in range(parts)]
    if background is not None:
        listed.insert(background, BACKGROUND_COLOUR)
    return np.array(listed[:parts], dtype=np.uint8)


def enlarged(image: Pixels, side: int) -> Pixels:
    """An image brought to ``side`` x ``side`` pixels for a contact sheet."""
    return squash(image, (side, side))


def overlay(image: Pixels, labels: Pixels, colours: Pixels, strength: float = 0.6) -> Pixels:
    """An image under the colours of its parts.

    Args:
        image: uint8 (H, W, 3).
        labels: uint8 (h, w), part ids; 255 stays uncoloured.
        colours: uint8 (P, 3).
        strength: Of the colour against the image, 0 to 1.

    Returns:
        uint8 (H, W, 3).
    """
    full = _spread(labels, image)
    known = full != 255
    tint = colours[np.where(known, full, 0)].astype(np.float32)
    mixed = image * (1 - strength) + tint * strength
    return np.where(known[..., None], mixed, image).round().astype(np.uint8)


def soft_overlay(
    image: Pixels, maps: NDArray[np.floating], colours: Pixels, strength: float = 0.6
) -> Pixels:
    """An image under the colours of its soft parts, each as opaque as its map is strong.

    Args:
        image: uint8 (H, W, 3).
        maps: float (P, h, w), summing to 1 at each place; brought to the image bilinearly.
        colours: uint8 (P, 3).
        strength: Of the colours against the image where maps sum to 1, 0 to 1.

    Returns:
        uint8 (H, W, 3).
    """
    given = torch.from_numpy(np.asarray(maps, dtype=np.float32))[None]
    full = F.interpolate(given, image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()
    tint = np.einsum("phw,pc->hwc", full, colours.astype(np.float32))
    mixed = image * (1 - strength * full.sum(axis=0)[..., None]) + strength * tint
    return np.asarray(mixed.clip(0, 255).round().astype(np.uint8))


def masked(image: Pixels, mask: NDArray[np.bool_], grid: tuple[int, int]) -> Pixels:
    """An image uint8 (H, W, 3) with its masked patches (L,) in grey."""
    hidden = _spread(mask.reshape(grid), image)
    return np.where(hidden[..., None], np.uint8(110), image).astype(np.uint8)


def masked_parts(image: Pixels, mask: NDArray[np.bool_], labels: Pixels, colours: Pixels) -> Pixels:
    """A mask over the parts that it follows.

    Args:
        image: uint8 (H, W, 3).
        mask: bool (L,), True where masked.
        labels: uint8 (h, w), part id of each patch.
        colours: uint8 (P, 3).

    Returns:
        uint8 (H, W, 3): masked patches in the flat colours of their parts, the others as the image
        under a tint of them.
    """
    hidden = _spread(mask.reshape(labels.shape), image)[..., None]
    flat, tinted = (overlay(image, labels, colours, strength) for strength in (1.0, 0.3))
    return np.where(hidden, flat, tinted)


def _spread(values: NDArray[Any], image: Pixels) -> NDArray[Any]:
    """Values of patches (h, w) at each pixel of an image, (H, W)."""
    height, width = image.shape[:2]
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    spread: NDArray[Any] = values[rows][:, columns]
    return spread


def sheet(rows: Sequence[Sequence[Pixels]], gap: int = 3) -> Pixels:
    """A contact sheet: rows of pictures of one size, on white, uint8 (H, W, 3)."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    page = np.full(
        (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            page[top : top + height, left : left + width] = picture
    return page


def headed(page: Pixels, headings: Sequence[str], height: int = 16) -> Pixels:
    """A contact sheet with a heading over each column.

    Args:
        page: uint8 (H, W, 3), columns of one width.
        headings: One a column; longer ones run into the next.
        height: Pixels of the line of headings.

    Returns:
        uint8 (H + ``height``, W, 3).
    """
    wide = page.shape[1]
    line = Image.new("RGB", (wide, height), "white")
    pen = ImageDraw.Draw(line)
    for column, heading in enumerate(headings):
        pen.text((3 + column * wide // len(headings), 2), heading, fill="black")
    return np.concatenate([np.asarray(line), page])


def save_picture(path: Path, picture: Pixels) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def bands(rows: Sequence[Sequence[Pixels]], columns: int, side: int) -> Pixels:
    """A contact sheet of long rows, such as images and what was made of them underneath.

    Args:
        rows: As many pictures each, uint8, any size; they are cut after ``columns`` pictures, and
            go on underneath, in the same order.
        columns: Pictures across.
        side: Pixels of each, square.
    """
    starts = range(0, len(rows[0]), columns)
    cut = [row[start : start + columns] for start in starts for row in rows]
    return sheet([[enlarged(picture, side) for picture in row] for row in cut])
