"""Random numbers as pure functions of where they are used.

Order, crop, flip and mask of a sample must be the same whatever the number of ranks, workers and
batches, and after any resume.  So nothing here has state: a *stream* is a 64-bit number made from
(seed, purpose, epoch, index), and the numbers of a stream are splitmix64 of stream and position
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), computed
for whole batches at once.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Streams = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a stream is for: two purposes never share numbers."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    TRAINING = 5
    PARTNER = 6
    NOISE = 7
    PREDICTED = 8


def _mix(values: Streams) -> Streams:
    """The finaliser of splitmix64, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def streams(seed: int, purpose: Purpose, epoch: ArrayLike, index: ArrayLike) -> Streams:
    """One stream a sample.

    Args:
        seed: Seed of the run, not negative.
        purpose: What the numbers are for.
        epoch: Epoch of each sample, integers, any shape that broadcasts with ``index``.
        index: Index of each sample in its plan, integers.

    Returns:
        uint64 of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        value = _mix(np.asarray(seed, dtype=np.uint64) + _GOLDEN)
        for part in (np.uint64(purpose), epoch, index):
            value = _mix((value ^ np.asarray(part).astype(np.uint64)) + _GOLDEN)
    return value


def uniforms(stream: Streams, count: int, first: int = 0) -> NDArray[np.float64]:
    """``count`` numbers of each stream, from position ``first`` on.

    Args:
        stream: uint64 of any shape, from `streams`.
        count: Numbers wanted of each.
        first: Position of the first of them.

    Returns:
        float64 of shape ``stream.shape + (count,)``, uniform in [0, 1), multiples of 2**-53.
    """
    steps = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(np.asarray(stream, dtype=np.uint64)[..., None] + steps * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def partners(seed: int, count: int) -> NDArray[np.int64]:
    """Another sample for each of some samples: a derangement.

    All samples stand in one random ring, and each has the next one for its partner.  So each is the
    partner of one, and every other sample equally likely its own.  (Not every derangement can come:
    most have several rings.)

    Args:
        seed: Seed of the run, not negative.
        count: Samples, at least 2.

    Returns:
        int64 (count,), a permutation without fixed points.

    Raises:
        ValueError: A single sample has no other.
    """
    if count < 2:
        raise ValueError(f"partners need at least 2 samples, got {count}")
    ring = streams(seed, Purpose.PARTNER, 0, np.arange(count)).argsort(kind="stable")
    others = np.empty(count, dtype=np.int64)
    others[ring] = np.roll(ring, -1)
    return others
