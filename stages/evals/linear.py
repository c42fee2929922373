"""`semmae eval linear`: train a linear classifier on frozen features (MAE, appendix A.1)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor
from torch.nn import functional as F

from ...models.heads import LinearHead
from ...pipeline.feeding import Batch, TrainingData
from ...pipeline.image_source import ImageSource
from ...pipeline.loaders import AugmentedData
from ...pipeline.options import (
    TrainingOptions,
    plain_options,
    require,
    settled,
    training_settings,
)
from ...pipeline.progress import Progress
from ...pipeline.schedule import Draw, indices
from ...pipeline.tasks import Task
from ...pipeline.training import fit
from ..networks import checkpoint_hash
from .features import (
    EvaluationOptions,
    LabelledFeatures,
    Subject,
    accuracies,
    both_splits,
    features_of,
    flattened,
    left_out,
    subjects_of,
)
from .records import keep_result, pinned


@dataclass(frozen=True, kw_only=True)
class LinearOptions(EvaluationOptions):
    """Settings of `linear`; the defaults are MAE's but for the batch, which is 16384 there."""

    epochs: Annotated[int, "Passes over the training images."] = 90
    batch_size: Annotated[int, "Images an optimiser step."] = 1024
    base_learning_rate: Annotated[float, "Peak learning rate of LARS for 256 images."] = 0.1
    warmup_epochs: Annotated[float, "Epochs of linear warm-up."] = 10.0
    cached_views: Annotated[
        int,
        "0: fresh crops each epoch (MAE); n: the features of n crops, made once; 1: the centre.",
    ] = 0
    loader_workers: Annotated[int, "Processes that decode images."] = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        require(self.cached_views >= 0, "cached_views", self.cached_views, "0 or more")
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        # The head's batch norm has no variance over one image.
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        rate = self.base_learning_rate
        require(rate > 0, "base_learning_rate", rate, "above 0")
        for name in ("warmup_epochs", "loader_workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


class CachedFeatures:
    """Features made once, as training data of the head.

    Args:
        views: The features of one crop of each image, one entry a view; epoch e takes view
            e modulo their number.
    """

    def __init__(self, views: list[LabelledFeatures]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views[0].labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all features."""
        digest = hashlib.sha256()
        for view in self._views:
            digest.update(view.features.numpy().tobytes())
        return digest.hexdigest()

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``features`` (B, D) and ``labels`` (B,)."""
        view = self._views[draws[0].epoch % len(self._views)]
        chosen = torch.from_numpy(indices(draws))
        return {"features": view.features[chosen], "labels": view.labels[chosen]}


class LinearProbe(Task):
    """Training the head, as the trainer sees it."""

    kind = "linear"

    def __init__(
        self,
        data: TrainingData,
        width: int,
        classes: int,
        features: Callable[[Batch], Tensor],
    ) -> None:
        self.data, self.model = data, LinearHead(width, classes)
        self.architecture = {"width": width, "classes": classes}
        self._features = features

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, and the share of right answers."""
        labels = batch["labels"]
        scores = self.model(self._features(batch))
        right = (scores.argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(scores.float(), labels), {"accuracy": right}

    def optimizer(self, learning_rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
        """LARS without weight decay, as MAE probes."""
        optimizer: torch.optim.Optimizer = Lars(
            self.model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=0.0
        )
        return optimizer


_Training = tuple[list[LabelledFeatures], TrainingData, Callable[[Batch], Tensor]]
"""Features made before training, what is trained on, and what makes features of its batches."""


def _cached(subject: Subject, images: ImageSource, options: LinearOptions) -> _Training:
    """The centre crop, then ``cached_views`` - 1 random crops of each image."""
    views = [features_of(subject, images, options.feature_batch, "train")]
    crops = AugmentedData(images, subject.image_size, options.seed)
    for view in range(1, options.cached_views):
        features, labels = [], []
        with Progress(f"features of crop {view} ({subject.name})", len(images), "image") as bar:
            for first in range(0, len(images), options.feature_batch):
                chosen = range(first, min(first + options.feature_batch, len(images)))
                batch = crops.__getitems__([Draw(index, view, 0.0) for index in chosen])
                features.append(subject.features(batch["images"].numpy()))
                labels.append(batch["labels"])
                bar.update(len(chosen))
        views.append(LabelledFeatures(torch.cat(features), torch.cat(labels)))
    return views, CachedFeatures(views), lambda batch: batch["features"]


def _fresh(subject: Subject, images: ImageSource, options: LinearOptions) -> _Training:
    """Random crops, encoded as they are trained on; bad images are named as they are met."""
    data = AugmentedData(images, subject.image_size, options.seed)

    def features(batch: Batch) -> Tensor:
        return subject.features(batch["images"].cpu().numpy()).to(batch["images"].device)

    return [], data, features


def _run_folder(options: LinearOptions, fingerprint: str) -> Path:
    """Where heads train: the same evaluation of the same checkpoint finds its runs again."""
    told: dict[str, Any] = {**plain_options(options), "output": "", "checkpoint": fingerprint}
    told["precision"] = settled(_training_options(options, options.output)).precision
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    return options.output / "runs" / f"linear-{name}"


def _training_options(options: LinearOptions, folder: Path) -> TrainingOptions:
    taken = training_settings(options)
    taken["output"] = folder
    taken["checkpoint_epochs"] = max(options.epochs // 4, 1)
    taken["keep_checkpoints"] = 1
    # Features that lie in memory are not worth a process that fetches them.
    taken["loader_workers"] = 0 if options.cached_views else options.loader_workers
    return TrainingOptions(**taken)


def probe(
    subject: Subject,
    train: ImageSource,
    val: ImageSource,
    options: LinearOptions,
    training: TrainingOptions,
) -> dict[str, float]:
    """Train the head on one subject's features; its accuracies on val, percent.

    Args:
        subject: What makes the features.
        train: Labelled images to train on.
        val: Labelled images to judge by.
        options: The settings.
        training: What the trainer takes of them; its ``output`` is the run of this subject.
    """
    found = features_of(subject, val, options.feature_batch, "val")
    made, data, features = (_cached if options.cached_views else _fresh)(subject, train, options)
    torch.manual_seed(options.seed)
    classes = int(np.max(train.labels)) + 1
    task = LinearProbe(data, found.features.shape[1], classes, features)
    fit(task, training)
    head = task.model.eval().cpu()
    with torch.no_grad():
        judged = accuracies(head(found.features), found.labels)
    return {**judged, **left_out(found, *made)}


def measure_linear(options: LinearOptions, fingerprint: str) -> dict[str, float]:
    """Accuracies of the checkpoint and its baselines, percent; no record is written.

    Args:
        options: The settings.
        fingerprint: `checkpoint_hash` of the checkpoint.
    """
    train, val = both_splits(options.data)
    folder = _run_folder(options, fingerprint)
    # A batch that cannot be filled is found here, not after a pass over all images.
    _training_options(options, folder).schedule(len(train))
    found = {}
    for subject in subjects_of(options):
        place = folder.with_name(f"{folder.name}-{subject.name}")
        training = _training_options(options, place)
        found[subject.name] = probe(subject, train, val, options, training)
    return flattened(found)


def linear(options: LinearOptions) -> dict[str, float]:
    """Evaluate, keep the record, and return the metrics.

    Args:
        options: The settings.

    Returns:
        ``top1``, ``top5``, and the same of ``untrained.`` and ``pixels.``, percent; and the count
        ``bad_images`` of images that cannot be read, if there are any (of val alone where crops
        are made as they are trained on, which names the others on standard error).

    Raises:
        MissingError: There is no checkpoint, or a split or its classes are missing.
        MismatchError: Val has classes that train has not.
        SettingError: The options do not fit the checkpoint or the images, or ``output`` is a file.
    """
    options = pinned(options)
    fingerprint = checkpoint_hash(options.checkpoint)
    metrics = measure_linear(options, fingerprint)
    keep_result("linear", options, options.checkpoint, fingerprint, metrics)
    return metrics
