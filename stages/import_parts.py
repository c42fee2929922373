"""`semmae parts import`: a part store from label images, such as true parts or maps of one's own.

It gives the upper bound of stage 2: masks that follow true parts.

Legend: N images, (h, w) patches.
"""

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingError, SettingError
from ..pipeline.cached_images import RECIPES, kept_image
from ..pipeline.image_loading import LoadedImage, load_image
from ..pipeline.image_source import ImageSource
from ..pipeline.options import parse_sides, require
from ..pipeline.plan import Plan
from ..pipeline.progress import Progress
from ..pipeline.sources import ImageReader, Split, list_images
from ..pipeline.watching import Watch
from ..storage.image_cache import write_image_cache
from ..storage.lookahead import done_ahead
from ..storage.part_identity import UNLABELLED, CacheFormat, StoreIdentity, shard_size_for
from ..storage.store_paths import StorePath
from .label_images import (
    decode_label_map,
    label_path,
    label_share,
    patch_labels,
    read_label_file,
    refuse_other_shapes,
    require_label_folder,
    squash_labels,
)
from .store_filling import commit_shard, fill_store, meta_rows

PATCH = 16
"""Pixels of a patch, each way, that vote for its label once the label image is squashed."""

_HASH_LAYOUT = b"semmae label images 1"
_NO_FILE = bytes(32)


@dataclass(frozen=True, kw_only=True)
class ImportPartsOptions:
    """Settings of `import_parts`."""

    labels: Annotated[
        Path, "Folder of label images: PNGs named as the images (x.parquet#5.png in Parquet)."
    ]
    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    output: Annotated[StorePath, "Folder or URL of the part store."]
    split: Annotated[Split, "Which images of the data."] = "train"
    grid: Annotated[str, "Patches of a part map: 14, or 14x20 (down x across)."] = "14"
    background: Annotated[int, "Label of the background; -1: there is none."] = 0
    num_parts: Annotated[
        int | None, "Parts, background included; default: the largest label + 1."
    ] = None
    cache_images: Annotated[
        int, "Short side in pixels of a cache of the images kept in the store; 0: none."
    ] = 0
    cache_format: Annotated[CacheFormat, "Of that cache: JPEG, or uint8 pixels."] = "jpeg"
    decode_threads: Annotated[int, "Threads that read and decode images."] = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: A field is out of range.
        """
        fits = all(1 <= side <= 256 for side in self.patches)
        require(fits, "grid", self.grid, "1 to 256, or two such as 14x20 (down x across)")
        require(self.cache_images >= 0, "cache_images", self.cache_images, "0 or more")
        require(self.decode_threads >= 1, "decode_threads", self.decode_threads, "at least 1")
        if self.num_parts is not None:
            require(
                1 <= self.num_parts <= UNLABELLED, "num_parts", self.num_parts, f"1 to {UNLABELLED}"
            )
        top = (self.num_parts or UNLABELLED) - 1
        expected = f"a label, 0 to {top}, or -1 for none"
        require(-1 <= self.background <= top, "background", self.background, expected)

    @property
    def patches(self) -> tuple[int, int]:
        """(h, w)."""
        return parse_sides(self.grid)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that label images are squashed to, pixels."""
        return PATCH * self.patches[0], PATCH * self.patches[1]


class _PatchLabels(NamedTuple):
    """What the label image of one image says."""

    labels: NDArray[np.uint8]
    share: float
    largest: int
    digest: bytes


class _LabelSet(NamedTuple):
    """What all label images say: labels (N, h, w) uint8, shares (N,) float32."""

    labels: NDArray[np.uint8]
    shares: NDArray[np.float32]
    largest: int
    digest: str


def _image_labels(
    options: ImportPartsOptions, reader: ImageReader, index: int, key: str
) -> _PatchLabels:
    """The labels of one image; those of a bad image that has no label image are all 0."""
    grid = options.patches
    path = label_path(options.labels, key)
    try:
        data = read_label_file(path)
    except MissingError:
        # Who made maps of the images could make none of one that cannot be decoded.
        if load_image(reader, index).bad is None:
            raise
        return _PatchLabels(np.zeros(grid, dtype=np.uint8), 0.0, 0, _NO_FILE)
    label_map = decode_label_map(data, path)
    largest, limit = int(label_map.max()), options.num_parts or UNLABELLED
    if largest >= limit:
        cause = "a store holds" if options.num_parts is None else f"--num-parts {limit} allows"
        raise SettingError(
            f"the label image {path} holds label {largest}, but {cause} labels 0 to {limit - 1}: "
            "write it anew, or give a --num-parts that is large enough (at most 255)"
        )
    squashed = squash_labels(label_map, options.image_size)
    labels = patch_labels(squashed, grid)
    share = label_share(squashed, labels)
    return _PatchLabels(labels, share, largest, hashlib.sha256(data).digest())


def _read_labels(
    options: ImportPartsOptions, reader: ImageReader, pool: ThreadPoolExecutor
) -> _LabelSet:
    """Read every label image once: what is hashed is what is written.

    The labels stay in memory until they are, h w bytes an image (251 MB for ImageNet at 14 x 14).
    """
    images, keys = len(reader), reader.plan.keys
    labels = np.empty((images, *options.patches), dtype=np.uint8)
    shares = np.empty(images, dtype=np.float32)
    largest, digest = 0, hashlib.sha256(_HASH_LAYOUT)
    # By shards: a pool takes all it is given at once, and a million waiting calls are a gigabyte.
    block = shard_size_for(images)
    with Progress("reading labels", images, "image") as progress:
        for start in range(0, images, block):
            places = range(start, min(start + block, images))
            read = functools.partial(_image_labels, options, reader)
            found = pool.map(read, places, keys[start : start + block])
            for index, image in zip(places, found, strict=True):
                labels[index], shares[index] = image.labels, image.share
                largest = max(largest, image.largest)
                digest.update(image.digest)
                progress.update()
    return _LabelSet(labels, shares, largest, digest.hexdigest())


def _identity_of(options: ImportPartsOptions, plan: Plan, found: _LabelSet) -> StoreIdentity:
    """What makes the store of these settings and label images the store it is."""
    parts = options.num_parts or found.largest + 1
    expected = f"a label in {options.labels}, 0 to {parts - 1}, or -1 for none"
    require(options.background < parts, "background", options.background, expected)
    form = options.cache_format if options.cache_images else ""
    return StoreIdentity(
        images=len(plan),
        shard_size=shard_size_for(len(plan)),
        grid=options.patches,
        parts=parts,
        background=None if options.background < 0 else options.background,
        image_size=options.image_size,
        batch_size=1,
        dtype="uint8",
        device_type="cpu",
        plan_fingerprint=plan.fingerprint,
        learner_hash=found.digest,
        preprocessing={"geometry": "squash", "labels": "majority"},
        image_cache=form,
        image_cache_side=options.cache_images,
        image_cache_recipe=RECIPES[form] if form else "",
    )


def _load_shard(
    options: ImportPartsOptions, identity: StoreIdentity, reader: ImageReader, shard: int
) -> tuple[list[LoadedImage], dict[str, int] | None]:
    """What is known of the images of a shard, and of the file that caches them if there is one."""
    side, form = identity.image_cache_side, identity.image_cache
    keep = functools.partial(kept_image, side=side, form=form) if form else None
    load = functools.partial(load_image, reader, keep=keep)
    loaded = []
    with write_image_cache(options.output, identity, shard) as cache:
        for image in done_ahead(load, range(*identity.shard_range(shard)), options.decode_threads):
            if cache is not None:
                cache.extend([image.kept])
            loaded.append(image._replace(kept=None))
    return loaded, None if cache is None else cache.description


def import_parts(options: ImportPartsOptions) -> dict[str, Any]:
    """Make a part store from label images, or go on where an earlier call was interrupted.

    The label image of ``train/cat/x.jpg`` is ``train/cat/x.png`` in the folder of labels.  It is
    squashed, nearest pixel, to `PATCH` pixels a patch; a patch has its most frequent label, the
    lowest of equals.  The confidence of a map is the share of a patch's pixels that have the
    patch's label, mean over patches.  Where a learner's store has the hash of its weights, this one
    has the hash of the label images.  A bad image is a bad row and needs no label image.

    Nothing is written before every label image was read and found right.

    Args:
        options: The settings.

    Returns:
        The record ``complete.json``: ``images``, ``ok``, ``bad`` and checksums.

    Raises:
        MissingError: Labels or data are not there, or a readable image has no label image.
        DamageError: A label image is damaged or has colours; or a finished shard was damaged
            meanwhile.
        SettingError: A label is too large, the background is no label, or not one image can be
            read.
        MismatchError: The output holds a store of other images, labels or settings, or a label
            image has another shape than its image.
    """
    require_label_folder(options.labels)
    plan = list_images(options.data, options.split)
    reader = ImageReader(plan)
    reader.warm()
    with ThreadPoolExecutor(options.decode_threads) as pool:
        found = _read_labels(options, reader, pool)
        labelled = np.flatnonzero(found.shares > 0)
        refuse_other_shapes(options.labels, ImageSource(plan), labelled, options.patches)
        identity = _identity_of(options, plan, found)

        def work(shards: list[int], _watch: Watch) -> Iterator[dict[str, Any]]:
            for shard in shards:
                here = slice(*identity.shard_range(shard))
                loaded, cache = _load_shard(options, identity, reader, shard)
                labels, shares = found.labels[here], found.shares[here]
                rows = meta_rows(plan, here.start, loaded, labels, shares, identity.parts)
                yield commit_shard(options.output, shard, rows, cache, labels=labels)

        return fill_store("parts import", "importing parts", options, identity, plan, work)
