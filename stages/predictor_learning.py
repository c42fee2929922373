"""Learning to tell from patch tokens of views what was known of these patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.encoders import AT_ONCE
from ..models.predictors import PatchPredictor
from ..pipeline.progress import Progress

Predictor = TypeVar("Predictor", bound=PatchPredictor)

WHOLES_A_STEP = 8
"""Views of the largest grid that a step learns from, or smaller ones of as many patches."""

LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 2e-3, 0.05, 0.2

HELD_OUT = 0.1
"""Share of the images whose views are not learned from, to judge what was learned."""


@dataclass(frozen=True)
class Lesson:
    """Tokens of one view of each of some images, and what their patches are.

    Attributes:
        tokens: float16 (M, K, D), on the CPU.
        targets: int64 (M, K), kinds of patches, the background last.
        grid: (h, w) of the views, with h w = K.
        statistics: Mean token of each place (K, D) and deviation (D,) that tokens are standardised
            by; None for those of the views themselves.
    """

    tokens: Tensor
    targets: Tensor
    grid: tuple[int, int]
    statistics: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Examined:
    """What a predictor says of patches of the first lesson that it has not learned from.

    Attributes:
        scores: float32 (M, Q + 1), on the CPU.
        targets: int64 (M,).
    """

    scores: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Task:
    """A lesson, the rows that are learned from and those held out, the same images for each."""

    lesson: Lesson
    known: Tensor
    held: Tensor
    mean: Tensor
    std: Tensor
    batch: int

    @classmethod
    def of(cls, lesson: Lesson, order: Tensor, patches: int) -> "_Task":
        count = max(int(len(order) * HELD_OUT), 1)
        held, known = order[:count], order[count:] if len(order) > count else order
        mean, std = lesson.statistics or statistics(lesson.tokens, known)
        return cls(lesson, known, held, mean, std, max(patches // lesson.tokens.shape[1], 1))

    def drawn(self) -> Tensor:
        return self.known[torch.randint(len(self.known), (self.batch,))]

    def scores(
        self, model: PatchPredictor, rows: Tensor, device: torch.device, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Scores (M K, Q + 1) of some views' patches, and their targets (M K,)."""
        standard = (self.lesson.tokens[rows].float() - self.mean) / self.std
        scores = model(standard.to(device), self.lesson.grid, dropout).flatten(0, 1)
        return scores, self.lesson.targets[rows].flatten().to(device)

    @torch.no_grad()
    def examined(self, model: PatchPredictor, device: torch.device) -> Examined:
        made = [self.scores(model, rows, device) for rows in torch.split(self.held, AT_ONCE)]
        scores, targets = zip(*made, strict=True)
        return Examined(torch.cat(scores).cpu(), torch.cat(targets).cpu())


def learned(
    begun: Callable[[], Predictor],
    lessons: Sequence[Lesson],
    steps: int,
    seed: int,
    device: torch.device,
    name: str,
) -> tuple[Predictor, Examined]:
    """A predictor that has learned its lessons, and how it does where it has not.

    AdamW, cosine to 0; lessons take turns.

    Args:
        begun: Makes the predictor, its weights drawn by torch's generator.
        lessons: One or more, each of the same images.
        steps: Of `WHOLES_A_STEP` views each, or more of a smaller grid.
        seed: Of weights, dropout and batches.
        device: Where to compute.
        name: What is learned, for the progress.

    Returns:
        The predictor, on the CPU, frozen, and the first lesson's held out images.
    """
    # Images come in the order of their classes; those held out are to be of all.
    order = torch.randperm(len(lessons[0].tokens), generator=torch.Generator().manual_seed(seed))
    patches = WHOLES_A_STEP * max(lesson.tokens.shape[1] for lesson in lessons)
    tasks = [_Task.of(lesson, order, patches) for lesson in lessons]
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        Progress(name, steps, "step") as progress,
    ):
        torch.manual_seed(seed)
        model = begun().to(device)
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
    examined = tasks[0].examined(model, device)
    return model.cpu(), examined


@torch.no_grad()
def measure(
    model: PatchPredictor,
    tokens: Tensor,
    grid: tuple[int, int],
    known: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Set a predictor's statistics: of whole images' tokens, then of the features of objects.

    Args:
        model: On the CPU.
        tokens: float (B, L, D), on the CPU.
        grid: (h, w), with h w = L.
        known: `statistics` of all these tokens, where they were taken before.
    """
    mean, std = known or statistics(tokens, torch.arange(len(tokens)))
    model.token_mean.copy_(mean)
    model.token_std.copy_(std)
    told = [model.told(some, grid) for some in torch.split(tokens, AT_ONCE)]
    roots = torch.cat([some.shares for some in told]).flatten(0, 1).sqrt()
    weights = 1 - torch.cat([some.background for some in told]).flatten()[:, None]
    weights /= weights.sum() + 1e-6
    model.root_mean.copy_((roots * weights).sum(dim=0))
    spread = ((roots - model.root_mean).square() * weights).sum(dim=0).mean()
    model.root_std.copy_(spread.sqrt() + 1e-6)


def statistics(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token of each place (L, D) and what is left of each channel's deviation (D,).

    In batches: a copy of all tokens in float32 would be twice their size.

    Args:
        tokens: float (M, L, D), on the CPU.
        rows: int64, those that are counted.
    """
    batches = torch.split(rows, AT_ONCE)
    total = torch.zeros(tokens.shape[1:], dtype=torch.float64)
    for some in batches:
        total += tokens[some].double().sum(dim=0)
    mean = (total / len(rows)).float()
    squares = torch.zeros(tokens.shape[2], dtype=torch.float64)
    for some in batches:
        squares += (tokens[some].float() - mean).double().square().sum(dim=(0, 1))
    return mean, (squares / (len(rows) * tokens.shape[1])).sqrt().float() + 1e-6
