"""`semmae stage1 learn-parts`: learn parts on a frozen encoder (paper, section 3.1)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..errors import MismatchError, SettingError
from ..models.encoders import FrozenEncoder, Tokens
from ..models.parts import (
    PartArchitecture,
    PartLearner,
    diversity,
    part_labels,
    rebuilt_features,
)
from ..models.vision import normalise
from ..pipeline.feeding import Batch
from ..pipeline.image_source import ImageSource
from ..pipeline.loaders import SquashedData
from ..pipeline.options import TrainingOptions, choose_device, require
from ..pipeline.runs import Run
from ..pipeline.schedule import Draw
from ..pipeline.sources import Split, list_images
from ..pipeline.tasks import Task
from ..pipeline.training import fit, refuse_foreign_folder
from ..storage.checkpoints import checkpoints, load_checkpoint
from .networks import ENCODER_FILE, image_size_of, open_encoder, save_encoder, shaped_learner
from .part_start import sample_tokens, started_learner
from .pictures import colours_of, overlay, pairs_sheet, save_picture


@dataclass(frozen=True, kw_only=True)
class LearnPartsOptions(TrainingOptions):
    """Settings of `learn_parts`."""

    data: Annotated[str, "Images: a folder, or Parquet."]
    encoder: Annotated[str, "Frozen encoder: timm:<name>, a weight file, or the folder of a run."]
    split: Annotated[Split, "Which images of the data."] = "train"
    image_size: Annotated[int, "Pixels that images are squashed to; 0: the encoder's own."] = 0
    num_parts: Annotated[int, "Parts, the background not counted."] = 6
    variant: Annotated[
        Literal["anchored", "paper"],
        "anchored: ids keep one meaning; paper: queries from the class token, pixels rebuilt.",
    ] = "anchored"
    background: Annotated[
        Literal["auto", "voted", "token", "none"],
        "How the background is set apart; auto: voted if anchored, a part token if paper.",
    ] = "auto"
    clusters: Annotated[int, "Clusters of patch tokens that vote for the background."] = 24
    positions: Annotated[
        Literal["auto", "keep", "remove"],
        "The mean token of each place: remove it, or keep it; auto: remove where place explains "
        "more than half of what differs between tokens.",
    ] = "auto"
    class_share: Annotated[float, "Weight of the class-token term in anchored part tokens."] = 0.2
    temperature: Annotated[float, "Of the softmax over parts."] = 0.1
    blur: Annotated[float, "Standard deviation of the blur of the maps, patches."] = 0.7
    diversity_weight: Annotated[float, "Of the diversity constraint."] = 0.1
    feature_weight: Annotated[
        float | None, "Of rebuilding the encoder's features; default 1 if anchored, 0 if paper."
    ] = None
    pixel_weight: Annotated[
        float | None,
        "Of rebuilding pixels by the AdaIN decoder; default 0 if anchored, 1 if paper.",
    ] = None
    decoder_width: Annotated[int, "Channels of the pixel decoder's first layer."] = 64
    decoder_noise: Annotated[bool, "Per-layer noise in the pixel decoder."] = False
    sample_images: Annotated[int, "Images that statistics and k-means starts come from."] = 2000
    epochs: Annotated[int, "Passes over the data."] = 5
    batch_size: Annotated[int, "Images an optimiser step."] = 64
    base_learning_rate: Annotated[float, "Peak learning rate for 256 images a step."] = 4e-3
    weight_decay: Annotated[float, "AdamW's weight decay."] = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        for name in ("clusters", "sample_images", "decoder_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.image_size >= 0, "image_size", self.image_size, "0 or more")
        for name in ("diversity_weight", "class_share"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.blur <= 8, "blur", self.blur, "0 to 8 patches")
        for name, weight in zip(("feature_weight", "pixel_weight"), self.weights, strict=True):
            require(weight >= 0, name, weight, "0 or more")
        PartArchitecture(
            width=1, parts=self.num_parts, clusters=self.clusters, temperature=self.temperature
        )
        if self.weights == (0.0, 0.0):
            raise SettingError(
                "--feature-weight and --pixel-weight are both 0: nothing would be rebuilt"
            )

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the feature and the pixel reconstruction."""
        default = (1.0, 0.0) if self.variant == "anchored" else (0.0, 1.0)
        given = (self.feature_weight, self.pixel_weight)
        return tuple(d if g is None else g for g, d in zip(given, default, strict=True))  # type: ignore[return-value]

    @property
    def background_kind(self) -> Literal["voted", "token", "none"]:
        """How the background is set apart."""
        if self.background == "auto":
            return "voted" if self.variant == "anchored" else "token"
        return self.background


class PartLearning(Task):
    """Learning parts, as the trainer sees it."""

    kind = "parts"

    def __init__(
        self,
        encoder: FrozenEncoder,
        learner: PartLearner,
        data: SquashedData,
        options: LearnPartsOptions,
        image_size: tuple[int, int],
    ) -> None:
        self.encoder, self.model, self.data = encoder, learner, data
        self._learner, self._options = learner, options
        self._grid = tuple(side // encoder.patch_size for side in image_size)
        self.architecture = {**learner.architecture.to_record(), "image_size": list(image_size)}
        self._examples = _first_images(data, 16)

    def begin(self, folder: Path) -> None:
        """Keep the encoder beside the learner."""
        if not checkpoints(folder):
            save_encoder(self.encoder, folder / ENCODER_FILE)

    def place(self, device: torch.device) -> None:
        """Move learner and encoder."""
        self.encoder.to(device)
        self.model.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and diversity of a batch of whole images."""
        images = batch["images"]
        tokens = self.encoder(images)
        patches, style = self._learner.standardise(tokens)
        maps = self._learner.maps(patches, style, self._grid)  # type: ignore[arg-type]
        flat = maps.flatten(2).float()
        terms = {"diversity": diversity(flat).mean()}
        total = self._options.diversity_weight * terms["diversity"]
        for weight, name in zip(self._options.weights, ("features", "pixels"), strict=True):
            if weight:
                terms[name] = self._rebuilding(name, images, maps, flat, patches, style)
                total = total + weight * terms[name]
        return total, {name: term.detach() for name, term in terms.items()}

    def _rebuilding(
        self, name: str, images: Tensor, maps: Tensor, flat: Tensor, patches: Tensor, style: Tensor
    ) -> Tensor:
        if name == "features":
            return F.mse_loss(rebuilt_features(flat, patches), patches)
        assert self._learner.decoder is not None
        rebuilt = self._learner.decoder(maps, style).float()
        target = normalise(images, self.encoder.mean, self.encoder.std)
        return F.mse_loss(rebuilt, F.adaptive_avg_pool2d(target, rebuilt.shape[2:]))

    @torch.no_grad()
    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Draw parts of a few images and watch for parts that die."""
        images = self._examples.to(next(self.model.parameters()).device)
        tokens = self.encoder(images)
        maps = self._learner(tokens, self._grid)
        labels, margin = part_labels(maps)
        shares = np.bincount(labels.cpu().numpy().ravel(), minlength=maps.shape[1]) / labels.numel()
        picture = self._picture(images, labels, tokens, maps)
        run.picture("parts", picture)
        save_picture(run.folder / "pictures" / f"parts-epoch-{epoch:04d}.png", picture)
        dead = [str(part) for part, share in enumerate(shares) if share == 0]
        if dead:
            print(
                f"parts {', '.join(dead)} own no patch of {len(images)} images after epoch "
                f"{epoch}: try fewer --num-parts, or another --seed",
                file=sys.stderr,
            )
        return {"confidence": float(margin.mean()), "smallest_part": float(shares.min())}

    def _picture(
        self, images: Tensor, labels: Tensor, tokens: Tokens, maps: Tensor
    ) -> NDArray[np.uint8]:
        shape = self._learner.architecture
        colours = colours_of(shape.channels, None if shape.background == "none" else 0)
        pixels, ids = images.cpu().numpy(), labels.cpu().numpy()
        overlays = [overlay(image, part, colours) for image, part in zip(pixels, ids, strict=True)]
        rebuilt = []
        if self._learner.decoder is not None:
            made = self._learner.decoder(maps, self._learner.standardise(tokens)[1]).float()
            made = made * self.encoder.std.view(3, 1, 1) + self.encoder.mean.view(3, 1, 1)
            made = (made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
            rebuilt = [list(made.cpu().numpy())]
        return pairs_sheet(list(pixels), overlays, 8, 112, *rebuilt)


def _first_images(data: SquashedData, count: int) -> Tensor:
    draws = [Draw(index, 0, 0.0) for index in range(min(count, len(data)))]
    return data.__getitems__(draws)["images"]


def _recorded_learner(path: Path) -> PartLearner:
    """The learner of a checkpoint, shaped by what its start found: the vote, above all."""
    state = load_checkpoint(path)
    if state.get("kind") != PartLearning.kind:
        raise MismatchError(
            f"{path.parent.parent} holds a run of kind {state.get('kind')!r}: choose another "
            "--output for the part learner"
        )
    return shaped_learner(state)


def learn_parts(options: LearnPartsOptions) -> Path:
    """Learn parts, or go on where an earlier call was interrupted.

    Args:
        options: The settings.

    Returns:
        The last checkpoint.  The output folder is what ``--learner`` takes.
    """
    refuse_foreign_folder(options.output, PartLearning.kind)
    images = ImageSource(list_images(options.data, options.split))
    options.schedule(len(images))  # refuses what cannot be before anything is encoded
    found = checkpoints(options.output)
    learner = _recorded_learner(found[-1][1]) if found else None
    # A run goes on with the encoder that it began with, whatever the path holds now.
    encoder = open_encoder(str(options.output / ENCODER_FILE) if found else options.encoder)
    size = image_size_of(options.image_size, encoder.native_size, encoder.patch_size)
    if learner is None:
        encoder.to(choose_device(options.device))
        tokens = sample_tokens(encoder, images, size, options.sample_images, options.seed)
        grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
        learner = started_learner(tokens, grid, options)
    return fit(PartLearning(encoder, learner, SquashedData(images, size), options, size), options)
