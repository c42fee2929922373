"""Learning to tell from patch tokens of views what was known of these patches.

Each predictor is a run of its own in the folder of the learner that it is for: trained by
`pipeline.training.fit`, it goes on where it was killed, and is opened where it is done.
"""

import abc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MissingError
from ..models.encoders import AT_ONCE
from ..models.parts import PartLearner
from ..models.predictors import PatchPredictor
from ..pipeline.feeding import Batch
from ..pipeline.options import TrainingOptions, training_settings
from ..pipeline.resuming import state_to_resume
from ..pipeline.runs import Run
from ..pipeline.schedule import Draw
from ..pipeline.tasks import Task
from ..pipeline.training import fit
from ..storage.checkpoints import checkpoints, load_checkpoint, weight_file
from ..storage.files import write_atomically
from .networks import learner_of

Predictor = TypeVar("Predictor", bound=PatchPredictor)

WHOLES_A_STEP = 8
"""Views of the largest grid that a step learns from, or smaller ones of as many patches."""

LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 2e-3, 0.05, 0.2

HELD_OUT = 0.1
"""Share of the images whose views are not learned from, to judge what was learned."""

CHECKPOINT_STEPS = 250
"""Steps between checkpoints, where the options ask for none: a minute or two on a CPU."""

TEACHER_FILE = "teacher.pt"
"""The learner that gives a run its targets, in the run's folder."""


@dataclass(frozen=True)
class Lesson:
    """Tokens of one view of each of some images, and what their patches are.

    Attributes:
        tokens: float16 (M, K, D), on the CPU.
        targets: int64 (M, K), kinds of patches, the background last.
        grid: (h, w) of the views, with h w = K.
        statistics: Mean token of each place (K, D) and deviation (D,) that tokens are standardised
            by; None for those of the views that are learned from.
    """

    tokens: Tensor
    targets: Tensor
    grid: tuple[int, int]
    statistics: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Drawn:
    """A lesson as it is drawn from.

    Attributes:
        lesson: The lesson.
        mean, std: Its tokens are standardised by these.
        rows: int64 (draws, views a draw), the views that each draw stands for.
    """

    lesson: Lesson
    mean: Tensor
    std: Tensor
    rows: Tensor

    def views(self, rows: Tensor) -> Batch:
        """Standardised tokens and targets of some views, as of `LessonData`."""
        lesson = self.lesson
        standard = (lesson.tokens[rows].float() - self.mean) / self.std
        return {
            "tokens": standard.reshape(len(rows), *lesson.grid, -1),
            "targets": lesson.targets[rows],
        }


class LessonData:
    """Lessons as training data: as many draws as all steps take, so that no epoch ends between.

    Steps take the lessons in turn.  A draw stands for a view of the largest grid, or for as many
    smaller ones as have about its patches, and goes by its place in the run, not by its index: so
    the views of a step are of one grid.  A lesson's views come as often as each other: all that are
    learned from in a random order, then all again in another.

    Args:
        make: Gives one lesson or more, each of the same images.  Called once, and only if there is
            something left to learn from them.
        sources: Fingerprints by name of what they are made of, the images among them.
        steps: Of the run, of `WHOLES_A_STEP` draws each.
        seed: Of the images that are held out, and of the order of the others.
        teacher: What says what patches are, if it is to be kept beside the run, for `kept_teacher`.
    """

    def __init__(
        self,
        make: Callable[[], Sequence[Lesson]],
        sources: Mapping[str, str],
        steps: int,
        seed: int,
        teacher: PartLearner | None = None,
    ) -> None:
        self._make, self._steps, self._seed = make, steps, seed
        self.sources, self.teacher = dict(sources), teacher

    @property
    def fingerprint(self) -> str:
        """Of all sources."""
        return hashlib.sha256(str(sorted(self.sources.items())).encode()).hexdigest()

    def __len__(self) -> int:
        return self._steps * WHOLES_A_STEP

    def warm(self) -> None:
        """Make the lessons."""
        _ = self.lessons

    @cached_property
    def lessons(self) -> Sequence[Lesson]:
        """All of them."""
        return self._make()

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """Views of a step, or of a part of it.

        Returns:
            ``tokens`` float32 (M, h, w, D), standardised, and ``targets`` int64 (M, h w), of as
            many views as the draws stand for.
        """
        places = [round(draw.progress * len(self)) for draw in draws]
        turn, number = divmod(places[0] // WHOLES_A_STEP, len(self._drawn))
        drawn = self._drawn[number]
        within = [turn * WHOLES_A_STEP + place % WHOLES_A_STEP for place in places]
        return drawn.views(drawn.rows[within].flatten())

    def held_out(self) -> Iterator[Batch]:
        """The first lesson's views that are not learned from, in batches."""
        return map(self._drawn[0].views, torch.split(self._split[0], AT_ONCE))

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        """The images that are held out, and those that are learned from, for all lessons."""
        images = len(self.lessons[0].tokens)
        # Images come in the order of their classes; those held out are to be of all.
        order = torch.randperm(images, generator=torch.Generator().manual_seed(self._seed))
        count = max(int(images * HELD_OUT), 1)
        return order[:count], order[count:] if images > count else order

    @cached_property
    def _drawn(self) -> list[_Drawn]:
        known, found = self._split[1], []
        draws = -(-self._steps // len(self.lessons)) * WHOLES_A_STEP
        largest = max(lesson.tokens.shape[1] for lesson in self.lessons)
        rng = np.random.default_rng(self._seed)
        for lesson in self.lessons:
            mean, std = lesson.statistics or statistics(lesson.tokens, known)
            views = largest // lesson.tokens.shape[1]
            times = -(-draws * views // len(known))
            orders = np.concatenate([rng.permutation(len(known)) for _ in range(times)])
            rows = known[torch.from_numpy(orders[: draws * views])].reshape(draws, views)
            found.append(_Drawn(lesson, mean, std, rows))
        return found


class PredictorLearning(Task, Generic[Predictor]):
    """Learning a predictor from lessons, as the trainer sees it.

    Args:
        begun: Makes the predictor, its weights drawn by torch's generator.
        data: The lessons.
        seed: Of its weights.

    Attributes:
        predictor: What is learned.
        figure: Name of what is said of the images that are held out.
    """

    figure: str
    data: LessonData

    def __init__(self, begun: Callable[[], Predictor], data: LessonData, seed: int) -> None:
        self.data = data
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.predictor = begun().requires_grad_(True)
        self.model = nn.ModuleDict({"predictor": self.predictor})
        # What was found is part of the checkpoint, so that it is known when a run is opened again.
        self.model.register_buffer(self.figure, torch.zeros((), dtype=torch.float64))
        patches, width = self.predictor.token_mean.shape
        kinds = self.predictor.last.out_channels - 1
        self.architecture = {"width": width, "kinds": kinds, "patches": patches}

    def begin(self, folder: Path) -> None:
        """Keep the teacher."""
        teacher = self.data.teacher
        if teacher is not None and not checkpoints(folder):
            record = teacher.architecture.to_record()
            content = weight_file({"architecture": record, "model": teacher.state_dict()})
            write_atomically(folder / TEACHER_FILE, content)

    def optimizer(self, learning_rate: float, options: TrainingOptions) -> torch.optim.Optimizer:
        """AdamW; all weights decay."""
        return torch.optim.AdamW(
            self.predictor.parameters(),
            lr=learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of what the patches are, mean over all of the batch."""
        scores, targets = self._scores(batch, DROPOUT)
        right = (scores.argmax(dim=1) == targets).float().mean()
        return F.cross_entropy(scores, targets), {"accuracy": right}

    def _scores(self, batch: Batch, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Scores (M, Q + 1) of all patches of a batch, and their targets (M,)."""
        _, height, width, _ = batch["tokens"].shape
        scores = self.predictor(batch["tokens"].flatten(1, 2), (height, width), dropout)
        return scores.flatten(0, 1), batch["targets"].flatten()

    @torch.no_grad()
    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        """Examine the predictor, and measure its statistics."""
        device = self.predictor.token_mean.device
        made = [
            self._scores({name: views.to(device) for name, views in batch.items()})
            for batch in self.data.held_out()
        ]
        scores, targets = (torch.cat(some).cpu() for some in zip(*made, strict=True))
        found = self.examined(scores, targets)
        self.model.get_buffer(self.figure).fill_(found)
        self.measure()
        return {self.figure: found}

    @abc.abstractmethod
    def examined(self, scores: Tensor, targets: Tensor) -> float:
        """What is to be known of patches that the predictor has not learned from.

        Args:
            scores: float32 (M, Q + 1), what it says of them, on the CPU.
            targets: int64 (M,), what they are.
        """

    @abc.abstractmethod
    def measure(self) -> None:
        """Set the predictor's statistics, as `measure` does."""


def kept_teacher(folder: Path) -> PartLearner | None:
    """What gave a run its targets where it began, on the CPU; None where no run is gone on with.

    Made once more, it could number its parts otherwise: a GPU does not compute alike to the bit.

    Args:
        folder: Of the run.

    Raises:
        MissingError, DamageError, MismatchError: The run has checkpoints, and no sound teacher.
    """
    if not checkpoints(folder):
        return None
    path = folder / TEACHER_FILE
    if not path.exists():
        raise MissingError(
            f"{path} is gone, or was never there as in runs of versions before it was kept: remove "
            f"{folder} and what was learned after it, which is learned anew then, or name another "
            "--output"
        )
    return learner_of(load_checkpoint(path), path)


def learned(
    task: PredictorLearning[Predictor], options: TrainingOptions
) -> tuple[Predictor, float]:
    """A predictor that has learned its lessons, by a run of its own or from an earlier one.

    Args:
        task: What is learned.
        options: From `options_within`.

    Returns:
        The predictor, on the CPU, frozen; and the task's figure.

    Raises:
        SettingError, MismatchError, DamageError: As of `pipeline.training.fit`.
    """
    state = state_to_resume(task, options)
    if state is None or state["step"] * WHOLES_A_STEP < len(task.data):
        task.data.warm()  # or it would count as waiting for the first batch
    fit(task, options)
    predictor = task.predictor.requires_grad_(False).cpu()
    return predictor, float(task.model.get_buffer(task.figure))


def options_within(options: TrainingOptions, name: str, seed: int) -> TrainingOptions:
    """How a predictor is learned in the folder of a run.

    Args:
        options: Of that run.
        name: Of the folder in its folder.
        seed: Of order and dropout.
    """
    changes: dict[str, Any] = {
        "output": options.output / name,
        "seed": seed,
        "epochs": 1,
        "batch_size": WHOLES_A_STEP,
        "micro_batch": 0,
        "base_learning_rate": LEARNING_RATE * 256 / WHOLES_A_STEP,
        "warmup_epochs": 0.0,
        "weight_decay": WEIGHT_DECAY,
        "clip_gradients": 0.0,
        "ema": 0.0,
        "precision": "fp32",
        "loader_workers": 0,  # batches lie in memory
        "resume": "auto",  # whether the run may go on was decided for the whole of it
        "checkpoint_steps": options.checkpoint_steps or CHECKPOINT_STEPS,
        "wandb": None,  # the run that this is for is one run there
        "launcher": "auto",
        "workers": 0,
        "address": None,
        "sharding": "none",
    }
    return TrainingOptions(**training_settings(options) | changes)


def fingerprint_of(predictor: PatchPredictor) -> str:
    """SHA-256 of the weights and statistics of a predictor on the CPU, hexadecimal."""
    return hashlib.sha256(weight_file(predictor.state_dict())).hexdigest()


@torch.no_grad()
def measure(
    model: PatchPredictor,
    tokens: Tensor,
    grid: tuple[int, int],
    known: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Set a predictor's statistics: of whole images' tokens, then of the features of objects.

    Args:
        model: On any device.
        tokens: float (B, L, D), on the CPU.
        grid: (h, w), with h w = L.
        known: `statistics` of all these tokens, where they were taken before.
    """
    mean, std = known or statistics(tokens, torch.arange(len(tokens)))
    model.token_mean.copy_(mean)
    model.token_std.copy_(std)
    device = model.token_mean.device
    told = [model.told(some.to(device), grid) for some in torch.split(tokens, AT_ONCE)]
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
