"""Learning to tell from a frozen encoder's tokens where on its object a patch lies."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SettingError
from ..models.encoders import FrozenEncoder
from ..models.parts import PartLearner
from ..models.places import CELLS, PlacePredictor, object_cells
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .second_views import look_again

WINDOW_AREA = (0.2, 0.32)
"""Share of the image's area in a window: half of each side, a little more or less."""

CROP_AREA = (0.2, 1.0)
"""Share of the image's area in a crop, which is blown up to the whole image's size."""

WINDOWS_A_STEP = 32
"""Windows that a step learns from, or crops of as many patches."""

LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 2e-3, 0.05, 0.2

HELD_OUT = 0.1
"""Share of the images whose views are not learned from, to judge what was learned."""

LEAST_TOLD = 0.05
"""Nats that tokens must tell of their place, for parts to be told by it."""

_AT_ONCE = 128
"""Images or views that are looked at together."""


@dataclass(frozen=True)
class PlaceViews:
    """Tokens of one random view of each of some images, and where on the object they lie.

    Attributes:
        tokens: float16 (M, K, D), on the CPU.
        cells: int64 (M, K), from `models.places.object_cells`.
        grid: (h, w) of the views, with h w = K.
    """

    tokens: Tensor
    cells: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def sample_place_views(
    encoder: FrozenEncoder,
    voter: PartLearner,
    images: ImageSource,
    size: tuple[int, int],
    count: int,
    seed: int,
) -> tuple[PlaceViews, PlaceViews]:
    """Windows and crops of some images, cut out before the encoder sees them.

    In a window things keep their size; a crop blows them up, as evaluations and pretraining do.

    Args:
        encoder: The frozen encoder.
        voter: Knows the objects of whole images; moved to the encoder's device.
        images: The data.
        size: (H, W) that whole images are squashed to; windows are half of it, in whole patches.
        count: Images, at most.
        seed: Of images and views.

    Raises:
        SettingError: Not one of the images can be read.
    """
    patch, device = encoder.patch_size, encoder.mean.device
    grid = (size[0] // patch, size[1] // patch)
    half = (max(grid[0] // 2, 1), max(grid[1] // 2, 1))
    kinds = ((half, WINDOW_AREA), (grid, CROP_AREA))
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    chosen = drawn(len(images), count, seed)
    voter.to(device)
    with (
        torch.random.fork_rng(devices=[]),
        Progress("looking for objects", len(chosen), "image") as progress,
    ):
        torch.default_generator.manual_seed(seed)
        for _, read in batches_in_order(images, size, 64, "squash", chosen):
            whole = torch.from_numpy(read).to(device)
            objects = voter.patches(encoder(whole), grid).objects
            for made, (view_grid, area) in zip(found, kinds, strict=True):
                pixels = (view_grid[0] * patch, view_grid[1] * patch)
                view = look_again(encoder, whole, pixels, area)
                cells = object_cells(view.frame, view_grid, objects, grid, CELLS)
                made.append((view.tokens.patches.half().cpu(), cells.cpu()))
            progress.update(len(read))
    if not found[0]:
        raise SettingError(
            f"not one of {count} images of {images.plan.root} can be read: nothing to learn from; "
            "expected more --place-images"
        )
    windows, crops = (
        PlaceViews(torch.cat([t for t, _ in made]), torch.cat([c for _, c in made]), view_grid)
        for made, (view_grid, _) in zip(found, kinds, strict=True)
    )
    return windows, crops


@dataclass(frozen=True)
class _Task:
    """The views of one kind, those that are learned from and those held out.

    Attributes:
        views: All of them.
        known: int64, rows that are learned from.
        held: int64, rows held out; the same images for each kind.
        mean: Mean token of each place (K, D).
        std: What is left of each channel's deviation (D,).
        batch: Views a step.
    """

    views: PlaceViews
    known: Tensor
    held: Tensor
    mean: Tensor
    std: Tensor
    batch: int

    @classmethod
    def of(cls, views: PlaceViews, order: Tensor, patches: int) -> "_Task":
        count = max(int(len(order) * HELD_OUT), 1)
        held, known = order[:count], order[count:] if len(order) > count else order
        mean, std = _statistics(views.tokens, known)
        return cls(views, known, held, mean, std, max(patches // views.tokens.shape[1], 1))

    def drawn(self) -> Tensor:
        return self.known[torch.randint(len(self.known), (self.batch,))]

    def scores(
        self, model: PlacePredictor, rows: Tensor, device: torch.device, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Scores (M K, Q + 1) of some views' patches, and their cells (M K,)."""
        standard = (self.views.tokens[rows].float() - self.mean) / self.std
        scores = model(standard.to(device), self.views.grid, dropout).flatten(0, 1)
        return scores, self.views.cells[rows].flatten().to(device)


def learn_places(
    views: Sequence[PlaceViews],
    tokens: Tensor,
    grid: tuple[int, int],
    steps: int,
    seed: int,
    device: torch.device,
) -> tuple[PlacePredictor, float]:
    """A predictor of places, and how much tokens tell it.

    AdamW, cosine to 0; kinds of views take turns.  Of each kind, too, the mean token of each place
    is taken off, so that where the encoder says a patch is in the view tells little of where the
    view is.

    Args:
        views: What it learns from, of one or more kinds, each of the same images.
        tokens: Patch tokens of whole images, float32 (B, L, D), on the CPU: statistics come from
            them.
        grid: (h, w), of whole images, with h w = L.
        steps: Of `WINDOWS_A_STEP` windows, or of as many patches of another kind.
        seed: Of weights, dropout and batches.
        device: Where to compute.

    Returns:
        The predictor, on the CPU, frozen; and nats that object patches of windows (the first kind)
        of images that it has not learned from tell of their place.
    """
    # Images come in the order of their classes; those held out are to be of all.
    order = torch.randperm(len(views[0].tokens), generator=torch.Generator().manual_seed(seed))
    tasks = [_Task.of(kind, order, WINDOWS_A_STEP * views[0].tokens.shape[1]) for kind in views]
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Progress("learning places", steps, "step") as progress,
    ):
        torch.manual_seed(seed)
        model = PlacePredictor(tokens.shape[2], CELLS, tokens.shape[1]).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            task = tasks[step % len(tasks)]
            loss = F.cross_entropy(*task.scores(model, task.drawn(), device, DROPOUT))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.update(1)
    model.requires_grad_(False)
    told = _told(model, tasks[0], device)
    print(f"patch tokens tell {told:.2f} nats of where on the object they lie", file=sys.stderr)
    _measure(model.cpu(), tokens, grid)
    return model, told


@torch.no_grad()
def _told(model: PlacePredictor, task: _Task, device: torch.device) -> float:
    """Nats that held out object patches tell of their cell; the background is left out."""
    losses, truth = [], []
    for rows in torch.split(task.held, _AT_ONCE):
        scores, cells = task.scores(model, rows, device)
        on_object = cells < scores.shape[1] - 1
        losses.append(
            F.cross_entropy(scores[on_object, :-1], cells[on_object], reduction="none").cpu()
        )
        truth.append(cells[on_object].cpu())
    count = sum(map(len, truth))
    if not count:
        return 0.0
    # The entropy of the cells' shares is the loss of who knows nothing of a patch.
    shares = torch.bincount(torch.cat(truth)).double() / count
    return float(torch.special.entr(shares).sum() - torch.cat(losses).double().mean())


@torch.no_grad()
def _measure(model: PlacePredictor, tokens: Tensor, grid: tuple[int, int]) -> None:
    """Set the statistics of whole images' tokens, then of the features of their objects."""
    mean, std = _statistics(tokens, torch.arange(len(tokens)))
    model.token_mean.copy_(mean)
    model.token_std.copy_(std)
    told = [model.told(some, grid) for some in torch.split(tokens, _AT_ONCE)]
    roots = torch.cat([some.shares for some in told]).flatten(0, 1).sqrt()
    weights = 1 - torch.cat([some.background for some in told]).flatten()[:, None]
    weights /= weights.sum() + 1e-6
    model.root_mean.copy_((roots * weights).sum(dim=0))
    spread = ((roots - model.root_mean).square() * weights).sum(dim=0).mean()
    model.root_std.copy_(spread.sqrt() + 1e-6)


def _statistics(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token of each place (L, D) and what is left of each channel's deviation (D,).

    In batches: a copy of all tokens in float32 would be twice their size.
    """
    batches = torch.split(rows, _AT_ONCE)
    total = torch.zeros(tokens.shape[1:], dtype=torch.float64)
    for some in batches:
        total += tokens[some].double().sum(dim=0)
    mean = (total / len(rows)).float()
    squares = torch.zeros(tokens.shape[2], dtype=torch.float64)
    for some in batches:
        squares += (tokens[some].float() - mean).double().square().sum(dim=(0, 1))
    return mean, (squares / (len(rows) * tokens.shape[1])).sqrt().float() + 1e-6
