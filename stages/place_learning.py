"""Learning to tell from a frozen encoder's tokens where in its image a patch lies."""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.encoders import FrozenEncoder
from ..models.places import CELLS, PlacePredictor, cells_of
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .second_views import look_again

AREA = (0.2, 0.32)
"""Share of the image's area in a window: half of each side, a little more or less."""

WINDOWS_A_STEP, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 32, 2e-3, 0.05, 0.2

HELD_OUT = 0.1
"""Share of the images whose windows are not learned from, to judge what was learned."""

LEAST_TOLD = 0.05
"""Nats that tokens must tell of their place, for parts to be told by it."""

_AT_ONCE = 128
"""Images or windows that are looked at together."""


@dataclass(frozen=True)
class Windows:
    """Tokens of windows of images.

    Attributes:
        tokens: float16 (M, K, D), on the CPU, windows of one image together.
        cells: int64 (M, K), the cell of the whole image that each patch lies in.
        grid: (h, w) of the windows, with h w = K.
    """

    tokens: Tensor
    cells: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def sample_windows(
    encoder: FrozenEncoder,
    images: ImageSource,
    size: tuple[int, int],
    count: int,
    each: int,
    seed: int,
) -> Windows:
    """Tokens of windows of some images, cut out before the encoder sees them.

    Args:
        encoder: The frozen encoder.
        images: The data.
        size: (H, W) that whole images are squashed to; windows are half of it, in whole patches,
            so that things keep their size.
        count: Images, at most.
        each: Windows of each.
        seed: Of images and windows.
    """
    grid = (max(size[0] // encoder.patch_size // 2, 1), max(size[1] // encoder.patch_size // 2, 1))
    pixels_of_window = (grid[0] * encoder.patch_size, grid[1] * encoder.patch_size)
    device = encoder.mean.device
    chosen = drawn(len(images), count, seed)
    tokens, cells = [], []
    with (
        torch.random.fork_rng(devices=[]),
        Progress("reading windows", len(chosen), "image") as progress,
    ):
        torch.default_generator.manual_seed(seed)
        for _, read in batches_in_order(images, size, 64, "squash", chosen):
            whole = torch.from_numpy(read).to(device).repeat_interleave(each, dim=0)
            view = look_again(encoder, whole, pixels_of_window, AREA)
            tokens.append(view.tokens.patches.half().cpu())
            cells.append(cells_of(view.frame, grid, CELLS).cpu())
            progress.update(len(read))
    return Windows(torch.cat(tokens), torch.cat(cells), grid)


def learn_places(
    windows: Windows,
    tokens: Tensor,
    grid: tuple[int, int],
    steps: int,
    seed: int,
    device: torch.device,
) -> PlacePredictor | None:
    """A predictor of places.

    AdamW, cosine to 0.  Of windows, too, the mean token of each place is taken off, so that where
    the encoder says a patch is in the window tells little of where the window is.

    Args:
        windows: What it learns from.
        tokens: Patch tokens of whole images, float32 (B, L, D), on the CPU: statistics come from
            them.
        grid: (h, w), of whole images, with h w = L.
        steps: Of `WINDOWS_A_STEP` windows.
        seed: Of weights, dropout and batches.
        device: Where to compute.

    Returns:
        On the CPU, frozen.  None, and why is printed, where windows of images that it
        has not learned from tell less than `LEAST_TOLD` nats of their place.
    """
    held, count = max(int(len(windows.tokens) * HELD_OUT), 1), len(windows.tokens)
    known = windows.tokens[held:] if count > held else windows.tokens
    mean, std = _statistics(known.float())

    def loss_of(model: PlacePredictor, rows: Tensor, dropout: float = 0.0) -> Tensor:
        standard = (windows.tokens[rows].float() - mean) / std
        scores = model(standard.to(device), windows.grid, dropout).flatten(0, 1)
        return F.cross_entropy(scores, windows.cells[rows].flatten().to(device))

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Progress("learning places", steps, "step") as progress,
    ):
        torch.manual_seed(seed)
        model = PlacePredictor(windows.tokens.shape[2], CELLS, tokens.shape[1]).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(count - len(known), count, (WINDOWS_A_STEP,))
            loss = loss_of(model, rows, DROPOUT)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.update(1)
    model.requires_grad_(False)
    unseen = torch.split(torch.arange(held), _AT_ONCE)
    with torch.no_grad():
        losses = [float(loss_of(model, rows)) for rows in unseen]
    left = np.average(losses, weights=[len(rows) for rows in unseen])
    told = _entropy(windows.cells) - float(left)
    print(f"patch tokens tell {told:.2f} nats of where they lie in the image", file=sys.stderr)
    if told < LEAST_TOLD:
        print("that is too little for parts to be told by places", file=sys.stderr)
        return None
    _measure(model.cpu(), tokens, grid)
    return model


@torch.no_grad()
def _measure(model: PlacePredictor, tokens: Tensor, grid: tuple[int, int]) -> None:
    """Set the statistics of whole images' tokens, then of their features."""
    mean, std = _statistics(tokens)
    model.token_mean.copy_(mean)
    model.token_std.copy_(std)
    found = [model.roots(some, grid) for some in torch.split(tokens, _AT_ONCE)]
    roots = torch.cat(found).flatten(0, 1)
    model.root_mean.copy_(roots.mean(dim=0))
    model.root_std.copy_((roots - model.root_mean).square().mean().sqrt() + 1e-6)


def _statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token of each place (L, D) and what is left of each channel's deviation (D,)."""
    mean = tokens.mean(dim=0)
    return mean, (tokens - mean).flatten(0, 1).std(dim=0) + 1e-6


def _entropy(cells: Tensor) -> float:
    """Of the cells' shares, nats: the loss of who knows nothing of a patch."""
    shares = torch.bincount(cells.flatten()).double() / cells.numel()
    return float(torch.special.entr(shares).sum())
