"""What a mask costs: CPU time an image, in batches and alone, semantic beside random.

Run: ``python -m semmae.benchmarks.masks``.
"""

import platform
import time

import numpy as np

from semmae.pipeline.crops import crop_boxes, crop_labels_batch, flips
from semmae.pipeline.masks import random_masks, semantic_masks
from semmae.pipeline.randomness import Purpose, streams

PATCHES, PARTS, RATIO, ROUNDS = 196, 7, 0.75, 9


def cpu_microseconds(run: object, images: int, repeats: int) -> float:
    """CPU time of one call, microseconds an image."""
    began = time.process_time()
    for _ in range(repeats):
        run()  # type: ignore[operator]
    return (time.process_time() - began) / repeats / images * 1e6


def main() -> None:
    generator = np.random.default_rng(0)
    batch = 256
    maps = generator.integers(0, PARTS, (batch, 14, 14), dtype=np.uint8)
    labels, alpha = maps.reshape(batch, -1), np.linspace(0, 1, batch)
    index = np.arange(batch)
    stream = streams(0, Purpose.MASK, 0, index)
    sizes = np.tile(np.array([[375, 500]]), (batch, 1))

    def crop_maps() -> None:
        boxes = crop_boxes(streams(0, Purpose.CROP, 0, index), sizes[:, 0], sizes[:, 1])
        mirrored = flips(streams(0, Purpose.FLIP, 0, index))
        crop_labels_batch(maps, boxes, sizes, (14, 14), mirrored)

    runs = {
        f"semantic masks, batch of {batch}": (
            lambda: semantic_masks(labels, PARTS, RATIO, alpha, stream),
            batch,
            20,
        ),
        "semantic masks, one image": (
            lambda: semantic_masks(labels[:1], PARTS, RATIO, alpha[:1], stream[:1]),
            1,
            500,
        ),
        f"random masks, batch of {batch}": (
            lambda: random_masks(PATCHES, RATIO, stream),
            batch,
            20,
        ),
        f"crop boxes and cropped maps, batch of {batch}": (crop_maps, batch, 20),
    }
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {ROUNDS} rounds")
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, images, repeats) in runs.items():
            found[name].append(cpu_microseconds(run, images, repeats))
    for name, times in found.items():
        low, middle, high = np.percentile(times, [0, 50, 100])
        print(f"{name:45} {middle:7.2f} us an image ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
