"""Everything that is measured of parts, the same for a learner and for the baselines beside it.

Legend of shapes: N images, (h, w) patches, P part ids.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .metrics import (
    BACKGROUND,
    agreement,
    area_entropy,
    ari,
    ari_inside_images,
    coherence,
    dead_parts,
    fg_ari,
    fg_nmi,
    information_share,
    nmi,
)
from .part_views import Boxes, Labels, View, seen_from, still_there


@dataclass(frozen=True)
class FoundParts:
    """Parts that something found in images.

    Attributes:
        labels: uint8 (N, h, w), of the whole images.
        parts: P.
        background: Id of the background; None where none is set apart.
        views: uint8 (N, h, w) of other views of the same images.
        confidence: Mean margin in [0, 1]; None where it is not known.
    """

    labels: Labels
    parts: int
    background: int | None = None
    views: dict[View, Labels] = field(default_factory=dict)
    confidence: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What parts of some images are held against.

    Attributes:
        true: True part of each patch, uint8 (N, h, w), 0 the background; None if unknown.
        classes: Class of each image, int64 (N,); None if unknown.
        clusters: Cluster of each image's class token, int64 (N,); None if not made.
        boxes: Of the crops; needed with that view alone.
    """

    true: Labels | None = None
    classes: NDArray[np.int64] | None = None
    clusters: NDArray[np.int64] | None = None
    boxes: Boxes | None = None


def measured(found: FoundParts, evidence: Evidence) -> dict[str, float]:
    """All that can be said of parts.

    Args:
        found: The parts.
        evidence: What is known of the same images.

    Returns:
        Percent, but ``dead_parts``, a count: the names of `inherent`, `followed`, `stability` and
        `against`.
    """
    metrics = inherent(found)
    objects = objects_of(found, evidence.true)
    if objects.any():
        metrics.update(followed(found.labels, objects, evidence))
    metrics.update(stability(found, objects, evidence.boxes))
    if evidence.true is not None:
        metrics.update(against(found.labels, evidence.true))
    return metrics


def objects_of(found: FoundParts, true: Labels | None) -> NDArray[np.bool_]:
    """Which patches are object, bool (N, h, w): by true labels, else all but the background."""
    if true is not None:
        return np.asarray(true != BACKGROUND)
    if found.background is None:
        return np.ones(found.labels.shape, dtype=np.bool_)
    return np.asarray(found.labels != found.background)


def inherent(found: FoundParts) -> dict[str, float]:
    """``coherence``, ``dead_parts``, ``position_share``, ``area_entropy``, ``confidence``."""
    labels = found.labels
    flat = labels.reshape(len(labels), -1)
    places = np.broadcast_to(np.arange(flat.shape[1]), flat.shape)
    metrics = {
        "coherence": coherence(labels),
        "dead_parts": float(len(dead_parts(labels, found.parts))),
        "position_share": information_share(flat, places),
        "area_entropy": area_entropy(labels, found.parts),
    }
    if found.confidence is not None:
        metrics["confidence"] = 100.0 * found.confidence
    return metrics


def followed(labels: Labels, objects: NDArray[np.bool_], evidence: Evidence) -> dict[str, float]:
    """How much of the part of object patches follows from the image.

    Args:
        labels: uint8 (N, h, w).
        objects: bool (N, h, w), not all false.
        evidence: Classes and clusters.

    Returns:
        ``class_share`` and ``cluster_share``, as far as there are two classes or clusters.  Both
        are biased upwards where a class has few object patches: compare with the baselines.
    """
    metrics = {}
    told = {"class_share": evidence.classes, "cluster_share": evidence.clusters}
    for name, kinds in told.items():
        if kinds is not None and len(np.unique(kinds)) > 1:
            kind = np.broadcast_to(kinds[:, None, None], labels.shape)
            metrics[name] = information_share(labels[objects], kind[objects])
    return metrics


def stability(
    found: FoundParts, objects: NDArray[np.bool_], boxes: Boxes | None
) -> dict[str, float]:
    """How many patches keep their part in other views.

    Args:
        found: The parts.
        objects: bool (N, h, w), of the whole images.
        boxes: Of the crops, if that view is there.

    Returns:
        For each view ``<view>_agreement`` over all patches, and ``<view>_agreement_fg`` over the
        object patches, if there are any.
    """
    metrics = {}
    nowhere = Boxes(np.zeros((0, 4), np.int64), np.zeros((0, 2), np.int64))
    for view, labels in found.views.items():
        before = seen_from(view, found.labels, boxes or nowhere)
        after = still_there(view, labels)
        inside = seen_from(view, objects.astype(np.uint8), boxes or nowhere) > 0
        metrics[f"{view}_agreement"] = agreement(after, before)
        if inside.any():
            metrics[f"{view}_agreement_fg"] = agreement(after, before, inside)
    return metrics


def against(labels: NDArray[np.integer], true: NDArray[np.integer]) -> dict[str, float]:
    """How well parts agree with the true ones.

    Args:
        labels: Integers (N, ...).
        true: True labels of the same shape, 0 the background.

    Returns:
        ``fg_nmi``, ``fg_ari``, ``nmi``, ``ari``, ``in_image_ari``, ``in_image_fg_ari``.

    Raises:
        MismatchError: Shapes differ, or no true label is foreground.
    """
    flat, truth = labels.reshape(len(labels), -1), true.reshape(len(true), -1)
    return {
        "fg_nmi": fg_nmi(flat, truth),
        "fg_ari": fg_ari(flat, truth),
        "nmi": nmi(flat, truth),
        "ari": ari(flat, truth),
        "in_image_ari": ari_inside_images(flat, truth),
        "in_image_fg_ari": ari_inside_images(flat, truth, foreground=True),
    }


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """The same figures under ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in metrics.items()}
