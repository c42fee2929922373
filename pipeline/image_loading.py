"""One image from its encoded bytes to the pixels that a network sees, or to why there are none."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..storage.image_cache import CachedImage
from .crops import squash
from .decoding import BadImage, decode_image
from .load_clock import LoadClock
from .sources import ImageReader


class LoadedImage(NamedTuple):
    """One image as it was read: its size and pixels, or why there are none."""

    pixels: NDArray[np.uint8] | None
    height: int | None
    width: int | None
    crc32: int
    bad: BadImage | None
    known: bool = False
    """Whether its bytes are those that were known; it has no pixels then."""
    kept: CachedImage | None = None
    """What the image cache of a store keeps of it."""


Keep = Callable[[bytes, NDArray[np.uint8]], CachedImage]
"""Makes what an image cache keeps of an image, from its encoded bytes and decoded pixels."""


def load_image(
    reader: ImageReader,
    index: int,
    image_size: tuple[int, int] | None = None,
    known: int | None = None,
    keep: Keep | None = None,
    clock: LoadClock | None = None,
) -> LoadedImage:
    """Read, check and decode one image.

    Args:
        reader: Of the images.
        index: Position in the plan.
        image_size: (H, W) that the pixels are squashed to; None keeps no pixels, only what is
            known of them.
        known: CRC-32 of encoded bytes that need not be decoded again, unless for ``keep``.
        keep: Of the store's image cache; None without one.
        clock: Told what reading and decoding take.

    Returns:
        ``pixels`` uint8 (H, W, 3) or None, height and width of the whole image, CRC-32 of its
        encoded bytes (0 if they cannot be read), for a bad image why it is, and what ``keep`` made.
    """
    clock, checksum, same = clock or LoadClock(), 0, False
    try:
        with clock.reading():
            data = reader.read(index)
        checksum = zlib.crc32(data)
        same = checksum == known
        if same and keep is None:
            return LoadedImage(None, None, None, checksum, None, known=True)
        with clock.decoding(lambda: reader.plan.key(index)):
            image = decode_image(data)
            kept = None if keep is None else keep(data, image)
            if same:
                return LoadedImage(None, None, None, checksum, None, known=True, kept=kept)
            pixels = None if image_size is None else squash(image, image_size)
    except BadImage as bad:
        return LoadedImage(None, None, None, checksum, None if same else bad, known=same)
    return LoadedImage(pixels, image.shape[0], image.shape[1], checksum, None, kept=kept)
