"""`semmae demo`: the whole path on generated images, on a CPU, in minutes.

Generated animals with true part labels; an encoder that these commands trained on other animals of
the kind; parts learned on it; part maps extracted by Ray workers; a masked autoencoder pretrained
with semantic-guided masks; evaluations; pictures.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..pipeline.options import require
from .evals.history import newest_results
from .evals.knn import KnnOptions, knn
from .evals.linear import LinearOptions, linear
from .evals.parts import PartsOptions, evaluate_parts
from .extract_parts import ExtractPartsOptions, extract_parts
from .learn_parts import LearnPartsOptions, learn_parts
from .make_creatures import MakeCreaturesOptions, make_creatures
from .pretrain import PretrainOptions, pretrain
from .show import ShowMasksOptions, ShowPartsOptions, show_masks, show_parts

EMBEDDED_ENCODER = Path(__file__).with_name("creature_encoder.safetensors")
"""A micro vision transformer (patch 8, 96 px) that `recipes/creature_encoder.sh` trained."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Settings of `demo`."""

    output: Annotated[Path, "Folder for all that the demo makes."] = Path("demo")
    train: Annotated[int, "Training images."] = 2400
    val: Annotated[int, "Validation images."] = 600
    epochs: Annotated[int, "Epochs of pretraining."] = 8
    workers: Annotated[int, "Ray actors for the extraction; 0 does without Ray."] = 2
    bootstrap: Annotated[
        bool, "Pretrain the encoder here, with random masks, instead of taking the one shipped."
    ] = False
    bootstrap_epochs: Annotated[int, "Epochs of that."] = 20
    seed: Annotated[int, "Of images and training."] = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        require(self.train >= 128, "train", self.train, "at least 128")
        require(self.val >= 12, "val", self.val, "at least 12, one a species")


def _pretraining(options: DemoOptions, name: str, epochs: int, parts: Path | None) -> Path:
    output = options.output / name
    pretrain(
        PretrainOptions(
            data=str(options.output / "creatures" / "images"),
            output=output,
            parts=parts,
            masking="random" if parts is None else "semantic",
            size="micro",
            patch_size=8,
            image_size=96,
            epochs=epochs,
            batch_size=64,
            base_learning_rate=2e-3,
            warmup_epochs=min(2.0, epochs / 4),
            loader_workers=1,
            checkpoint_epochs=max(epochs // 4, 1),
            seed=options.seed,
        )
    )
    return output


def demo(options: DemoOptions) -> None:
    """Run the whole path; an interrupted demo goes on where it stopped.

    Args:
        options: The settings.
    """
    began = time.monotonic()
    out, data = options.output, str(options.output / "creatures" / "images")
    learner, store, results = out / "learner", out / "parts", out / "results"
    workers = min(options.workers, os.cpu_count() or 1)

    def step(text: str, run: Callable[[], object]) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)
        run()

    step(
        "making images of animals with true part labels",
        lambda: make_creatures(
            MakeCreaturesOptions(
                output=out / "creatures", train=options.train, val=options.val, seed=options.seed
            )
        ),
    )
    encoder = EMBEDDED_ENCODER
    if options.bootstrap:
        encoder = out / "encoder"
        step(
            "pretraining an encoder with random masks",
            lambda: _pretraining(options, "encoder", options.bootstrap_epochs, None),
        )
    step(
        "learning parts on the frozen encoder",
        lambda: learn_parts(
            LearnPartsOptions(
                data=data,
                encoder=str(encoder),
                output=learner,
                loader_workers=1,
                epochs=4,
                place_images=2000,
                place_steps=min(options.train // 2, 1500),
                round_steps=min(options.train // 2, 1500),
                seed=options.seed,
            )
        ),
    )
    step(
        f"extracting part maps with {workers} workers",
        lambda: extract_parts(
            ExtractPartsOptions(data=data, learner=learner, output=store, workers=workers)
        ),
    )
    step(
        "pretraining with semantic-guided masks",
        lambda: _pretraining(options, "semmae", options.epochs, store),
    )
    run = str(out / "semmae")
    step("k-NN", lambda: knn(KnnOptions(checkpoint=run, data=data, output=results)))
    step(
        "linear probe",
        lambda: linear(
            LinearOptions(checkpoint=run, data=data, output=results, cached_views=1, batch_size=128)
        ),
    )
    labels = out / "creatures" / "labels"
    step(
        "parts against the true ones",
        lambda: evaluate_parts(
            PartsOptions(parts=store, data=data, labels=labels, output=results, images=1000)
        ),
    )
    step(
        "drawing",
        lambda: (
            show_parts(ShowPartsOptions(parts=store, data=data, output=out / "parts.png")),
            show_masks(ShowMasksOptions(parts=store, data=data, output=out / "masks.png")),
        ),
    )
    _finish(options, time.monotonic() - began)


def _finish(options: DemoOptions, seconds: float) -> None:
    """Print the table of results, and name what is worth opening."""
    out = options.output
    text = newest_results(out / "results").to_string(na_rep="", float_format="%.1f")
    (out / "results.txt").write_text(text + "\n")
    print(f"\n{text}\n\nDone in {seconds / 60:.1f} minutes. Worth opening:")
    newest = sorted((out / "semmae" / "pictures").glob("*.png"))[-1]
    for path, what in (
        (out / "parts.png", "images under the colours of their parts"),
        (out / "masks.png", "semantic masks from shares of parts to whole parts, random beside"),
        (newest, "images, what the encoder saw, what the decoder made of it"),
        (out / "results.txt", "k-NN, linear probe and parts, baselines beside"),
        (out / "parts" / "meta", "pandas.read_parquet reads it: a row an image"),
    ):
        print(f"  {path}\n      {what}")
