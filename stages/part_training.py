"""Learning parts, as the trainer sees it: the losses of section 3.1, and what is watched."""

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..models.encoders import FrozenEncoder, Tokens
from ..models.part_scores import Patches
from ..models.parts import PartLearner, diversity, part_labels, rebuilt_features
from ..models.vision import normalise
from ..pipeline.feeding import Batch, TrainingData
from ..pipeline.loaders import SquashedData
from ..pipeline.runs import Run
from ..pipeline.schedule import Draw, indices
from ..pipeline.tasks import Task
from ..storage.checkpoints import checkpoints
from .networks import ENCODER_FILE, save_encoder
from .pictures import colours_of, overlay, pairs_sheet, save_picture

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions


class CachedTokens:
    """Tokens read once, as training data of the learner.

    Args:
        tokens: Of all images that are trained on.
        fingerprint: Of the images that they were drawn from.
    """

    def __init__(self, tokens: Tokens, fingerprint: str) -> None:
        self._class_token, self._patches = tokens.class_token, tokens.patches.half()
        told = f"{fingerprint} {tuple(tokens.patches.shape)}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._patches)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``class_token`` float32 (B, S) and ``patches`` float16 (B, L, D) of a batch."""
        chosen = torch.from_numpy(indices(draws))
        return {"class_token": self._class_token[chosen], "patches": self._patches[chosen]}


class PartLearning(Task):
    """Learning parts, as the trainer sees it.

    Args:
        encoder: The frozen encoder.
        learner: At its start.
        data: Whole images, or their `CachedTokens`.
        images: Whole images, to draw some.
        options: The settings.
        image_size: (H, W) that images are squashed to.
    """

    kind = "parts"

    def __init__(
        self,
        encoder: FrozenEncoder,
        learner: PartLearner,
        data: TrainingData,
        images: SquashedData,
        options: "LearnPartsOptions",
        image_size: tuple[int, int],
    ) -> None:
        self.encoder, self.model, self.data = encoder, learner, data
        self._learner, self._options = learner, options
        self._grid = image_size[0] // encoder.patch_size, image_size[1] // encoder.patch_size
        self.architecture = {**learner.architecture.to_record(), "image_size": list(image_size)}
        self._examples = _first_images(images, 16)

    def begin(self, folder: Path) -> None:
        """Keep the encoder beside the learner."""
        if not checkpoints(folder):
            save_encoder(self.encoder, folder / ENCODER_FILE)

    def place(self, device: torch.device) -> None:
        """Move learner and encoder."""
        self.encoder.to(device)
        self.model.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and diversity of a batch of whole images, or of their tokens."""
        patches = self._learner.patches(self._tokens(batch))
        maps = self._learner.maps(patches, self._grid)
        flat = maps.flatten(2).float()
        terms = {"diversity": diversity(flat).mean()}
        total = self._options.diversity_weight * terms["diversity"]
        features, pixels = self._options.weights
        if features:
            rebuilt = rebuilt_features(flat, patches.features)
            terms["features"] = F.mse_loss(rebuilt, patches.features)
            total = total + features * terms["features"]
        if pixels:
            terms["pixels"] = self._pixel_loss(batch["images"], maps, patches)
            total = total + pixels * terms["pixels"]
        return total, {name: term.detach() for name, term in terms.items()}

    def _tokens(self, batch: Batch) -> Tokens:
        if "images" in batch:
            return self.encoder(batch["images"])  # type: ignore[no-any-return]
        patches = batch["patches"]
        # No learned variant looks at the attention.
        return Tokens(batch["class_token"], patches, patches.new_zeros(len(patches), 1, 1))

    def _pixel_loss(self, images: Tensor, maps: Tensor, patches: Patches) -> Tensor:
        assert self._learner.decoder is not None
        rebuilt = self._learner.decoder(maps, patches.style).float()
        target = normalise(images, self.encoder.mean, self.encoder.std)
        return F.mse_loss(rebuilt, F.adaptive_avg_pool2d(target, rebuilt.shape[2:]))

    @torch.no_grad()
    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Draw parts of a few images and watch for parts that die."""
        images = self._examples.to(self.encoder.mean.device)
        tokens = self.encoder(images)
        maps = self._learner(tokens, self._grid, images)
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
            made = self._learner.decoder(maps, self._learner.patches(tokens).style).float()
            made = made * self.encoder.std.view(3, 1, 1) + self.encoder.mean.view(3, 1, 1)
            made = (made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
            rebuilt = [list(made.cpu().numpy())]
        return pairs_sheet(list(pixels), overlays, 8, 112, *rebuilt)


def _first_images(data: SquashedData, count: int) -> Tensor:
    draws = [Draw(index, 0, 0.0) for index in range(min(count, len(data)))]
    return data.__getitems__(draws)["images"]
