"""Variants of the part learner and its baselines, over seeds; against true part labels, if any.

Run: ``python -m semmae.benchmarks.part_learner ENCODER DATA [LABELS] [--seeds 4]
[--variants A,B]``, for instance with ``stages/creature_encoder.safetensors work/creatures/images
work/creatures/labels`` after ``semmae data make-creatures --output work/creatures``.

Parts are learned on the train split without labels and measured on the val split by the functions
of ``semmae eval parts``; tokens are read once for all.  A line is a mean over seeds and, below it,
the sample standard deviation; percent, but ``dead`` counts parts.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semmae.models.encoders import FrozenEncoder
from semmae.models.parts import LEARNED, PartLearner
from semmae.models.places import PlacePredictor
from semmae.pipeline.feeding import TrainingData
from semmae.pipeline.image_source import ImageSource, drawn
from semmae.pipeline.loaders import SquashedData
from semmae.pipeline.schedule import Draw
from semmae.pipeline.sources import Split, list_images
from semmae.stages.evals.part_baselines import BASELINES, Baseline, beside
from semmae.stages.evals.part_learners import evidence_of, parts_of
from semmae.stages.evals.part_measures import Evidence, measured
from semmae.stages.evals.part_probe import probe_parts
from semmae.stages.evals.part_views import EncodedViews, View, encoded_views, joined
from semmae.stages.label_images import labels_of
from semmae.stages.learn_parts import LearnPartsOptions
from semmae.stages.networks import image_size_of, open_encoder, parse_reading
from semmae.stages.part_rounds import Looks, goes_on, later_rounds, sample_looks
from semmae.stages.part_start import position_share, started_learner, voting_learner
from semmae.stages.part_training import CachedTokens, PartLearning
from semmae.stages.place_learning import learn_places, sample_place_views

BATCH, LEARNING_RATE, AT_ONCE = 48, 1e-3, 64

VARIANTS: dict[str, dict[str, object]] = {
    "anchored": {},
    "one round": {"rounds": 1},
    "2 rounds": {"rounds": 2},
    "4 rounds": {"rounds": 4},
    "by tokens": {"told_by": "tokens"},
    "kmeans by places": {"variant": "kmeans", "told_by": "places"},
    "voted background": {"background": "voted"},
    "paper": {"variant": "paper"},
    "paper over places": {"variant": "paper", "normalisation": "places"},
    "paper by dot products": {"variant": "paper", "similarity": "dot", "temperature": 1.0},
    "over places": {"normalisation": "places"},
    "dot products": {"similarity": "dot"},
    "paper with a predicted background": {"variant": "paper", "background": "predicted"},
    "perceptual 1": {"perceptual_weight": 1.0},
    "consistency 1": {"consistency_weight": 1.0},
    "pixels 1": {"pixel_weight": 1.0},
    "paper and perceptual 1": {"variant": "paper", "perceptual_weight": 1.0},
    "paper with a wider decoder": {"variant": "paper", "decoder_width": 256},
    "paper with noise": {"variant": "paper", "decoder_noise": True},
    "no background": {"background": "none"},
    "no looks": {"look_rounds": 0},
    "looks 1 round": {"look_rounds": 1},
    "looks 0.1": {"look_temperature": 0.1},
    "looks 0.2": {"look_temperature": 0.2},
    "class share 0": {"class_share": 0.0},
    "class share 0.5": {"class_share": 0.5},
    "diversity 0": {"diversity_weight": 0.0},
    "blur 0": {"blur": 0.0},
    "blur 2": {"blur": 2.0},
    "blur 3": {"blur": 3.0},
    "blur 3 and 5 parts": {"blur": 3.0, "num_parts": 5},
    "blur 1": {"blur": 1.0},
    "affinity 0": {"affinity": 0.0},
    "affinity 0.2": {"affinity": 0.2},
    "5 parts": {"num_parts": 5},
    "9 parts": {"num_parts": 9},
    "11 parts": {"num_parts": 11},
    "voted by 24 clusters": {"background": "voted", "clusters": 24},
    "temperature 0.05": {"temperature": 0.05},
    "temperature 0.2": {"temperature": 0.2},
    "positions kept": {"positions": "keep"},
    "positions removed": {"positions": "remove"},
}
"""Changes of `LearnPartsOptions` by name, which has no comma."""

COLUMNS = {
    "FG-NMI": "fg_nmi",
    "FG-ARI": "fg_ari",
    "NMI": "nmi",
    "ARI": "ari",
    "in-ARI": "in_image_ari",
    "in-FG": "in_image_fg_ari",
    "coher.": "coherence",
    "place": "position_share",
    "class": "class_share",
    "flip": "flip_agreement",
    "flip FG": "flip_agreement_fg",
    "crop": "crop_agreement",
    "crop FG": "crop_agreement_fg",
    "dead": "dead_parts",
}


@dataclass(frozen=True, eq=False)
class Bench:
    """Tokens and truth that all variants share."""

    encoder: FrozenEncoder
    size: tuple[int, int]
    grid: tuple[int, int]
    train_images: ImageSource
    train: EncodedViews
    train_truth: Evidence
    val: EncodedViews
    moved: EncodedViews
    truth: Evidence
    settings: dict[str, Any]
    steps: int

    def _options(self, seed: int, **changes: object) -> LearnPartsOptions:
        device = str(self.encoder.mean.device)
        settings: dict[str, Any] = {"output": Path(), **self.settings, **changes}
        return LearnPartsOptions(data="", encoder="", seed=seed, device=device, **settings)

    @cache  # noqa: B019 - lives as long as the bench
    def places(self, seed: int) -> PlacePredictor:
        """The predictor of places, the same for all variants."""
        tokens, images = self.train.tokens["whole"], self.train_images
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(seed, output=Path(folder))
            voter = voting_learner(tokens, self.grid, options)
            count, encoder, size = options.place_images, self.encoder, self.size
            views = partial(sample_place_views, encoder, voter, images, size, count, seed)
            return learn_places(views, "", tokens.patches, self.grid, options)[0]

    @cache  # noqa: B019
    def looks(self, seed: int) -> Looks:
        """Whole images and crops for later rounds, the same for all variants."""
        count = self._options(seed).place_images
        return sample_looks(self.encoder, self.train_images, self.size, count, seed)

    @cache  # noqa: B019
    def learned(self, variant: str, seed: int) -> PartLearner:
        """A learner after its steps on the train tokens, or at once if nothing is learned."""
        options = self._options(seed, **VARIANTS[variant])
        tokens = self.train.tokens["whole"]
        places = self.places(seed) if options.learns_places else None
        learner = started_learner(tokens, self.grid, options, places)
        if goes_on(learner, options):
            with tempfile.TemporaryDirectory() as folder:
                within = replace(options, output=Path(folder))
                looks = partial(self.looks, seed)
                learner = later_rounds(learner, looks, "", tokens, self.grid, within)
        if options.variant not in LEARNED:
            return learner.eval()
        whole = SquashedData(self.train_images, self.size)
        # Pixels and second views are made of the images, all else of the tokens.
        data: TrainingData = whole
        if not (options.rebuilds_pixels or options.consistency_weight):
            data = CachedTokens(tokens, "", learner, self.grid)
        task = PartLearning(self.encoder, learner, data, whole, options, self.size)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for _ in range(self.steps):
            chosen = torch.randint(0, len(data), (BATCH,), generator=generator).tolist()
            loss, _terms = task.loss(data.__getitems__([Draw(i, 0, 0.0) for i in chosen]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return learner.eval()

    def judged(self, learner: PartLearner) -> dict[str, float]:
        """The figures of a learner on the val images."""
        found = parts_of({"": learner}, self.val, [self.moved], self.grid, AT_ONCE)
        return measured(found[""], self.truth)

    def probed(self, seed: int) -> dict[str, float]:
        """The figures of a linear probe with labels."""
        train, held = self.train.tokens["whole"].patches, self.val.tokens["whole"].patches
        assert self.train_truth.true is not None
        assert self.truth.true is not None
        return probe_parts(train, self.train_truth.true, held, self.truth.true, seed)


def bench(
    encoder: FrozenEncoder,
    size: tuple[int, int],
    data: str,
    labels: Path | None,
    train: int,
    val: int,
    settings: dict[str, Any],
    steps: int,
) -> Bench:
    """Read all tokens and labels; ``settings`` and ``steps`` are of all learners."""
    patch = encoder.patch_size
    grid = (size[0] // patch, size[1] // patch)

    def read(split: Split, count: int, *views: View) -> tuple[ImageSource, EncodedViews, Evidence]:
        images = ImageSource(list_images(data, split))
        chosen = drawn(len(images), count, seed=0)
        encoded = joined(encoded_views(encoder, images, size, chosen, views, AT_ONCE))
        true = None
        if labels is not None:
            true = labels_of(labels, images, encoded.positions, grid, size)
        return images, encoded, evidence_of(images, encoded, true, seed=0)

    train_images, known, train_truth = read("train", train, "whole")
    _, views, truth = read("val", val, "whole", "flip", "crop")
    moved: tuple[View, ...] = ("flip", "crop")
    return Bench(
        encoder,
        size,
        grid,
        train_images,
        known,
        train_truth,
        views,
        replace(views, tokens={view: views.tokens[view] for view in moved}),
        truth,
        settings,
        steps,
    )


def line(name: str, run: Callable[[int], dict[str, float]], seeds: int) -> None:
    """Print mean and sample standard deviation of each figure over seeds."""
    runs = [run(seed) for seed in range(seeds)]
    means, spreads = "", ""
    for head, key in COLUMNS.items():
        values = [figures[key] for figures in runs if key in figures]
        width = max(len(head) + 1, 8)
        means += f"{np.mean(values):{width}.1f}" if values else " " * (width - 1) + "-"
        spreads += f"{np.std(values, ddof=1):{width}.1f}" if len(values) > 1 else " " * width
    print(f"{name:22}{means}\n{'':22}{spreads}", flush=True)


def _variant(made: Bench, name: str, seed: int) -> dict[str, float]:
    return made.judged(made.learned(name, seed))


def _baseline(made: Bench, baseline: Baseline, seed: int) -> dict[str, float]:
    tokens, learner = made.train.tokens["whole"], made.learned("anchored", seed)
    return made.judged(beside(learner, tokens, made.grid, baseline, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("data")
    parser.add_argument("labels", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, parted by commas")
    parser.add_argument("--blocks", default="-1", help="as of `semmae stage1 learn-parts`")
    parser.add_argument("--facet", default="tokens", help="likewise")
    parser.add_argument("--image-size", default=0, help="pixels, N or HxW; 0: the encoder's own")
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--val-images", type=int, default=1000)
    parser.add_argument("--place-images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3, help="of variants that say nothing else")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=400, help="of the last training")
    given = parser.parse_args()
    names = given.variants.split(",")
    if unknown := sorted(set(names) - VARIANTS.keys()):
        parser.error(f"no variant {', '.join(unknown)}: there are {', '.join(VARIANTS)}")
    reading = parse_reading(given.blocks, given.facet, pooled=False)
    encoder = open_encoder(given.encoder, reading)
    counts = given.train_images, given.val_images
    settings = {"place_images": given.place_images, "rounds": given.rounds}
    size = image_size_of(given.image_size, encoder.native_size, encoder.patch_size)
    made = bench(encoder, size, given.data, given.labels, *counts, settings, given.steps)
    tokens = made.train.tokens["whole"]
    print(f"place explains {position_share(tokens.patches):.0%} of the tokens' variance")
    print(" " * 22 + "".join(f"{head:>{max(len(head) + 1, 8)}}" for head in COLUMNS))
    for name in names:
        line(name, partial(_variant, made, name), given.seeds)
    for baseline in BASELINES if given.baselines else ():
        line(baseline, partial(_baseline, made, baseline), given.seeds)
    if given.labels is not None:
        line("probe with labels", made.probed, given.seeds)


if __name__ == "__main__":
    main()
