"""`semmae parts show`, `semmae masks show` and `semmae stage2 show`: look at what was made."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MissingError, UserError
from ..models.autoencoder import MaskedAutoencoder
from ..pipeline.crops import evaluation_crop
from ..pipeline.decoding import BadImage, decode_image
from ..pipeline.mask_counts import Masks, visible_count
from ..pipeline.mask_policies import POLICIES, MaskPolicy, MaskRequest
from ..pipeline.masks import random_masks
from ..pipeline.options import require
from ..pipeline.part_maps import read_maps
from ..pipeline.plan import Plan
from ..pipeline.randomness import Purpose, streams
from ..pipeline.sources import ImageReader, Split, list_images
from ..pipeline.stored_images import store_images
from ..storage.part_identity import StoreIdentity
from ..storage.part_store import PartStore
from ..storage.store_paths import StorePath, sizes_below
from .networks import open_autoencoder
from .pictures import (
    bands,
    colours_of,
    enlarged,
    headed,
    masked,
    overlay,
    save_picture,
    sheet,
    soft_overlay,
)
from .reconstructions import PICTURED, reconstruction_picture

SIDE = 128
"""Pixels of each image on a contact sheet."""

ALPHAS = (0.0, 0.25, 0.5, 1.0)
"""Points of the schedule that masks are drawn at, where the policy follows it."""


def _require_picture(output: Path, images: int, seed: int) -> None:
    expected = "a file whose name ends in .png"
    require(output.suffix.lower() == ".png", "output", output, expected)
    require(images >= 1, "images", images, "at least 1")
    require(0 <= seed < 2**63, "seed", seed, "0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class ShowPartsOptions:
    """Settings of `show_parts`."""

    parts: Annotated[StorePath, "A part store."]
    data: Annotated[str | None, "The images it was made from; without them, parts alone."] = None
    output: Annotated[Path, "PNG to write."]
    images: Annotated[int, "Images shown."] = 24
    seed: Annotated[int, "Of the choice of images."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _require_picture(self.output, self.images, self.seed)


@dataclass(frozen=True, kw_only=True)
class ShowMasksOptions:
    """Settings of `show_masks`."""

    parts: Annotated[StorePath, "A part store."]
    data: Annotated[str, "The images it was made from."]
    output: Annotated[Path, "PNG to write."]
    images: Annotated[int, "Images shown."] = 8
    mask_ratio: Annotated[float, "Share of patches masked."] = 0.75
    seed: Annotated[int, "Of the choice of images, and of masks."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _require_picture(self.output, self.images, self.seed)
        require(0 <= self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "from 0 to below 1")


def parts_info(path: StorePath) -> dict[str, Any]:
    """What a part store holds, in a few figures.

    Returns:
        Counts, grid, share of the patches by part, mean confidence, and bytes of labels an image.
    """
    store = PartStore.open(path)
    identity, ok = store.identity, store.ok()
    labels = store.labels()[ok]
    shares = np.bincount(labels.ravel(), minlength=identity.parts)[: identity.parts]
    confidence = store.meta(["confidence"]).to_pandas()["confidence"]
    size = sum(sizes_below(path / "parts.zarr" / "labels").values())
    return {
        "images": identity.images,
        "bad images": int((~ok).sum()),
        "grid": f"{identity.grid[0]} x {identity.grid[1]}",
        "parts": identity.parts,
        "background": "none" if identity.background is None else f"part {identity.background}",
        "share by part, %": ", ".join(f"{100 * s:.1f}" for s in shares / max(shares.sum(), 1)),
        "mean confidence": round(float(confidence.mean()), 3),
        "shards": f"{identity.shards} of {identity.shard_size} images",
        "label bytes an image": round(size / identity.images, 1),
        "image cache": _cache(identity),
        "made by": _origin(identity),
    }


def _cache(identity: StoreIdentity) -> str:
    """How a store keeps the images."""
    side = identity.image_cache_side
    return f"{identity.image_cache}, short side {side}" if identity.image_cache else "none"


def _origin(identity: StoreIdentity) -> str:
    """What the parts of a store come from, by the start of its hash."""
    imported = "labels" in identity.preprocessing
    return f"{'label images' if imported else 'learner'} {identity.learner_hash[:12]}"


def _first_readable(
    plan: Plan, order: NDArray[np.int64], count: int
) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """The first ``count`` images of an order that can be read, with their pixels."""
    reader = ImageReader(plan)
    indices: list[int] = []
    pixels: list[NDArray[np.uint8]] = []
    for index in order.tolist():
        if len(indices) == count:
            break
        with contextlib.suppress(BadImage):
            pixels.append(decode_image(reader.read(index)))
            indices.append(index)
    return indices, pixels


def _good(store: PartStore, seed: int) -> NDArray[np.int64]:
    """The good images of a store, in random order."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(store.ok()))


def _chosen(
    store: PartStore, data: str, count: int, seed: int
) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Some good images of a store, drawn at random, with their pixels."""
    indices, pixels = _first_readable(store_images(store, data), _good(store, seed), count)
    if not indices:
        raise MissingError(
            f"not one image of {store.path} can be read in {data}: expected the images that the "
            "store was made from"
        )
    return indices, pixels


def show_parts(options: ShowPartsOptions) -> Path:
    """Draw images of a store under the colours of their parts; returns the PNG's path.

    Where the store keeps probabilities, the soft parts stand under the hard ones.  Without the
    images, the hard parts are drawn alone.
    """
    store = PartStore.open(options.parts)
    labels = store.labels()
    colours = colours_of(store.identity.parts, store.identity.background)
    if options.data is None:
        blank = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        chosen = _good(store, options.seed)[: options.images].tolist()
        if not chosen:
            raise MissingError(f"every image of {store.path} is bad: expected one with parts")
        rows = [[overlay(blank, np.asarray(labels[i]), colours, 1.0) for i in chosen]]
    else:
        indices, pixels = _chosen(store, options.data, options.images, options.seed)
        images = [enlarged(image, SIDE) for image in pixels]
        each = list(zip(images, indices, strict=True))
        rows = [images, [overlay(image, np.asarray(labels[i]), colours) for image, i in each]]
        if store.identity.probabilities:
            maps = store.probabilities()
            rows.append([soft_overlay(image, np.asarray(maps[i]), colours) for image, i in each])
    save_picture(options.output, bands(rows, 8, SIDE))
    return options.output


def show_masks(options: ShowMasksOptions) -> Path:
    """Draw the masks of every policy at points of the schedule; returns the PNG's path.

    Columns: the image, its parts, and for each policy its masks of the whole image, at each of
    `ALPHAS` where the policy follows the schedule.  A policy that this store cannot serve is named
    on standard error instead.
    """
    store = PartStore.open(options.parts)
    indices, pixels = _chosen(store, options.data, options.images, options.seed)
    grid = store.identity.grid
    labels = np.stack([np.asarray(store.labels()[index]) for index in indices])
    colours = colours_of(store.identity.parts, store.identity.background)
    columns: dict[str, Masks] = {}
    for name, policy in POLICIES.items():
        try:
            columns.update(_columns(name, policy, store, indices, options))
        except UserError as error:
            print(f"no masks of --masking {name}: {error}", file=sys.stderr)
    rows = []
    for row, image in enumerate(enlarged(image, SIDE) for image in pixels):
        seen = [masked(image, masks[row], grid) for masks in columns.values()]
        rows.append([image, overlay(image, labels[row], colours), *seen])
    save_picture(options.output, headed(sheet(rows), ["image", "parts", *columns]))
    return options.output


def _columns(
    name: str,
    policy: MaskPolicy,
    store: PartStore,
    indices: list[int],
    options: ShowMasksOptions,
) -> dict[str, Masks]:
    """The masks of a policy for some images of a store, by heading."""
    good = np.flatnonzero(store.ok())
    maps = None
    if policy.reads is not None:
        of_all = read_maps(store, policy.reads, good, options.seed)
        maps = of_all.of(np.searchsorted(good, indices).tolist())
    return {
        f"{name} {alpha:g}" if policy.scheduled else name: policy.masks(
            MaskRequest(
                grid=store.identity.grid,
                mask_ratio=options.mask_ratio,
                alpha=np.full(len(indices), alpha),
                stream=streams(options.seed, Purpose.MASK, 0, indices),
                maps=maps,
                parts=store.identity.parts,
            )
        )
        for alpha in (ALPHAS if policy.scheduled else ALPHAS[:1])
    }


@dataclass(frozen=True, kw_only=True)
class ShowReconstructionsOptions:
    """Settings of `show_reconstructions`."""

    run: Annotated[Path, "Folder of a pretraining run."]
    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    output: Annotated[Path, "PNG to write."]
    split: Annotated[Split, "Which images of the data."] = "all"
    images: Annotated[int, "Images shown."] = PICTURED
    mask_ratio: Annotated[float, "Share of patches masked, at random."] = 0.75
    seed: Annotated[int, "Of the choice of images, and of masks."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _require_picture(self.output, self.images, self.seed)
        require(0 <= self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "from 0 to below 1")


def show_reconstructions(options: ShowReconstructionsOptions) -> Path:
    """Draw what a run makes of masked images; returns the PNG's path."""
    model: MaskedAutoencoder = open_autoencoder(options.run)
    shape = model.architecture
    plan = list_images(options.data, options.split)
    order = np.random.default_rng(options.seed).permutation(len(plan))
    indices, pixels = _first_readable(plan, order, options.images)
    if not pixels:
        raise MissingError(f"not one image of {options.data} can be read")
    patches = shape.grid[0] * shape.grid[1]
    stream = streams(options.seed, Purpose.MASK, 0, indices)
    masks = torch.from_numpy(random_masks(patches, options.mask_ratio, stream))
    crops = [evaluation_crop(image, shape.image_size) for image in pixels]
    images = torch.from_numpy(np.stack(crops))
    visible = visible_count(patches, options.mask_ratio)
    save_picture(options.output, reconstruction_picture(model, images, masks, visible))
    return options.output
