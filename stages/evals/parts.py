"""`semmae eval parts`: measure the parts of a store, beside the baselines that need no learning."""

from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.cluster import KMeans

from ... import __version__
from ...errors import MismatchError, MissingError
from ...pipeline.crops import squash
from ...pipeline.decoding import decode_image
from ...pipeline.options import plain_options, require
from ...pipeline.plan import Plan
from ...pipeline.progress import Progress
from ...pipeline.sources import ImageReader, list_images
from ...storage.part_store import PartStore
from ...storage.results import write_result
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

Labels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PartsOptions:
    """Settings of `evaluate_parts`."""

    parts: Annotated[Path, "Part store to measure."]
    data: Annotated[str, "The images it was made from."]
    output: Annotated[Path, "Results folder; each evaluation adds a record."]
    labels: Annotated[Path | None, "Folder of true part labels: PNGs at the images' keys."] = None
    images: Annotated[int, "Images measured, the first good ones."] = 2000
    seed: Annotated[int, "Of the colour clusters."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        require(self.images >= 1, "images", self.images, "at least 1")


def true_labels(folder: Path, keys: list[str], grid: tuple[int, int]) -> Labels:
    """Majority label of each patch, uint8 (N, h, w), from label PNGs of the images' names.

    Raises:
        MissingError: An image has no label PNG.
    """
    found = []
    for key in keys:
        path = folder / Path(key).with_suffix(".png")
        if not path.is_file():
            raise MissingError(f"no label image at {path}: expected one for each image, as PNG")
        label_map = np.array(Image.open(BytesIO(path.read_bytes())), dtype=np.uint8)
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
    store: PartStore, data: str, chosen: NDArray[np.int64], grid: tuple[int, int]
) -> list[NDArray[np.uint8]]:
    reader = ImageReader(Plan(list_images(data).root, store.plan(), store.class_names))
    found = []
    with Progress("reading colours", len(chosen), "image") as progress:
        for index in chosen:
            found.append(squash(decode_image(reader.read(int(index))), grid))
            progress.update()
    return found


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
    """Fingerprint of a store: of every byte that lasts in it."""
    return PartStore.open(Path(path)).fingerprint


def measure_parts(options: PartsOptions) -> dict[str, float]:
    """Measure the parts of a store; no record is written.

    Args:
        options: The settings.

    Returns:
        Percent: ``coherence``, ``position_share``; with true labels ``fg_nmi``, ``fg_ari``,
        ``nmi``, ``ari``, ``in_image_ari``, ``in_image_fg_ari``, and those of ``grid.`` (fixed) and
        ``colour.`` (k-means of colour inside each image); and the count ``dead_parts``.

    Raises:
        MissingError: Store or labels are not there.
        MismatchError: The store holds no good image.
    """
    store = PartStore.open(options.parts)
    grid, parts = store.identity.grid, store.identity.parts
    chosen = np.flatnonzero(store.ok())[: options.images]
    if not len(chosen):
        raise MismatchError(f"{options.parts} holds not one good image to measure")
    labels = np.asarray(store.labels()[chosen])
    metrics = _inherent(labels, parts)
    if options.labels is not None:
        keys = store.meta(["key"])["key"].to_pylist()
        true = true_labels(options.labels, [keys[index] for index in chosen], grid)
        metrics.update(_against(labels, true))
        cells = np.broadcast_to(fixed_grid(*grid, parts), (len(true), grid[0] * grid[1]))
        metrics.update(_against(cells, true, "grid."))
        colours = _patch_colours(store, options.data, chosen, grid)
        metrics.update(_against(colour_clusters(colours, parts, options.seed), true, "colour."))
    return metrics


def evaluate_parts(options: PartsOptions) -> dict[str, float]:
    """Measure, keep the record, and return the metrics, as `measure_parts` gives them."""
    metrics = measure_parts(options)
    write_result(
        options.output,
        {
            "kind": "parts",
            "configuration": plain_options(options),
            "checkpoint": str(options.parts),
            "checkpoint_hash": store_hash(str(options.parts)),
            "seed": options.seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"semmae": __version__, "numpy": np.__version__},
            "metrics": metrics,
        },
    )
    return metrics
