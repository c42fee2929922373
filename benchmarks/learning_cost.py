"""What a step of learning parts costs over the frozen encoder's forward alone, in CPU time.

Run: ``python -m semmae.benchmarks.learning_cost [--small] [--batch 8] [--rounds 9]``.

The encoder has random weights: a ViT-S/16 at 224 pixels, or with ``--small`` one of the size
``micro`` with patches of 8 at 96 pixels.  A round takes the CPU time of each subject in turn, on
one thread; a ratio is to the encoder's forward of the same round.  A step is the loss, the backward
pass and AdamW; with images it holds the encoder's forward, with cached tokens it does not.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from semmae.models.autoencoder import SIZES
from semmae.models.encoders import FrozenEncoder
from semmae.models.parts import PartArchitecture, PartLearner
from semmae.pipeline.feeding import Batch
from semmae.pipeline.loaders import SquashedData
from semmae.pipeline.schedule import Draw
from semmae.stages.learn_parts import LearnPartsOptions
from semmae.stages.part_training import CachedTokens, PartLearning

FORWARD = "the encoder's forward"
BARS = {
    "a step with features": 1.3,
    "a step with features and pixels": 2.0,
    "a step on cached tokens": 0.2,
}
"""Largest ratio that is wanted of each step."""


def encoder_of(small: bool) -> FrozenEncoder:
    """A frozen encoder with random weights: ViT-S/16 for 224 pixels, or micro/8 for 96."""
    torch.manual_seed(0)
    micro = SIZES["micro"]
    width, depth, heads = (
        (micro["width"], micro["depth"], micro["heads"]) if small else (384, 12, 6)
    )
    transformer = VisionTransformer(
        img_size=96 if small else 224,
        patch_size=8 if small else 16,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        dynamic_img_size=True,
    )
    return FrozenEncoder(transformer)


class NoiseImages:
    """Images of noise, as training data: a step costs the same whatever they show.

    Args:
        images: uint8 (B, H, W, 3).
    """

    fingerprint = "noise"

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``images`` of a batch."""
        return {"images": self.images[[draw.index for draw in draws]]}


def learning(encoder: FrozenEncoder, images: NoiseImages, pixels: bool) -> PartLearning:
    """A learner of the default settings on noise, with or without the pixel decoder."""
    options = LearnPartsOptions(
        data="", encoder="", output=Path(), pixel_weight=float(pixels), decoder_width=64
    )
    shape = PartArchitecture(
        width=encoder.patch_width,
        style_width=encoder.width,
        parts=options.num_parts,
        clusters=options.clusters,
        pixel_decoder=pixels,
        decoder_width=options.decoder_width,
        grid_places=math.prod(encoder.native_size) // encoder.patch_size**2,
        predictor="parts",
        told_by="predictor",
        look_rounds=options.rounds_of_looks,
        background="predicted",
    )
    learner = PartLearner(shape)
    data = cast(SquashedData, images)
    return PartLearning(encoder, learner, data, data, options, encoder.native_size)


def stepping(task: PartLearning, batch: Callable[[], Batch]) -> Callable[[], None]:
    """One optimiser step, ready to be run again and again."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, weight_decay=0.0)

    def step() -> None:
        loss, _terms = task.loss(batch())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def subjects_of(encoder: FrozenEncoder, batch_size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the forward first."""
    height, width = encoder.native_size
    noise = np.random.default_rng(0).integers(0, 256, (batch_size, height, width, 3), np.uint8)
    images = NoiseImages(torch.from_numpy(noise))
    draws = [Draw(index, 0, 0.0) for index in range(batch_size)]
    with_features, with_pixels, with_tokens = BARS
    features, pixels = learning(encoder, images, False), learning(encoder, images, True)
    of_tokens = learning(encoder, images, False)
    assert isinstance(of_tokens.model, PartLearner)
    grid = (height // encoder.patch_size, width // encoder.patch_size)
    cached = CachedTokens(encoder(images.images), "noise", of_tokens.model, grid)
    return {
        FORWARD: partial(encoder, images.images),
        with_features: stepping(features, partial(images.__getitems__, draws)),
        with_pixels: stepping(pixels, partial(images.__getitems__, draws)),
        with_tokens: stepping(of_tokens, partial(cached.__getitems__, draws)),
    }


def measured(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each subject in each round, all in turn, after one run of each to warm up."""
    for run in subjects.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, run in subjects.items():
            began = time.process_time()
            run()
            found[name].append(time.process_time() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="micro/8 at 96 pixels")
    parser.add_argument("--batch", type=int, help="images; default 8, and 32 with --small")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    batch = given.batch or (32 if given.small else 8)
    found = measured(subjects_of(encoder_of(given.small), batch), given.rounds)
    name = "micro/8 at 96 px" if given.small else "ViT-S/16 at 224 px"
    print(f"{name}, batch {batch}, {given.rounds} rounds, one thread")
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )
    forward = np.array(found[FORWARD])
    print(f"{FORWARD:32} {np.median(forward):7.3f} s ({forward.min():.3f} to {forward.max():.3f})")
    for step, bar in BARS.items():
        low, middle, high = np.percentile(np.array(found[step]) / forward, [0, 50, 100])
        print(f"{step:32} {middle:7.3f} x ({low:.3f} to {high:.3f}), wanted: {bar} at most")


if __name__ == "__main__":
    main()
