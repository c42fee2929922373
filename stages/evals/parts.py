"""`semmae eval parts`: measure the parts of a learner or a store, baselines beside."""

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import MismatchError, MissingError, SettingError
from ...models.part_scores import kmeans_inside_images
from ...pipeline.crops import squash
from ...pipeline.decoding import BadImage, decode_image
from ...pipeline.image_source import ImageSource, drawn
from ...pipeline.options import require, require_finite
from ...pipeline.plan import Plan
from ...pipeline.progress import Progress
from ...pipeline.sources import ImageReader, Split
from ...pipeline.stored_images import store_images
from ...storage.checkpoints import resolve_checkpoint
from ...storage.part_store import PartStore
from ...storage.remote_path import RemotePath
from ...storage.store_paths import StorePath, store_path
from ..label_images import Labels, labels_of
from ..networks import open_learner
from .metrics import coherence, fixed_grid
from .part_learners import measure_learner
from .part_measures import Evidence, FoundParts, against, measured, prefixed
from .records import keep_result, pinned
from .seeds import training_of


@dataclass(frozen=True, kw_only=True)
class PartsOptions:
    """Settings of `evaluate_parts`."""

    output: Annotated[Path, "Results folder; each evaluation adds a record."]
    learner: Annotated[Path | None, "Part learner to measure: the folder of its run."] = None
    parts: Annotated[StorePath | None, "Part store to measure, if there is no --learner."] = None
    data: Annotated[
        str | None, "Images: for a learner, or those that a store was made from if --labels is set."
    ] = None
    labels: Annotated[
        Path | None,
        "Folder of true part labels: PNGs named as the images (x.parquet#5.png in Parquet).",
    ] = None
    split: Annotated[
        Split, "Which images a learner is measured on; all where there is no val split."
    ] = "val"
    images: Annotated[int, "Images measured, drawn by the seed."] = 1000
    baselines: Annotated[
        bool, "Measure beside: k-means, colour, attention and a grid; for stores colour and grid."
    ] = True
    probe_images: Annotated[
        int,
        "Labelled train images that a linear probe of a learner's encoder is fitted to; 0: none.",
    ] = 1500
    feature_batch: Annotated[int, "Images that a learner's encoder sees at once."] = 64
    device: Annotated[str, "cuda, cpu; auto takes a GPU where there is one."] = "auto"
    seed: Annotated[int, "Of the images drawn, of crops and of k-means."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        require_finite(self)
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        require(self.images >= 1, "images", self.images, "at least 1")
        require(self.feature_batch >= 1, "feature_batch", self.feature_batch, "at least 1")
        require(self.probe_images >= 0, "probe_images", self.probe_images, "0 or more")
        if self.learner is None and self.parts is None:
            raise SettingError(
                "there is nothing to measure: expected --learner, the folder of a learn-parts run, "
                "or --parts, a part store"
            )
        if self.learner is not None and self.data is None:
            raise SettingError("--learner needs --data, the images that its parts are measured on")
        if self.labels is not None and self.data is None:
            raise SettingError(
                "--labels needs --data, the images that the store was made from: colour regions "
                "are compared with the labels beside the parts"
            )


def measure_parts(options: PartsOptions) -> dict[str, float]:
    """Measure the parts of a learner, or else of a store; no record is written.

    Args:
        options: The settings.

    Returns:
        Percent, but counts where it says so.

        - Always ``coherence``, ``position_share``, ``area_entropy`` and ``dead_parts`` (a count);
          with true labels ``fg_nmi``, ``fg_ari``, ``nmi``, ``ari``, ``in_image_ari``,
          ``in_image_fg_ari``, and ``true.coherence`` of the labels.
        - For a learner also ``confidence`` (mean margin), ``class_share`` where images have
          classes, ``cluster_share`` (clusters of class tokens), both on object patches, and
          ``flip_agreement``, ``shift_agreement`` (of two rows and columns or more),
          ``crop_agreement``, each also ``_fg`` on object patches: those not background, by the true
          labels or else by the learner.
        - Of baselines the same under ``kmeans.``, ``bare_kmeans.``, ``image_kmeans.``, ``colour.``,
          ``attention.`` and ``grid.``; for a store the agreement with true labels of ``colour.``
          (no background set apart) and ``grid.`` alone.  One that cannot be, as a grid of too few
          patches for its cells or the attention of no class token, is left out, and standard error
          says why.
        - ``probe.fg_nmi``, ``probe.fg_ari``, ``probe.accuracy``: see `part_probe`.
        - ``bad_images``, a count: images that cannot be read and are left out, if there are any.

    Raises:
        MissingError: Learner, store, data or labels are not there.
        MismatchError: A store holds no good image, or was made from other images; a label image
            has another shape than its image, or no true label is foreground.
        SettingError: The learner is none.
        DamageError: A label image is none.
    """
    return _measure_store(options) if options.learner is None else measure_learner(options)


def _measure_store(options: PartsOptions) -> dict[str, float]:
    assert options.parts is not None
    store = PartStore.open(options.parts)
    plan = None
    if options.labels is not None and options.data is not None:
        plan = store_images(store, options.data)
    good = np.flatnonzero(store.ok())
    if not len(good):
        raise MismatchError(f"{options.parts} holds not one good image to measure")
    chosen = good[drawn(len(good), options.images, options.seed)]
    labels = np.asarray(store.labels()[chosen])
    identity = store.identity
    if plan is None or options.labels is None:
        return measured(FoundParts(labels, identity.parts), Evidence())
    images = ImageSource(plan)
    true = labels_of(options.labels, images, chosen, identity.grid, identity.image_size)
    metrics = measured(FoundParts(labels, identity.parts), Evidence(true))
    metrics["true.coherence"] = coherence(true)
    if options.baselines:
        metrics.update(_beside_store(plan, chosen, true, identity.parts))
    return metrics


def _beside_store(
    plan: Plan, chosen: NDArray[np.int64], true: Labels, parts: int
) -> dict[str, float]:
    """Agreement of a fixed grid and of colour regions with the true parts."""
    grid, found = (true.shape[1], true.shape[2]), {}
    try:
        cells = np.broadcast_to(fixed_grid(*grid, parts), (len(true), grid[0] * grid[1]))
    except SettingError as error:  # what was asked for is the store
        print(f"the baseline grid is left out: {error}", file=sys.stderr)
    else:
        found = prefixed("grid", against(cells, true))
    good, colours = _patch_colours(plan, chosen, grid)
    everywhere = torch.ones(colours.shape[:2])
    regions = kmeans_inside_images(colours, everywhere, parts).numpy()
    bad = {} if good.all() else {"bad_images": float((~good).sum())}
    return {
        **found,
        **prefixed("colour", against(regions, true[good])),
        **bad,
    }


def _patch_colours(
    plan: Plan, chosen: NDArray[np.int64], grid: tuple[int, int]
) -> tuple[NDArray[np.bool_], torch.Tensor]:
    """Which of the chosen images can be read, (N,), and their patch colours, float (n, L, 3)."""
    reader, found = ImageReader(plan), []
    good = np.ones(len(chosen), dtype=np.bool_)
    with Progress("reading colours", len(chosen), "image") as progress:
        for place, index in enumerate(chosen):
            try:
                found.append(squash(decode_image(reader.read(int(index))), grid).reshape(-1, 3))
            except BadImage:
                good[place] = False
            progress.update()
    if not found:
        raise MissingError(f"not one of {len(chosen)} images in {plan.root} can be read")
    return good, torch.from_numpy(np.stack(found)).float()


def store_hash(path: str) -> str:
    """SHA-256 of the ``complete.json`` of a store, which vouches for all that lasts in it."""
    store = PartStore.open(store_path(path))
    return hashlib.sha256((store.path / "complete.json").read_bytes()).hexdigest()


def parts_hash(path: str) -> str:
    """SHA-256 of what a record measured: of a store, or of a learner's and its encoder's weights.

    Args:
        path: Folder or URL of a store, or the checkpoint file of a learner.

    Raises:
        MissingError: It is not there.
    """
    place = store_path(path)
    if not isinstance(place, RemotePath) and (place.is_file() or place.suffix == ".pt"):
        return open_learner(place).hash
    return store_hash(path)


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
    options = _decided(pinned(options))
    subject = str(options.parts if options.learner is None else options.learner)
    fingerprint = parts_hash(subject)
    # Before the work: the run may be trained further, and its older checkpoints be pruned.
    trained = None if options.learner is None else training_of(options.learner)
    metrics = measure_parts(options)
    keep_result("parts", options, subject, fingerprint, metrics, trained)
    return metrics


def _decided(options: PartsOptions) -> PartsOptions:
    """A learner's checkpoint as it is now, and no store beside it."""
    if options.learner is None:
        return options
    if options.parts is not None:
        print(
            f"measuring the learner {options.learner}; the store {options.parts} is left alone",
            file=sys.stderr,
        )
    checkpoint = resolve_checkpoint(options.learner.expanduser().absolute())
    return replace(options, learner=checkpoint, parts=None)
