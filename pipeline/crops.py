"""Crops, flips and squashes, in which an image and its part map move together.

A part map covers its whole image, squashed on a grid of g_h x g_w places.  So a crop box, taken as
a share of the image, applies to both, and every patch of every crop finds its part.

Legend: B images, (H, W) pixels of an image, (g_h, g_w) places of a stored map, (h, w) pixels or
patches of the result.  A box is (top, left, bottom, right) in whole pixels of its image, bottom
and right exclusive.  Images are uint8 RGB, 0 to 255.

Boxes are drawn, and pixels resampled, as in the augmentation of MAE (torchvision's
RandomResizedCrop on PIL images, bicubic, then a flip), here as functions of a sample's own stream.

Crops for training, and images for a store's cache, are resampled by torch in a quarter of PIL's
time or less.  It computes in integers, too: with AVX-512, AVX2 or neither the bits are the same.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from ..errors import SettingError
from .randomness import Streams, uniforms

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.int64]
Value = TypeVar("Value", bound=np.generic)

_ATTEMPTS = 10


def crop_boxes(
    stream: Streams,
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Boxes:
    """Random boxes, one an image, with the distribution of torchvision's RandomResizedCrop.

    The area is uniform in ``scale``, the logarithm of the aspect ratio uniform, the place uniform
    among those inside the image.  The first of ten attempts that fits is taken, else the largest
    centred box whose aspect ratio is allowed.  The default scale is MAE's for pretraining; attempt
    k uses the positions 4 k (area), 4 k + 1 (ratio), 4 k + 2 (top) and 4 k + 3 (left) of a stream.

    Args:
        stream: uint64 (B,), from ``streams(seed, Purpose.CROP, epoch, index)``.
        height: Integers (B,), pixels, positive.
        width: Integers (B,), pixels, positive.
        scale: Least and largest share of the image's area, in (0, 1].
        ratio: Least and largest width / height, positive.

    Returns:
        int64 (B, 4), boxes as (top, left, bottom, right).

    Raises:
        SettingError: ``scale`` or ``ratio`` is not an ascending pair in its range.
        ValueError: Sizes are not positive, or not one an image.
    """
    _check_range("scale", scale, 1.0)
    _check_range("ratio", ratio, math.inf)
    height, width = np.asarray(height, dtype=np.int64), np.asarray(width, dtype=np.int64)
    if not stream.shape == height.shape == width.shape or stream.ndim != 1:
        raise ValueError(
            f"stream, height and width must all be (B,), "
            f"got {stream.shape}, {height.shape} and {width.shape}"
        )
    if len(stream) and min(height.min(), width.min()) < 1:
        raise ValueError(
            f"images must have pixels, got sizes down to {height.min()} x {width.min()}"
        )
    numbers = uniforms(stream, 4 * _ATTEMPTS).reshape(-1, _ATTEMPTS, 4)
    share = scale[0] + (scale[1] - scale[0]) * numbers[..., 0]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * numbers[..., 1])
    area = (height * width)[:, None] * share
    wide = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tall = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (wide > 0) & (wide <= width[:, None]) & (tall > 0) & (tall <= height[:, None])
    chosen = np.arange(len(stream)), fits.argmax(axis=1)
    wide, tall = wide[chosen], tall[chosen]
    top = np.floor(numbers[..., 2][chosen] * (height - tall + 1)).astype(np.int64)
    left = np.floor(numbers[..., 3][chosen] * (width - wide + 1)).astype(np.int64)
    boxes = np.stack((top, left, top + tall, left + wide), axis=-1)
    missed = ~fits.any(axis=1)
    boxes[missed] = _central_boxes(height[missed], width[missed], ratio)
    return boxes


def flips(stream: Streams) -> NDArray[np.bool_]:
    """Whether each crop is mirrored left to right, with probability 1/2.

    Args:
        stream: uint64 (B,), from ``streams(seed, Purpose.FLIP, epoch, index)``.

    Returns:
        bool (B,).
    """
    return np.asarray(uniforms(stream, 1)[..., 0] < 0.5)


def crop_image(image: Pixels, box: Boxes, size: tuple[int, int], flip: bool) -> Pixels:
    """Cut a box out of an image, resample it to a size, and mirror it if asked.

    The pixels of torchvision's ``resized_crop`` of a PIL image up to rounding (98 % of the values
    of photographs are the same, nearly all others a level off): bicubic with antialiasing, which
    sees nothing outside the box.

    Args:
        image: uint8 (H, W, 3), RGB; it may be read-only.
        box: int64 (4,), (top, left, bottom, right) inside the image.
        size: (h, w) of the result, pixels.
        flip: Mirror the result left to right.

    Returns:
        uint8 (h, w, 3), contiguous.

    Raises:
        ValueError: The image is of another kind, or the box is empty or leaves it.
    """
    _check_image(image)
    _check_boxes(np.asarray(box)[None], np.array([image.shape[:2]]))
    top, left, bottom, right = (int(edge) for edge in box)
    cut = image[top:bottom, left:right]
    if not cut.flags.writeable:  # torch takes no read-only array
        cut = cut.copy()
    # The batch axis before the permutation: else the layout is not seen to be channels last.
    planes = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    upright = resized.flip(3) if flip else resized
    return upright[0].permute(1, 2, 0).contiguous().numpy()


def crop_maps(
    maps: NDArray[Value],
    boxes: Boxes,
    sizes: NDArray[np.int64],
    grid: tuple[int, int],
    flips: NDArray[np.bool_],
) -> NDArray[Value]:
    """The value of each patch of each crop: the place of the map nearest to the patch's centre.

    Computed in integers, so it is exact.  A centre just between two places takes the lower or
    right one, before the flip.

    Args:
        maps: (B, g_h, g_w) of any dtype, maps of the whole images.
        boxes: int64 (B, 4), (top, left, bottom, right) inside the images.
        sizes: Integers (B, 2), (H, W) of the images that the boxes are in, pixels.
        grid: (h, w), patches of a crop.
        flips: bool (B,), whether each crop is mirrored.

    Returns:
        (B, h, w) of the dtype of the maps.

    Raises:
        ValueError: An argument has another shape, or a box leaves its image.
    """
    count = len(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be (B, g_h, g_w), got {maps.shape}")
    if boxes.shape != (count, 4) or sizes.shape != (count, 2) or flips.shape != (count,):
        raise ValueError(
            f"{count} maps need boxes ({count}, 4), sizes ({count}, 2) and flips ({count},), "
            f"got {boxes.shape}, {sizes.shape} and {flips.shape}"
        )
    _check_boxes(boxes, sizes)
    rows = _nearest_places(boxes[:, 0], boxes[:, 2], sizes[:, 0], maps.shape[1], grid[0])
    columns = _nearest_places(boxes[:, 1], boxes[:, 3], sizes[:, 1], maps.shape[2], grid[1])
    columns = np.where(flips[:, None], columns[:, ::-1], columns)
    return maps[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def evaluation_crop(image: Pixels, size: tuple[int, int], ratio: float = 224 / 256) -> Pixels:
    """The centre of an image, as MAE and timm evaluate: resize, then cut ``size`` out.

    The image is resized, aspect kept, until it just covers ``size`` / ``ratio``; for a square
    size its short side becomes floor(size / ratio).  The same pixels as torchvision's Resize
    (bicubic) and CenterCrop of a PIL image.

    Args:
        image: uint8 (H, W, 3), RGB.
        size: (h, w) of the result, pixels.
        ratio: Share of the resized image's short side that is kept, in (0, 1].

    Returns:
        uint8 (h, w, 3), contiguous.

    Raises:
        SettingError: ``ratio`` is out of range.
        ValueError: The image is of another kind.
    """
    _check_image(image)
    if not 0 < ratio <= 1:
        raise SettingError(f"ratio of an evaluation crop must be above 0 up to 1, got {ratio}")
    height, width = image.shape[:2]
    tall, wide = (math.floor(side / ratio) for side in size)
    if tall * width >= wide * height:
        wide = tall * width // height
    else:
        tall = wide * height // width
    resized = _resample(image, (tall, wide))
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    return np.ascontiguousarray(resized[top : top + size[0], left : left + size[1]])


def squash(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The whole image resized to a size, aspect not kept: the geometry of part maps.

    Args:
        image: uint8 (H, W, 3), RGB.
        size: (h, w) of the result, pixels.

    Returns:
        uint8 (h, w, 3), bicubic with antialiasing.

    Raises:
        ValueError: The image is of another kind.
    """
    _check_image(image)
    return _resample(image, size)


def _central_boxes(
    height: NDArray[np.int64], width: NDArray[np.int64], ratio: tuple[float, float]
) -> Boxes:
    """The largest centred box of each image, its aspect clipped into ``ratio``; int64 (B, 4)."""
    aspect = width / height
    tall = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height).astype(np.int64)
    wide = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width).astype(np.int64)
    # A bound near 0 or far above 1 rounds to no pixels in an image one pixel wide or tall.
    tall, wide = np.maximum(tall, 1), np.maximum(wide, 1)
    top, left = (height - tall) // 2, (width - wide) // 2
    return np.stack((top, left, top + tall, left + wide), axis=-1)


def _nearest_places(
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    extent: NDArray[np.int64],
    places: int,
    patches: int,
) -> NDArray[np.int64]:
    """Along one axis, the place that holds each patch's centre; int64 (B, patches).

    Patch i has its centre at start + (2 i + 1) (stop - start) / (2 patches) pixels of ``extent``.
    """
    odd = 2 * np.arange(patches, dtype=np.int64) + 1
    centre = 2 * patches * start[:, None] + odd * (stop - start)[:, None]
    return centre * places // (2 * patches * extent[:, None])


def _resample(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Bicubic with antialiasing, by PIL; ``size`` is (h, w)."""
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(resized)


def _check_image(image: Pixels) -> None:
    """Raise unless the image is uint8 RGB with its channels last."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")


def _check_boxes(boxes: Boxes, sizes: NDArray[np.int64]) -> None:
    """Raise unless every box has pixels and lies inside its image."""
    start, stop = boxes[:, :2], boxes[:, 2:]
    bad = ((start < 0) | (start >= stop) | (stop > sizes)).any(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"a box (top, left, bottom, right) must have pixels and lie inside its image of "
            f"{sizes[row, 0]} x {sizes[row, 1]}, got {boxes[row].tolist()} in row {row}"
        )


def _check_range(name: str, pair: tuple[float, float], limit: float) -> None:
    """Raise unless the pair ascends and lies in (0, limit]."""
    if not 0 < pair[0] <= pair[1] <= limit:
        raise SettingError(
            f"{name} of a crop must be (least, largest) above 0 and up to {limit}, got {pair}"
        )
