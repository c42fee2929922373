"""Images of true part labels: where they lie, how they are read, the label of each patch.

One PNG an image of the data, of one channel or with a palette; a pixel's value is its label.

Legend: N images, (H, W) pixels, (h, w) patches.
"""

import contextlib
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DamageError, MismatchError, MissingError
from ..pipeline.decoding import BadImage
from ..pipeline.image_source import ImageSource
from .evals.metrics import majority_labels

Labels = NDArray[np.uint8]

_PARQUET_ROW = re.compile(r"\.parquet#\d+$", re.IGNORECASE)

_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow's modes of images whose values can be part ids."""

_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged images."""

_LOOKED_AT = 32
"""Images whose shape is held against that of their label images: those of a folder are alike."""


def label_path(folder: Path, key: str) -> Path:
    """Where the true parts of an image lie.

    Args:
        folder: Of all label images.
        key: Of the image: ``train/cat/x.jpg`` has ``train/cat/x.png``, ``x.parquet#5`` in Parquet
            has ``x.parquet#5.png``, and ``x.tar#cat/5.jpg`` in a tar has ``x.tar#cat/5.png``.
    """
    return folder / (f"{key}.png" if _PARQUET_ROW.search(key) else Path(key).with_suffix(".png"))


def read_label_file(path: Path) -> bytes:
    """The encoded bytes of a label image.

    Raises:
        MissingError: There is no such file.
        DamageError: The system cannot read it.
    """
    if not path.is_file():
        raise MissingError(f"no label image at {path}: expected one for each image, as PNG")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamageError(f"the label image {path} cannot be read: {error.strerror}") from error


def decode_label_map(data: bytes, path: Path) -> Labels:
    """The labels of all pixels of a label image.

    Args:
        data: The encoded file: one channel, whose values are the labels, 0 to 255; or a palette.
        path: Where it lies, for messages.

    Returns:
        uint8 (H, W), the size of the label image.

    Raises:
        DamageError: It is no image, damaged, or has colours or values above 255.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            mode, values = image.mode, np.asarray(image)
    except _BROKEN as error:
        raise DamageError(
            f"the label image {path} is damaged, or no image: write it anew"
        ) from error
    if mode not in _ONE_CHANNEL or int(values.max()) > 255 or int(values.min()) < 0:
        raise DamageError(
            f"the label image {path} has mode {mode} and values up to {values.max()}: expected "
            "one channel, or a palette, whose values are the labels, 0 to 255"
        )
    return values.astype(np.uint8)


def squash_labels(label_map: Labels, image_size: tuple[int, int]) -> Labels:
    """A label map squashed as a store squashes images, each pixel the one its centre falls on.

    Args:
        label_map: uint8 (H, W).
        image_size: Height and width of the result, pixels.

    Returns:
        uint8 of shape ``image_size``.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip(image_size, label_map.shape, strict=True)
    )
    return label_map[np.ix_(rows, columns)]


def read_label_map(path: Path, image_size: tuple[int, int] | None = None) -> Labels:
    """One label image, squashed as a store squashes images, nearest pixel.

    Args:
        path: A PNG as in `decode_label_map`.
        image_size: (H, W) of the result; None keeps the size of the label image.

    Returns:
        uint8 (H, W).

    Raises:
        MissingError: There is no such file.
        DamageError: It is no image, damaged, or has colours or values above 255.
    """
    label_map = decode_label_map(read_label_file(path), path)
    return label_map if image_size is None else squash_labels(label_map, image_size)


def patch_labels(label_map: Labels, grid: tuple[int, int]) -> Labels:
    """Majority label of each patch; the lowest label wins a tie.

    Args:
        label_map: uint8 (H, W), multiples of the grid.
        grid: (h, w), patches.

    Returns:
        uint8 (h, w).

    Raises:
        MismatchError: The grid does not divide the map.
    """
    return majority_labels(label_map, grid, int(label_map.max()) + 1)


def label_share(label_map: Labels, patches: Labels) -> float:
    """Share of a patch's pixels that have the patch's label, mean over patches, in (0, 1].

    Args:
        label_map: uint8 (H, W).
        patches: uint8 (h, w), the label of each patch; h divides H, w divides W.
    """
    tall, wide = (n // m for n, m in zip(label_map.shape, patches.shape, strict=True))
    return float((label_map == patches.repeat(tall, axis=0).repeat(wide, axis=1)).mean())


def true_labels(
    folder: Path,
    keys: list[str],
    grid: tuple[int, int],
    image_size: tuple[int, int] | None = None,
) -> Labels:
    """Majority label of each patch of some images.

    Args:
        folder: Of label images, at `label_path`.
        keys: Of the images.
        grid: (h, w), patches.
        image_size: (H, W) that images were squashed to, a multiple of the grid; None if the label
            images are multiples as they are.

    Returns:
        uint8 (N, h, w).

    Raises:
        MissingError: An image has no label image.
        DamageError: A label image is none.
        MismatchError: The grid does not divide the image size.
    """
    paths = (label_path(folder, key) for key in keys)
    return np.stack([patch_labels(read_label_map(path, image_size), grid) for path in paths])


def require_label_folder(folder: Path) -> None:
    """Refuse labels that are not there at all.

    Raises:
        MissingError: There is no such folder.
    """
    if not folder.is_dir():
        raise MissingError(
            f"--labels is {folder}, where there is no folder: expected the folder of the label "
            "images"
        )


def labels_of(
    folder: Path,
    images: ImageSource,
    positions: NDArray[np.int64],
    grid: tuple[int, int],
    image_size: tuple[int, int],
) -> Labels:
    """The true labels of some images, found right before anything is made of the images.

    Args:
        folder: Of label images.
        images: The images.
        positions: Which of them, (N,).
        grid: (h, w), patches.
        image_size: (H, W) that images are squashed to, a multiple of the grid.

    Returns:
        uint8 (N, h, w); 0 for an image that cannot be read and has no label image.

    Raises:
        MissingError: There is no such folder, or an image that can be read has no label image.
        DamageError: A label image is none.
        MismatchError: As `refuse_other_shapes`.
    """
    require_label_folder(folder)
    keys = images.names(positions)
    there = np.array([label_path(folder, key).is_file() for key in keys])
    for place in np.flatnonzero(~there).tolist():
        with contextlib.suppress(BadImage):
            images.decoded(int(positions[place]))
            read_label_file(label_path(folder, keys[place]))
    refuse_other_shapes(folder, images, positions[there], grid)
    found = np.zeros((len(keys), *grid), dtype=np.uint8)
    if there.any():
        known = [keys[place] for place in np.flatnonzero(there).tolist()]
        found[there] = true_labels(folder, known, grid, image_size)
    return found


def refuse_other_shapes(
    folder: Path, images: ImageSource, positions: NDArray[np.int64], grid: tuple[int, int]
) -> None:
    """Refuse label images that were made of other images, as their shape tells.

    A label image may have any resolution, in the shape of its image or, as of squashed images, of
    the grid, each to a tenth or a pixel.  The first `_LOOKED_AT` of the images are looked at.

    Args:
        folder: Of label images.
        images: The images.
        positions: Of those that have one.
        grid: (h, w), patches.

    Raises:
        MismatchError: A label image has another shape.
    """
    looked_at = positions[:_LOOKED_AT]
    for position, key in zip(looked_at.tolist(), images.names(looked_at), strict=True):
        path = label_path(folder, key)
        height, width = read_label_map(path).shape
        try:
            tall, wide = images.decoded(position).shape[:2]
        except BadImage:
            continue
        if not any(_fits((height, width), shape) for shape in ((tall, wide), grid)):
            raise MismatchError(
                f"the label image {path} is {height} x {width} (height x width), and its image "
                f"{tall} x {wide}: expected the same shape, in any resolution; name the label "
                "images of these very images, as --labels"
            )


def _fits(sides: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether sides are those of a shape at some resolution."""
    expected = sides[0] * shape[1] / shape[0]
    return abs(sides[1] - expected) <= max(1.0, 0.1 * expected)
