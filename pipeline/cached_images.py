"""Images as the cache of a part store keeps them: made small for it, and read from it.

Legend: (H, W) pixels of a decoded image, (h, w) of the one that is kept.
"""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from ..storage.image_cache import CachedImage
from ..storage.part_store import PartStore
from .crops import Pixels, crop_image
from .image_source import ImageSource
from .plan import Plan

QUALITY, SUBSAMPLING = 90, "420"
"""Of kept JPEGs.  Photographs at short side 256 take 30 kB and are 34.7 dB from their pixels (39.7
in luma).  Quality 95 takes 42 % more bytes and 22 % more time to decode for 1.7 dB (3.8 in luma),
colour at full resolution 25 % and 35 % for 2.3 (none in luma)."""

_LONGEST = 65_500
"""Pixels of a side, at most: what JPEG can hold."""

RECIPES = {
    "jpeg": f"bicubic, antialiased; JPEG of quality {QUALITY}, {':'.join(SUBSAMPLING)}",
    "raw": "bicubic, antialiased",
}
"""How each format is made; part of the identity of a store."""


def kept_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size that an image is kept at: its short side is ``side``, where it is not smaller already.

    The long side follows, rounded down as torchvision's Resize does; an image whose long side would
    be more than `_LONGEST` pixels is made smaller still.

    Args:
        height: H.
        width: W.
        side: Short side of the kept images, pixels.

    Returns:
        (h, w).
    """
    short, long = min(height, width), max(height, width)
    if short > side:
        short, long = side, long * side // short
    if long > _LONGEST:
        short, long = max(short * _LONGEST // long, 1), _LONGEST
    return (short, long) if height <= width else (long, short)


def kept_image(data: bytes, image: Pixels, side: int, form: str) -> CachedImage:
    """What a cache keeps of an image: resampled as crops are (`crop_image`), never enlarged.

    A JPEG that needs no resize keeps its own bytes, where they give the same pixels again (an
    image that EXIF turns, or that is no RGB, may not).

    Args:
        data: The encoded image.
        image: What it decodes to, uint8 (H, W, 3).
        side: Short side of the kept images, pixels.
        form: ``"jpeg"`` keeps a JPEG (`QUALITY`, `SUBSAMPLING`), ``"raw"`` the pixels.

    Returns:
        The image to keep; (h, w) is `kept_size`.
    """
    height, width = image.shape[:2]
    size = kept_size(height, width, side)
    whole = np.array([0, 0, height, width])
    small = image if size == (height, width) else crop_image(image, whole, size, flip=False)
    if form == "raw":
        return CachedImage(small, *size)
    if small is image and data[:2] == b"\xff\xd8" and _decodes_to(data, image):
        return CachedImage(data, *size)
    encoded = simplejpeg.encode_jpeg(small, QUALITY, "RGB", SUBSAMPLING)
    return CachedImage(encoded, *size)


def _decodes_to(data: bytes, image: Pixels) -> bool:
    try:
        return np.array_equal(simplejpeg.decode_jpeg(data), image)
    except ValueError:
        return False


class CachedImages(ImageSource):
    """Images of chosen rows of a plan as a part store keeps them, by position among the chosen.

    Args:
        plan: The images.
        rows: Rows of the plan that count, int64 (N,), all of which the store found good.
        store: The store.
        places: Row of each of those images in the store, int64 (N,).

    Raises:
        MissingError: The store keeps no images.
    """

    def __init__(
        self,
        plan: Plan,
        rows: NDArray[np.int64],
        store: PartStore,
        places: NDArray[np.int64],
    ) -> None:
        super().__init__(plan, rows)
        self._store, self._places = store, places
        self.cache = store.image_cache()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedImages, (self.plan, self.rows, self._store, self._places)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the plan, the chosen rows and the store, whose record covers its images."""
        told = f"{super().fingerprint} cache {self._store.fingerprint}"
        return hashlib.sha256(told.encode()).hexdigest()

    def warm(self) -> None:
        """Load what forked workers should share (`ImageCache.warm`)."""
        self.cache.warm()

    @property
    def slow_in_random_order(self) -> str:
        """Nothing is: each is read by itself."""
        return ""

    def decoded(self, position: int) -> Pixels:
        """One image at the size that it is kept at, uint8 (h, w, 3); it may be read-only.

        Raises:
            DamageError: The cache is not what was written.
        """
        index = int(self._places[position])
        data = self.cache.read(index)
        if data.ndim == 3:
            return data
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data)
        except ValueError:
            raise self.cache.damage(index, "cannot be decoded") from None
        return pixels
