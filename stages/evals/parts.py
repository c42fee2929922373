"""`semmae eval parts`: measure the parts of a store, beside the baselines that need no learning."""

import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.cluster import KMeans

from ...errors import DamageError, MismatchError, MissingError, SettingError
from ...pipeline.crops import squash
from ...pipeline.decoding import BadImage, decode_image
from ...pipeline.options import require, require_finite
from ...pipeline.plan import Plan
from ...pipeline.progress import Progress
from ...pipeline.sources import ImageReader
from ...pipeline.stored_images import store_images
from ...storage.checkpoints import file_hash
from ...storage.part_store import PartStore
from .metrics import (
    ari,
    ari_inside_images,
    coherence,
    dead_parts,
    fg_ari,
    fg_nmi,
    fixed_grid,
    information_share,
    majority_labels,
    nmi,
)
from .records import keep_result, pinned

Labels = NDArray[np.uint8]

_PARQUET_ROW = re.compile(r"\.parquet#\d+$", re.IGNORECASE)

_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow's modes of images whose values can be part ids."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises on damaged images."""


@dataclass(frozen=True, kw_only=True)
class PartsOptions:
    """Settings of `evaluate_parts`."""

    parts: Annotated[Path, "Part store to measure."]
    output: Annotated[Path, "Results folder; each evaluation adds a record."]
    data: Annotated[str | None, "The images it was made from; needed with labels alone."] = None
    labels: Annotated[
        Path | None,
        "Folder of true part labels: PNGs named as the images (x.parquet#5.png in Parquet).",
    ] = None
    images: Annotated[int, "Images measured, the first good ones."] = 2000
    seed: Annotated[int, "Of the colour clusters."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        require_finite(self)
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        if self.labels is not None and self.data is None:
            raise SettingError(
                "--labels needs --data, the images that the store was made from: colour regions "
                "are compared with the labels beside the parts"
            )
        require(self.images >= 1, "images", self.images, "at least 1")


def label_path(folder: Path, key: str) -> Path:
    """Where the true parts of an image lie.

    Args:
        folder: Of all label images.
        key: Of the image: ``train/cat/x.jpg`` has ``train/cat/x.png``, and ``x.parquet#5`` in
            Parquet has ``x.parquet#5.png``.
    """
    return folder / (f"{key}.png" if _PARQUET_ROW.search(key) else Path(key).with_suffix(".png"))


def read_label_map(path: Path, image_size: tuple[int, int] | None = None) -> Labels:
    """One label image, squashed as the store squashes images, nearest pixel.

    Args:
        path: A PNG of one channel, whose values are the labels, 0 to 255; or of a palette.
        image_size: (H, W) of the result; None keeps the size of the label image.

    Returns:
        uint8 (H, W).

    Raises:
        MissingError: There is no such file.
        DamageError: It is no image, damaged, or has colours or values above 255.
    """
    if not path.is_file():
        raise MissingError(f"no label image at {path}: expected one for each image, as PNG")
    try:
        with Image.open(BytesIO(path.read_bytes())) as image:
            mode, values = image.mode, np.asarray(image)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DamageError(
            f"the label image {path} is damaged, or no image: write it anew"
        ) from error
    if mode not in _ONE_CHANNEL or int(values.max()) > 255 or int(values.min()) < 0:
        raise DamageError(
            f"the label image {path} has mode {mode} and values up to {values.max()}: expected "
            "one channel, or a palette, whose values are the labels, 0 to 255"
        )
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip(image_size or values.shape, values.shape, strict=True)
    )
    return values[np.ix_(rows, columns)].astype(np.uint8)


def true_labels(
    folder: Path,
    keys: list[str],
    grid: tuple[int, int],
    image_size: tuple[int, int] | None = None,
) -> Labels:
    """Majority label of each patch.

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
    found = []
    for key in keys:
        label_map = read_label_map(label_path(folder, key), image_size)
        found.append(majority_labels(label_map, grid, int(label_map.max()) + 1))
    return np.stack(found)


def colour_clusters(images: list[NDArray[np.uint8]], parts: int, seed: int) -> Labels:
    """k-means of patch colours inside each image, uint8 (N, L); a baseline of regions."""
    made = [
        KMeans(parts, n_init=1, random_state=seed).fit_predict(image.reshape(-1, 3).astype(float))
        for image in images
    ]
    return np.stack(made).astype(np.uint8)


def _patch_colours(
    plan: Plan, chosen: NDArray[np.int64], grid: tuple[int, int]
) -> tuple[NDArray[np.bool_], list[NDArray[np.uint8]]]:
    """Which of the chosen images can be read, (N,), and the colours of their patches."""
    reader, found = ImageReader(plan), []
    good = np.ones(len(chosen), dtype=np.bool_)
    with Progress("reading colours", len(chosen), "image") as progress:
        for place, index in enumerate(chosen):
            try:
                found.append(squash(decode_image(reader.read(int(index))), grid))
            except BadImage:
                good[place] = False
            progress.update()
    if not found:
        raise MissingError(f"not one of {len(chosen)} images in {plan.root} can be read")
    return good, found


def _against(
    found: NDArray[np.integer], true: NDArray[np.integer], prefix: str = ""
) -> dict[str, float]:
    """How well parts agree with the true ones, percent."""
    flat, truth = found.reshape(len(found), -1), true.reshape(len(true), -1)
    return {
        f"{prefix}fg_nmi": fg_nmi(flat, truth),
        f"{prefix}fg_ari": fg_ari(flat, truth),
        f"{prefix}nmi": nmi(flat, truth),
        f"{prefix}ari": ari(flat, truth),
        f"{prefix}in_image_ari": ari_inside_images(flat, truth),
        f"{prefix}in_image_fg_ari": ari_inside_images(flat, truth, foreground=True),
    }


def _inherent(labels: Labels, parts: int) -> dict[str, float]:
    """Measures that need no truth."""
    places = np.arange(labels[0].size)
    flat = labels.reshape(len(labels), -1)
    return {
        "coherence": coherence(labels),
        "dead_parts": float(len(dead_parts(labels, parts))),
        "position_share": information_share(flat, np.broadcast_to(places, flat.shape)),
    }


def store_hash(path: str) -> str:
    """SHA-256 of the ``complete.json`` of a store, which vouches for all that lasts in it."""
    return file_hash(PartStore.open(Path(path)).path / "complete.json")


def _beside_truth(
    store: PartStore, plan: Plan, chosen: NDArray[np.int64], labels: Labels, options: PartsOptions
) -> dict[str, float]:
    """Agreement of the parts, of a fixed grid and of colour regions with the true parts."""
    assert options.labels is not None
    grid, parts = store.identity.grid, store.identity.parts
    keys = plan.keys[chosen].tolist()
    true = true_labels(options.labels, keys, grid, store.identity.image_size)
    cells = np.broadcast_to(fixed_grid(*grid, parts), (len(true), grid[0] * grid[1]))
    good, colours = _patch_colours(plan, chosen, grid)
    regions = colour_clusters(colours, parts, options.seed)
    bad = {} if good.all() else {"bad_images": float((~good).sum())}
    return {
        **_against(labels, true),
        **_against(cells, true, "grid."),
        **_against(regions, true[good], "colour."),
        **bad,
    }


def measure_parts(options: PartsOptions) -> dict[str, float]:
    """Measure the parts of a store; no record is written.

    Args:
        options: The settings.

    Returns:
        Percent: ``coherence``, ``position_share``; with true labels ``fg_nmi``, ``fg_ari``,
        ``nmi``, ``ari``, ``in_image_ari``, ``in_image_fg_ari``, and those of ``grid.`` (fixed) and
        ``colour.`` (k-means of colour inside each image).  Counts: ``dead_parts``, and
        ``bad_images``, which the colours lack, if there are any.

    Raises:
        MissingError: Store, data or labels are not there.
        MismatchError: The store holds no good image, or was made from other images.
        DamageError: A label image is none.
    """
    store = PartStore.open(options.parts)
    plan = None
    if options.labels is not None and options.data is not None:
        plan = store_images(store, options.data)
    chosen = np.flatnonzero(store.ok())[: options.images]
    if not len(chosen):
        raise MismatchError(f"{options.parts} holds not one good image to measure")
    labels = np.asarray(store.labels()[chosen])
    metrics = _inherent(labels, store.identity.parts)
    if plan is not None:
        metrics.update(_beside_truth(store, plan, chosen, labels, options))
    return metrics


def evaluate_parts(options: PartsOptions) -> dict[str, float]:
    """Measure, keep the record, and return the metrics.

    Args:
        options: The settings.

    Returns:
        As `measure_parts`.

    Raises:
        SettingError: ``output`` is a file.
        UserError: As `measure_parts`.
    """
    options = pinned(options)
    fingerprint = store_hash(str(options.parts))
    metrics = measure_parts(options)
    keep_result("parts", options, str(options.parts), fingerprint, metrics)
    return metrics
