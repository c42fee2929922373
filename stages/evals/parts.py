"""`semmae eval parts`: measure the parts of a store, beside the baselines that need no learning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from ...errors import MismatchError, MissingError, SettingError
from ...pipeline.crops import squash
from ...pipeline.decoding import BadImage, decode_image
from ...pipeline.options import require, require_finite
from ...pipeline.plan import Plan
from ...pipeline.progress import Progress
from ...pipeline.sources import ImageReader
from ...pipeline.stored_images import store_images
from ...storage.checkpoints import file_hash
from ...storage.part_store import PartStore
from ..label_images import true_labels
from .metrics import (
    ari,
    ari_inside_images,
    coherence,
    dead_parts,
    fg_ari,
    fg_nmi,
    fixed_grid,
    information_share,
    nmi,
)
from .records import keep_result, pinned

Labels = NDArray[np.uint8]


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
