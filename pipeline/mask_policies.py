"""Mask policies by name, and the schedule that a run draws masks by.

Legend: B images, L patches of a crop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from .masks import random_masks, semantic_masks


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """What a mask policy is told of a batch.

    Attributes:
        patches: L.
        mask_ratio: Share of patches to mask.
        alpha: float64 (B,), how far the schedule has gone, in [0, 1].
        stream: uint64 (B,), one random stream an image.
        labels: uint8 (B, L), part of each patch; None without a part store.
        parts: Channels of the part store, 0 without.
    """

    patches: int
    mask_ratio: float
    alpha: NDArray[np.float64]
    stream: NDArray[np.uint64]
    labels: NDArray[np.uint8] | None
    parts: int


def _semantic(request: MaskRequest) -> NDArray[np.bool_]:
    assert request.labels is not None
    return semantic_masks(
        request.labels, request.parts, request.mask_ratio, request.alpha, request.stream
    )


def _random(request: MaskRequest) -> NDArray[np.bool_]:
    return random_masks(request.patches, request.mask_ratio, request.stream)


POLICIES: dict[str, Callable[[MaskRequest], NDArray[np.bool_]]] = {
    "semantic": _semantic,
    "random": _random,
}
"""Mask policies by name: each makes bool (B, L), True where masked, with the same count a row."""

NEEDS_PARTS = frozenset({"semantic"})
"""Policies that read a part store."""


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """Which masks a run draws, and when.

    Attributes:
        policy: One of `POLICIES`.
        mask_ratio: Share of patches to mask, in [0, 1).
        gamma: Exponent of the schedule; 2 in the paper.
        start: alpha at the start of the run.
        end: alpha at its end.
    """

    policy: str
    mask_ratio: float
    gamma: float
    start: float
    end: float

    def __post_init__(self) -> None:
        """Refuse an unknown policy.

        Raises:
            SettingError: There is no such policy.
        """
        if self.policy not in POLICIES:
            raise SettingError(
                f"--masking is {self.policy!r}: expected one of {', '.join(sorted(POLICIES))}"
            )
