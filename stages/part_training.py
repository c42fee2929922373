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

from ..models.encoders import AT_ONCE, FrozenEncoder, Tokens
from ..models.part_losses import diversity, rebuilt_features
from ..models.parts import PartLearner, part_labels, patch_colours
from ..models.predictors import Told
from ..models.vision import normalise
from ..pipeline.feeding import Batch, TrainingData
from ..pipeline.image_source import spread
from ..pipeline.loaders import SquashedData
from ..pipeline.runs import Run
from ..pipeline.schedule import Draw, indices
from ..pipeline.tasks import Task
from ..storage.checkpoints import checkpoints
from .networks import ENCODER_FILE, save_encoder
from .part_watch import PartWatch
from .pictures import bands, colours_of, overlay, save_picture, soft_overlay
from .second_views import SecondView, disagreement, look_again

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions


class CachedTokens:
    """Tokens read once, and what they tell of themselves, as training data of the learner.

    Args:
        tokens: Of all images that are trained on.
        fingerprint: Of the images that they were drawn from.
        learner: That they are for.
        grid: (h, w).
        views: One second view of each of the images, where consistency is asked for.
    """

    def __init__(
        self,
        tokens: Tokens,
        fingerprint: str,
        learner: PartLearner,
        grid: tuple[int, int],
        views: SecondView | None = None,
    ) -> None:
        self._kept = _kept(tokens, learner, grid, "")
        if views is not None:
            self._kept |= {**_kept(views.tokens, learner, grid, "view_"), "view_frame": views.frame}
        told = f"{fingerprint} {tuple(tokens.patches.shape)}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._kept["patches"])

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``class_token`` float32 (B, S) and ``patches`` float16 (B, L, D) of a batch.

        If the learner asks patches what they are, also ``shares`` float16 (B, L, F) and
        ``background`` float16 (B, L), as in `models.predictors.Told`.  With second views also
        theirs, all with ``view_`` before their names, and ``view_frame`` float32 (B, 2, 3).
        """
        chosen = torch.from_numpy(indices(draws))
        return {name: kept[chosen] for name, kept in self._kept.items()}


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
        self._examples = _some_images(images, 16)
        self._watch = PartWatch(options.log_steps)
        self._dead: list[str] = []

    def begin(self, folder: Path) -> None:
        """Keep the encoder beside the learner."""
        if not checkpoints(folder):
            save_encoder(self.encoder, folder / ENCODER_FILE)

    def place(self, device: torch.device) -> None:
        """Move learner and encoder."""
        self.encoder.to(device)
        self.model.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, diversity and consistency of whole images, or of their tokens."""
        tokens, told = self._tokens(batch)
        patches = self._learner.patches(tokens, self._grid, told=told)
        maps = self._learner.maps(patches, self._grid)
        flat = maps.flatten(2).float()
        weights = self._options.loss_weights
        terms = {"diversity": diversity(flat).mean()}
        if weights["features"]:
            rebuilt = rebuilt_features(flat, patches.features)
            terms["features"] = F.mse_loss(rebuilt, patches.features)
        if self._options.rebuilds_pixels:
            terms |= self._image_losses(batch["images"], tokens, maps, patches.style)
        if weights["consistency"]:
            terms["consistency"] = self._disagreement(batch, maps)
        total = sum((weights[name] * term for name, term in terms.items()), maps.new_zeros(()))
        logged = {name: term.detach() for name, term in terms.items()}
        return total, {**logged, "smallest_share": self._watch.count(maps)}

    def after_step(self, progress: float, kept: Tensor) -> None:
        """Tell of parts that die."""
        self._watch.after_step(progress)

    def _tokens(self, batch: Batch) -> tuple[Tokens, Told | None]:
        if "images" in batch:
            return self.encoder(batch["images"]), None
        return _cached(batch, "")

    def _image_losses(
        self, images: Tensor, tokens: Tokens, maps: Tensor, style: Tensor
    ) -> dict[str, Tensor]:
        """What the rebuilt image lacks: pixels, and what the encoder sees in them."""
        assert self._learner.decoder is not None
        rebuilt = self._learner.decoder(maps, style).float()
        weights, terms = self._options.loss_weights, {}
        if weights["pixels"]:
            target = normalise(images, self.encoder.mean, self.encoder.std)
            small = F.adaptive_avg_pool2d(target, rebuilt.shape[2:])
            terms["pixels"] = F.mse_loss(rebuilt, small)
        if weights["perceptual"]:
            whole = F.interpolate(rebuilt, images.shape[1:3], mode="bilinear", align_corners=False)
            seen = self._learner.standardised(self.encoder.features(whole))
            terms["perceptual"] = F.mse_loss(seen, self._learner.standardised(tokens))
        return terms

    def _disagreement(self, batch: Batch, maps: Tensor) -> Tensor:
        if "images" in batch:
            view, told = look_again(self.encoder, batch["images"]), None
        else:
            tokens, told = _cached(batch, "view_")
            view = SecondView(tokens, batch["view_frame"])
        patches = self._learner.patches(view.tokens, self._grid, told=told)
        return disagreement(maps, self._learner.maps(patches, self._grid), view.frame)

    @torch.no_grad()
    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Draw parts of a few images and watch for parts that die."""
        self._watch.look(epoch / self._options.epochs)  # an epoch may be shorter than its window
        images = self._examples.to(self.encoder.mean.device)
        tokens = self.encoder(images)
        patches = self._learner.patches(tokens, self._grid, patch_colours(images, self._grid))
        maps = self._learner.maps(patches, self._grid)
        labels, margin = part_labels(maps)
        shares = np.bincount(labels.cpu().numpy().ravel(), minlength=maps.shape[1]) / labels.numel()
        picture = self._picture(images, labels, patches.style, maps)
        run.picture("parts", picture)
        save_picture(run.folder / "pictures" / f"parts-epoch-{epoch:04d}.png", picture)
        dead = [str(part) for part, share in enumerate(shares) if share == 0]
        if dead and dead != self._dead:
            owners = f"part {dead[0]} owns" if len(dead) == 1 else f"parts {', '.join(dead)} own"
            seeded = self._options.variant not in ("image-kmeans", "colour", "attention", "grid")
            print(
                f"{owners} no patch of {len(images)} images after epoch {epoch}: try fewer "
                f"--num-parts{', or another --seed' if seeded else ''}",
                file=sys.stderr,
            )
        self._dead = dead
        return {"confidence": float(margin.mean()), "smallest_part": float(shares.min())}

    def _picture(
        self, images: Tensor, labels: Tensor, style: Tensor, maps: Tensor
    ) -> NDArray[np.uint8]:
        shape = self._learner.architecture
        colours = colours_of(shape.channels, None if shape.background == "none" else 0)
        pixels, ids = images.cpu().numpy(), labels.cpu().numpy()
        overlays = [overlay(image, part, colours) for image, part in zip(pixels, ids, strict=True)]
        soft = [
            soft_overlay(image, shares, colours)
            for image, shares in zip(pixels, maps.float().cpu().numpy(), strict=True)
        ]
        rebuilt = []
        if self._learner.decoder is not None:
            made = self._learner.decoder(maps, style).float()
            made = made * self.encoder.std.view(3, 1, 1) + self.encoder.mean.view(3, 1, 1)
            made = (made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
            rebuilt = [list(made.cpu().numpy())]
        return bands([list(pixels), overlays, soft, *rebuilt], 8, 112)


@torch.no_grad()
def _kept(
    tokens: Tokens, learner: PartLearner, grid: tuple[int, int], view: str
) -> dict[str, Tensor]:
    """What `CachedTokens` gives, by name."""
    kept = {f"{view}class_token": tokens.class_token, f"{view}patches": tokens.patches.half()}
    if learner.predictor is not None:
        device = learner.token_mean.device
        batches = torch.split(tokens.patches, AT_ONCE)
        told = Told.joined([learner.predictor.told(some.to(device), grid) for some in batches])
        kept[f"{view}shares"] = told.shares.half().cpu()
        kept[f"{view}background"] = told.background.half().cpu()
    return kept


def _cached(batch: Batch, view: str) -> tuple[Tokens, Told | None]:
    """The tokens that `CachedTokens` gave, and what they tell of themselves."""
    patches = batch[f"{view}patches"]
    # No learned variant looks at the attention.
    tokens = Tokens(batch[f"{view}class_token"], patches, patches.new_zeros(len(patches), 1, 1))
    if f"{view}shares" not in batch:
        return tokens, None
    return tokens, Told(batch[f"{view}shares"].float(), batch[f"{view}background"].float())


def _some_images(data: SquashedData, count: int) -> Tensor:
    draws = [Draw(index, 0, 0.0) for index in spread(len(data), count).tolist()]
    return data.__getitems__(draws)["images"]
