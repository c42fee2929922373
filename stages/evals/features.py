"""Features of labelled images, and what every evaluation of a checkpoint shares."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import MismatchError, MissingError
from ...models.encoders import FrozenEncoder, untrained
from ...pipeline.image_source import ImageSource, batches_in_order
from ...pipeline.options import choose_device, require, require_finite
from ...pipeline.progress import Progress
from ...pipeline.sources import list_images
from ..networks import OR_OWN, Weights, image_size_of, open_encoder, parse_image_size

PIXELS_SIDE = 32
"""Raw pixels are compared at this size, pixels down and across."""

Pooling = Literal["class", "mean"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What every evaluation of an encoder takes."""

    checkpoint: Annotated[str, "Encoder: the folder of a run, a weight file, or timm:<name>."]
    data: Annotated[str, "Labelled images with a train and a val split."]
    output: Annotated[Path, "Results folder; each evaluation adds a record."]
    weights: Annotated[
        Weights, "Of a run: trained: those of its last step; ema: their average, if it kept one."
    ] = "trained"
    image_size: Annotated[
        str | int,
        "Pixels of the centre crop, 224 or 224x320 (height x width); 0: the encoder's own size.",
    ] = 0
    pooling: Annotated[Pooling, "Feature: the class token, or the mean patch token."] = "class"
    baselines: Annotated[bool, "Evaluate the untrained network and raw pixels beside."] = True
    feature_batch: Annotated[int, "Images that the encoder sees at once."] = 64
    device: Annotated[str, "cuda, cpu; auto takes a GPU where there is one."] = "auto"
    seed: Annotated[int, "Of the untrained network and of training."] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        require_finite(self)
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        parse_image_size(self.image_size, OR_OWN)
        require(self.feature_batch >= 1, "feature_batch", self.feature_batch, "at least 1")


FeatureMaker = Callable[[NDArray[np.uint8]], Tensor]
"""Makes features float32 (B, D) on the CPU of images uint8 (B, H, W, 3)."""


@dataclass(frozen=True)
class Subject:
    """Something whose features are evaluated: the checkpoint, or a baseline beside it.

    Attributes:
        name: ``checkpoint``, ``untrained`` or ``pixels``.
        features: Makes its features.
        image_size: (H, W) it wants, pixels.
    """

    name: str
    features: FeatureMaker
    image_size: tuple[int, int]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of a split.

    Attributes:
        features: float32 (N, D).
        labels: int64 (N,).
        bad: Images of the split that could not be read and are left out.
    """

    features: Tensor
    labels: Tensor
    bad: int = 0


def subjects_of(options: EvaluationOptions) -> list[Subject]:
    """The checkpoint, and the baselines that the options ask for."""
    device = choose_device(options.device)
    encoder = open_encoder(options.checkpoint, weights=options.weights)
    size = image_size_of(options.image_size, encoder.native_size, encoder.patch_size)
    found = [Subject("checkpoint", _encoded(encoder, options.pooling, device), size)]
    if options.baselines:
        fresh = untrained(encoder, options.seed)
        found.append(Subject("untrained", _encoded(fresh, options.pooling, device), size))
        found.append(Subject("pixels", _raw_pixels, (PIXELS_SIDE, PIXELS_SIDE)))
    return found


def _encoded(encoder: FrozenEncoder, pooling: Pooling, device: torch.device) -> FeatureMaker:
    encoder.to(device)

    @torch.no_grad()
    def make(images: NDArray[np.uint8]) -> Tensor:
        tokens = encoder(torch.from_numpy(images).to(device))
        pooled = tokens.class_token if pooling == "class" else tokens.patches.mean(dim=1)
        features: Tensor = pooled.float().cpu()
        return features

    return make


def _raw_pixels(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).flatten(1).float() / 127.5 - 1.0


def labelled_images(data: str, split: Literal["train", "val"]) -> ImageSource:
    """The images of a split, all of which must have a class.

    Raises:
        MissingError: There is no such split, or its images have no classes.
    """
    images = ImageSource(list_images(data, split))
    if (images.labels < 0).any():
        raise MissingError(
            f"the {split} images of {data} have no classes: expected class folders, or a label "
            "column in Parquet"
        )
    return images


def both_splits(data: str) -> tuple[ImageSource, ImageSource]:
    """Train and val images of a labelled data set.

    Raises:
        MissingError: A split or its classes are missing.
        MismatchError: Val has classes that train has not.
    """
    train, val = labelled_images(data, "train"), labelled_images(data, "val")
    unknown = sorted(set(val.labels.tolist()) - set(train.labels.tolist()))
    if unknown:
        raise MismatchError(f"{data}: classes {unknown[:5]} are in val but not in train")
    return train, val


def features_of(
    subject: Subject, images: ImageSource, batch_size: int, split: str
) -> LabelledFeatures:
    """Features of the centre crops of a split; bad images are left out and counted."""
    made, positions = [], []
    with Progress(f"features of {split} ({subject.name})", len(images), "image") as progress:
        for where, pixels in batches_in_order(images, subject.image_size, batch_size):
            made.append(subject.features(pixels))
            positions.append(where)
            progress.update(len(where))
    if not made:
        raise MissingError(f"not one {split} image of {images.plan.root} can be read")
    labels = torch.from_numpy(images.labels[np.concatenate(positions)])
    return LabelledFeatures(torch.cat(made), labels, len(images) - len(labels))


def left_out(*splits: LabelledFeatures) -> dict[str, float]:
    """The metric ``bad_images``: images that count for nothing; none where there are none."""
    bad = sum(split.bad for split in splits)
    return {"bad_images": float(bad)} if bad else {}


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy, percent.

    Args:
        scores: (N, classes), higher is likelier.
        labels: int64 (N,).
    """
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    top1, top5 = ranked[:, 0].float().mean(), ranked.any(dim=1).float().mean()
    return {"top1": 100 * float(top1), "top5": 100 * float(top5)}


def flattened(by_subject: dict[str, dict[str, float]]) -> dict[str, float]:
    """Metrics of subjects as one flat dict: the checkpoint's bare, others' with their name."""
    return {
        name if subject == "checkpoint" else f"{subject}.{name}": value
        for subject, metrics in by_subject.items()
        for name, value in metrics.items()
        # The images are the same for all.
        if subject == "checkpoint" or name != "bad_images"
    }
