"""`semmae eval knn`: classify by the nearest neighbours among the training images."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ...pipeline.options import require
from ..networks import checkpoint_hash
from .features import (
    EvaluationOptions,
    LabelledFeatures,
    accuracies,
    both_splits,
    features_of,
    flattened,
    left_out,
    subjects_of,
)
from .records import keep_result, pinned


@dataclass(frozen=True, kw_only=True)
class KnnOptions(EvaluationOptions):
    """Settings of `knn`."""

    neighbours: Annotated[int, "Neighbours that vote."] = 20
    temperature: Annotated[float, "Of the weight exp(cosine / temperature) of a vote."] = 0.07

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        require(self.neighbours >= 1, "neighbours", self.neighbours, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


def vote(train: LabelledFeatures, queries: Tensor, neighbours: int, temperature: float) -> Tensor:
    """Votes of the nearest training images, weighted by exp(cosine / temperature).

    The weighted vote of Wu et al. (CVPR 2018), as DINO evaluates.  Features are centred on the
    training mean before the cosine.  Ours: without, features that share one large direction, as
    those of masked autoencoders and raw pixels do, all look alike.

    Args:
        train: Features and classes of the training images, (N, D) and (N,).
        queries: (M, D).
        neighbours: At most N count.
        temperature: Above 0.

    Returns:
        float32 (M, classes).
    """
    mean = train.features.mean(dim=0)
    bank = F.normalize(train.features - mean, dim=1)
    classes = int(train.labels.max()) + 1
    scores = []
    for chunk in torch.split(queries, 256):
        cosine = F.normalize(chunk - mean, dim=1) @ bank.T
        near = cosine.topk(min(neighbours, len(bank)), dim=1)
        # Relative to the nearest: exp of a large cosine over a small temperature overflows.
        weights = ((near.values - near.values[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes)
        scores.append(votes.scatter_add_(1, train.labels[near.indices], weights))
    return torch.cat(scores)


def measure_knn(options: KnnOptions) -> dict[str, float]:
    """Accuracies of the checkpoint and its baselines, percent, nothing written."""
    train_images, val_images = both_splits(options.data)
    found = {}
    for subject in subjects_of(options):
        train = features_of(subject, train_images, options.feature_batch, "train")
        val = features_of(subject, val_images, options.feature_batch, "val")
        scores = vote(train, val.features, options.neighbours, options.temperature)
        found[subject.name] = {**accuracies(scores, val.labels), **left_out(train, val)}
    return flattened(found)


def knn(options: KnnOptions) -> dict[str, float]:
    """Evaluate, keep the record, and return the metrics.

    Args:
        options: The settings.

    Returns:
        ``top1``, ``top5``, and the same of ``untrained.`` and ``pixels.``, percent; and the count
        ``bad_images`` of images that cannot be read, if there are any.

    Raises:
        MissingError: There is no checkpoint, or a split or its classes are missing.
        MismatchError: Val has classes that train has not.
        SettingError: The options do not fit the checkpoint, or ``output`` is a file.
    """
    options = pinned(options)
    fingerprint = checkpoint_hash(options.checkpoint)
    metrics = measure_knn(options)
    keep_result("knn", options, options.checkpoint, fingerprint, metrics)
    return metrics
