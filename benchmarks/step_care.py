"""What the guard of a step, and the moving average of its weights, add to it.

Run it::

    python -m semmae.benchmarks.step_care [--size small] [--batch 32] [--rounds 9] [--steps 2]

A step is loss, gradients, their norm and AdamW.  With the guard it also notes buffers, finds out
whether all is finite, lets AdamW ask for that, and has the step before counted; with the average
that follows, too.  All are timed in turn, one thread, CPU time; GPUs by events.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from semmae.benchmarks.intervals import interval
from semmae.benchmarks.pretraining_step import Step, seconds
from semmae.models.autoencoder import SIZES, Architecture, MaskedAutoencoder
from semmae.pipeline.averaging import Average
from semmae.pipeline.gradients import norms_of
from semmae.pipeline.guard import Guard
from semmae.pipeline.mask_counts import visible_count
from semmae.pipeline.masks import random_masks
from semmae.pipeline.tasks import decay_groups


def stepper(given: argparse.Namespace, guarded: bool, averaged: bool) -> Step:
    """Some optimiser steps on one fixed batch."""
    torch.manual_seed(0)
    device = torch.device(given.device)
    shape = Architecture(image_size=(224, 224), patch_size=16, **SIZES[given.size])
    model = MaskedAutoencoder(shape).to(device).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-6, fused=True)
    guard = Guard(model, optimizer, device, 10, Path(tempfile.gettempdir()))
    average = Average(model, 0.9999) if averaged else None
    patches = math.prod(shape.grid)
    images = torch.randint(0, 256, (given.batch, 224, 224, 3), dtype=torch.uint8, device=device)
    masks = random_masks(patches, 0.75, np.arange(given.batch, dtype=np.uint64))
    mask, visible = torch.from_numpy(masks).to(device), visible_count(patches, 0.75)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    done = 0

    def one() -> None:
        nonlocal done
        if guarded:
            guard.remember()
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
            loss = model(images, mask, visible).mean()
        loss.backward()
        if not guarded:
            nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return
        norms = norms_of({name: p.grad for name, p in trained.items() if p.grad is not None})
        if done and not guard.count() and average is not None:
            average.follow(done)
        guard.step(loss.detach(), torch.linalg.vector_norm(norms))
        optimizer.zero_grad(set_to_none=True)
        done += 1

    def some() -> None:
        for _ in range(given.steps):
            one()

    return some


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    subjects = {
        "plain": stepper(given, guarded=False, averaged=False),
        "guarded": stepper(given, guarded=True, averaged=False),
        "guarded and averaged": stepper(given, guarded=True, averaged=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    device = torch.device(given.device)
    for turn in range(given.rounds + 1):
        for name, run in subjects.items():
            needed = seconds(run, device)
            if turn:  # the first one warms up
                taken[name].append(needed)
    plain = np.array(taken.pop("plain"))
    print(f"{given.size}/16, batch {given.batch}, {given.precision}, {device}:")
    print(f"{plain.mean() / given.steps * 1e3:.1f} ms a plain step")
    for name, times in taken.items():
        print(f"{name} over plain: {interval((np.array(times) / plain).tolist())}")


if __name__ == "__main__":
    main()
