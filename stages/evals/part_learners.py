"""Parts of a learner, measured on images: against other views, true labels and baselines."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import MissingError, SettingError
from ...models.parts import PartLearner
from ...pipeline.image_source import ImageSource, drawn
from ...pipeline.options import choose_device
from ...pipeline.progress import Progress
from ...pipeline.sources import Split, list_images
from ..clustering import clustered
from ..label_images import Labels, label_path, labels_of
from ..networks import TrainedLearner, open_learner
from .metrics import coherence, refuse_no_foreground
from .part_baselines import BASELINES, beside
from .part_measures import Evidence, FoundParts, measured, prefixed
from .part_probe import probe_parts
from .part_views import MOVED, EncodedViews, View, encoded_views, joined, parts_in

if TYPE_CHECKING:
    from .parts import PartsOptions

CLUSTERS = 12
"""Clusters of class tokens that stand for classes where images have none."""


@dataclass(frozen=True)
class _Session:
    """A learner on its device, and how it is measured."""

    trained: TrainedLearner
    options: "PartsOptions"

    def views(
        self, images: ImageSource, chosen: NDArray[np.int64], views: tuple[View, ...], task: str
    ) -> Iterator[EncodedViews]:
        """Batches of views, with progress."""
        batches = encoded_views(
            self.trained.encoder,
            images,
            self.trained.image_size,
            chosen,
            views,
            self.options.feature_batch,
            self.options.seed,
        )
        with Progress(task, len(chosen), "image") as progress:
            for batch in batches:
                yield batch
                progress.update(len(batch.positions))


def measure_learner(options: "PartsOptions") -> dict[str, float]:
    """Measure the parts of a learner; no record is written.

    Args:
        options: With a learner and data.

    Returns:
        As `parts.measure_parts` says.

    Raises:
        MissingError: Learner, data or labels are not there, or no image can be read.
        DamageError: A label image is none.
        MismatchError: No true label is foreground, or a label image has another shape than its
            image.
        SettingError: It is no part learner.
    """
    assert options.learner is not None
    assert options.data is not None
    trained = open_learner(options.learner)
    device = choose_device(options.device)
    trained.encoder.to(device)
    trained.learner.to(device)
    session = _Session(trained, options)
    images = _images_of(options.data, options.split)
    chosen = drawn(len(images), options.images, options.seed)
    known = _labels_of(options, images, chosen, trained)
    whole = joined(session.views(images, chosen, ("whole",), "reading tokens"))
    true = None if known is None else known[np.isin(chosen, whole.positions)]
    evidence = evidence_of(images, whole, true, options.seed)
    subjects = {"": trained.learner}
    if options.baselines:
        for baseline in BASELINES:
            tokens = whole.tokens["whole"]
            if baseline == "attention" and trained.encoder.transformer.cls_token is None:
                print(
                    "the baseline attention is left out: it is of the class token, and "
                    f"{trained.encoder.name} has none",
                    file=sys.stderr,
                )
                continue
            try:
                made = beside(trained.learner, tokens, trained.grid, baseline, options.seed)
            except SettingError as error:  # what was asked for is the learner
                print(f"the baseline {baseline} is left out: {error}", file=sys.stderr)
            else:
                subjects[baseline] = made.to(device)
    views = MOVED
    if min(trained.grid) == 1:
        views = tuple(view for view in MOVED if view != "shift")
        print(
            f"agreement under shift is left out: of {trained.grid[0]} x {trained.grid[1]} patches "
            "none stays in view when the image is moved by one down and across",
            file=sys.stderr,
        )
    moved = session.views(images, whole.positions, views, "reading other views")
    found = parts_of(subjects, whole, moved, trained.grid, options.feature_batch)
    metrics: dict[str, float] = {}
    for name, parts in found.items():
        figures = measured(parts, evidence)
        metrics.update(prefixed(name, figures) if name else figures)
    if true is not None:
        metrics["true.coherence"] = coherence(true)
        metrics.update(_probed(session, images, whole, true))
    bad = len(chosen) - len(whole.positions)
    return {**metrics, "bad_images": float(bad)} if bad else metrics


def parts_of(
    subjects: dict[str, PartLearner],
    whole: EncodedViews,
    moved: Iterable[EncodedViews],
    grid: tuple[int, int],
    at_once: int,
) -> dict[str, FoundParts]:
    """The parts that learners find in images and in other views of them.

    Args:
        subjects: Learners by name, on their device.
        whole: The images, with the view ``whole``.
        moved: Batches of other views of the same images, in the same order; read once.
        grid: (h, w).
        at_once: Images that a learner sees at once.

    Returns:
        For each name what it found.
    """
    first = {name: parts_in(one, whole, "whole", grid, at_once) for name, one in subjects.items()}
    views: dict[str, dict[View, list[Labels]]] = {name: {} for name in subjects}
    for batch in moved:
        for name, learner in subjects.items():
            for view in batch.tokens:
                labels, _ = parts_in(learner, batch, view, grid, at_once)
                views[name].setdefault(view, []).append(labels)
    return {
        name: FoundParts(
            first[name][0],
            learner.architecture.channels,
            None if learner.architecture.background == "none" else 0,
            {view: np.concatenate(labels) for view, labels in views[name].items()},
            float(first[name][1].mean()),
        )
        for name, learner in subjects.items()
    }


def _images_of(data: str, split: Split) -> ImageSource:
    """The images of a split; all of them where there is no val split."""
    try:
        return ImageSource(list_images(data, split))
    except MissingError:
        if split != "val":
            raise
    images = ImageSource(list_images(data, "all"))
    print(f"{data} has no val split: measuring on all of its images", file=sys.stderr)
    return images


def _labels_of(
    options: "PartsOptions",
    images: ImageSource,
    chosen: NDArray[np.int64],
    trained: TrainedLearner,
) -> Labels | None:
    """True labels of the chosen images, before they are encoded; None without any."""
    if options.labels is None:
        return None
    labels = labels_of(options.labels, images, chosen, trained.grid, trained.image_size)
    refuse_no_foreground(labels)
    return labels


def evidence_of(
    images: ImageSource, whole: EncodedViews, true: Labels | None, seed: int
) -> Evidence:
    """What the parts of some images are held against.

    Args:
        images: Where the images come from.
        whole: The images, with the view ``whole``.
        true: Their true labels, uint8 (N, h, w), if there are any.
        seed: Of the clusters of class tokens.
    """
    classes = images.labels[whole.positions]
    clusters = class_clusters(whole.tokens["whole"].class_token, seed)
    return Evidence(true, classes if (classes >= 0).all() else None, clusters, whole.boxes)


def class_clusters(class_tokens: torch.Tensor, seed: int) -> NDArray[np.int64]:
    """Cluster of each image by its class token (N, S), standardised; int64 (N,)."""
    apart = class_tokens - class_tokens.mean(dim=0)
    points = (apart / (apart.std(dim=0, correction=0) + 1e-6)).numpy()
    kmeans = clustered(points, min(CLUSTERS, len(points)), 3, seed)
    return np.asarray(kmeans.labels_, dtype=np.int64)


def _probed(
    session: _Session, images: ImageSource, whole: EncodedViews, true: Labels
) -> dict[str, float]:
    """The linear probe, where there are other images with labels to fit it to."""
    options, trained = session.options, session.trained
    assert options.labels is not None
    if not options.probe_images:
        return {}
    train = _train_images(options, images)
    if train is None:
        return {}
    tokens, read = [], []
    everything = np.arange(len(train))
    for batch in session.views(train, everything, ("whole",), "reading tokens of train images"):
        tokens.append(batch.tokens["whole"].patches.half())
        read.append(batch.positions)
    if not tokens:
        raise MissingError(f"not one train image of {train.plan.root} can be read for the probe")
    positions = np.concatenate(read)
    labels = labels_of(options.labels, train, positions, trained.grid, trained.image_size)
    held = whole.tokens["whole"].patches
    device = trained.encoder.mean.device
    figures = probe_parts(torch.cat(tokens), labels, held, true, options.seed, device)
    return prefixed("probe", figures)


def _train_images(options: "PartsOptions", images: ImageSource) -> ImageSource | None:
    """Some labelled train images that are not among those measured; None, and why, if none."""
    assert options.data is not None
    assert options.labels is not None
    why = f"{options.data} has no train images beside those measured"
    try:
        plan = list_images(options.data, "train")
    except MissingError:
        plan = None
    if plan is not None and not set(plan.keys) & set(images.plan.keys):
        rows = drawn(len(plan), options.probe_images, options.seed)
        labelled = [label_path(options.labels, str(key)).is_file() for key in plan.keys[rows]]
        if any(labelled):
            return ImageSource(plan, rows[np.array(labelled)])
        why = f"{options.labels} has no labels of train images"
    print(f"no linear probe of the encoder: {why}", file=sys.stderr)
    return None
