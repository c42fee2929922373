"""Images of a plan as batches: for pretraining with masks, for learning parts, for evaluation.

Crop, flip and mask of a sample are functions of (seed, epoch, index) alone, so every number of
workers and every batch gives the same samples.  Images leave as uint8; networks normalise them on
their own device.

Legend of shapes: B images, H W pixels, g_h g_w places of a stored map, L patches of a crop.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import MismatchError, MissingError, SettingError
from ..storage.part_store import PartStore
from .crops import crop_boxes, crop_image, crop_labels_batch, evaluation_crop, flips, squash
from .decoding import BadImage, decode_image
from .masks import alpha_at, random_masks, semantic_masks
from .plan import Plan
from .randomness import Purpose, streams
from .sources import ImageReader
from .training import Batch, Draw, indices

Pixels = NDArray[np.uint8]


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


class ImageSource:
    """Decoded images of chosen rows of a plan, by position among the chosen.

    Args:
        plan: The images.
        rows: Rows of the plan that count, int64 (N,); all by default.
    """

    def __init__(self, plan: Plan, rows: NDArray[np.int64] | None = None) -> None:
        self.plan = plan
        self.rows = np.arange(len(plan)) if rows is None else rows
        self._reader = ImageReader(plan)
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the plan and the chosen rows."""
        digest = hashlib.sha256(self.plan.fingerprint.encode())
        digest.update(np.ascontiguousarray(self.rows).tobytes())
        return digest.hexdigest()

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each chosen image, -1 where there is none."""
        return self.plan.labels[self.rows]

    def decoded(self, position: int) -> Pixels:
        """One image, uint8 (H, W, 3).

        Raises:
            BadImage: It cannot be read.
        """
        return decode_image(self._reader.read(int(self.rows[position])))

    def decoded_or_next(self, position: int) -> tuple[int, Pixels]:
        """One image, or the next good one where it is bad, with the position it came from.

        A part store knows its bad images, so they are never asked for.  Without one they are found
        here: a warning names each, and training goes on with its neighbour.

        Raises:
            MissingError: Not one image can be read.
        """
        for offset in range(len(self)):
            candidate = (position + offset) % len(self)
            try:
                return candidate, self.decoded(candidate)
            except BadImage as bad:
                if candidate not in self._warned:
                    self._warned.add(candidate)
                    key = self.plan.keys[self.rows[candidate]]
                    print(f"skipped {key}: {bad}", file=sys.stderr, flush=True)
        raise MissingError(f"not one of the {len(self)} images in {self.plan.root} can be read")


class _Crops(NamedTuple):
    """Random resized crops of a batch, and where each was taken."""

    positions: list[int]
    pixels: Pixels
    boxes: NDArray[np.int64]
    sizes: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


def _streams_of(draws: Sequence[Draw], seed: int, purpose: Purpose) -> NDArray[np.uint64]:
    return streams(seed, purpose, np.array([draw.epoch for draw in draws]), indices(draws))


def _cropped(
    images: ImageSource,
    draws: Sequence[Draw],
    seed: int,
    scale: tuple[float, float],
    size: tuple[int, int],
) -> _Crops:
    """Decode, crop and flip the images of a batch."""
    found = [images.decoded_or_next(draw.index) for draw in draws]
    sizes = np.array([image.shape[:2] for _, image in found], dtype=np.int64)
    crop_streams = _streams_of(draws, seed, Purpose.CROP)
    boxes = crop_boxes(crop_streams, sizes[:, 0], sizes[:, 1], scale=scale)
    mirrored = flips(_streams_of(draws, seed, Purpose.FLIP))
    pixels = [
        crop_image(image, box, size, bool(flip))
        for (_, image), box, flip in zip(found, boxes, mirrored, strict=True)
    ]
    positions = [position for position, _ in found]
    return _Crops(positions, np.stack(pixels), boxes, sizes, mirrored)


class PretrainingData:
    """Crops of a data set with their masks: what stage 2 trains on.

    A sample is a random resized crop, flipped with probability 1/2 (MAE's augmentation), and a mask
    from the part map cropped and flipped alike.

    Args:
        images: The images; rows that a store holds and found good, where there is one.
        labels: Part maps uint8 (M, g_h, g_w), memory-mapped, and the row of each of those images
            in them, int64 (N,); or None.
        parts: Channels of the maps.
        image_size: (H, W) of a crop, pixels.
        patch_size: p, pixels.
        masks: Which masks to draw.
        seed: Of crops, flips and masks.
        crop_scale: Least and largest share of the image's area in a crop.
    """

    def __init__(
        self,
        images: ImageSource,
        labels: tuple[NDArray[np.uint8], NDArray[np.int64]] | None,
        parts: int,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        masks: MaskSchedule,
        seed: int,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        store_fingerprint: str = "",
    ) -> None:
        if labels is None and masks.policy in NEEDS_PARTS:
            raise SettingError(f"--masking {masks.policy} needs --parts: the part store to follow")
        self._images, self._labels, self._parts = images, labels, parts
        self._size, self._masks, self._seed = image_size, masks, seed
        self._grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self._scale = crop_scale
        self._store_fingerprint = store_fingerprint

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Of the images, and of the store the maps came from."""
        return f"{self._images.fingerprint}{self._store_fingerprint}"

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """Crops and masks of a batch.

        Args:
            draws: B draws.

        Returns:
            ``images`` uint8 (B, H, W, 3), ``mask`` bool (B, L), ``alpha`` float32 (B,),
            ``index`` int64 (B,).
        """
        crops = _cropped(self._images, draws, self._seed, self._scale, self._size)
        labels = None
        if self._labels is not None:
            stored, rows = self._labels
            maps = stored[rows[crops.positions]]
            labels = crop_labels_batch(maps, crops.boxes, crops.sizes, self._grid, crops.mirrored)
            labels = labels.reshape(len(draws), -1)
        alpha = alpha_at(
            [draw.progress for draw in draws], self._masks.gamma, self._masks.start, self._masks.end
        )
        mask = POLICIES[self._masks.policy](
            MaskRequest(
                patches=self._grid[0] * self._grid[1],
                mask_ratio=self._masks.mask_ratio,
                alpha=alpha,
                stream=_streams_of(draws, self._seed, Purpose.MASK),
                labels=labels,
                parts=self._parts,
            )
        )
        return {
            "images": torch.from_numpy(crops.pixels),
            "mask": torch.from_numpy(mask),
            "alpha": torch.from_numpy(alpha.astype(np.float32)),
            "index": torch.from_numpy(indices(draws)),
        }


class SquashedData:
    """Whole images squashed to one size: what the part learner trains on.

    Args:
        images: The images.
        image_size: (H, W), pixels.
    """

    def __init__(self, images: ImageSource, image_size: tuple[int, int]) -> None:
        self._images, self._size = images, image_size

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Of the images."""
        return self._images.fingerprint

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``images`` uint8 (B, H, W, 3) and ``index`` int64 (B,) of a batch."""
        pixels = [squash(self._images.decoded_or_next(d.index)[1], self._size) for d in draws]
        return {
            "images": torch.from_numpy(np.stack(pixels)),
            "index": torch.from_numpy(indices(draws)),
        }


class AugmentedData:
    """Random crops with their class: what a linear probe trains on.

    Args:
        images: Images with labels.
        image_size: (H, W), pixels.
        seed: Of crops and flips.
        crop_scale: Least and largest share of the image's area in a crop; MAE's probe takes 0.08.
    """

    def __init__(
        self,
        images: ImageSource,
        image_size: tuple[int, int],
        seed: int,
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ) -> None:
        self._images, self._size, self._seed, self._scale = images, image_size, seed, crop_scale

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Of the images."""
        return self._images.fingerprint

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``images`` uint8 (B, H, W, 3) and ``labels`` int64 (B,) of a batch."""
        crops = _cropped(self._images, draws, self._seed, self._scale, self._size)
        labels = torch.from_numpy(self._images.labels[crops.positions])
        return {"images": torch.from_numpy(crops.pixels), "labels": labels}


def join_store(plan: Plan, store: PartStore) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match images to a part store by key.

    Args:
        plan: Images of the data set.
        store: Their part maps; it may hold more.

    Returns:
        Rows of the plan that the store found good, int64 (M,), and their rows in the store (M,).

    Raises:
        MismatchError: The store lacks an image of the plan, or holds it with another size.
    """
    meta = store.meta(["key", "status"]).to_pandas()
    sizes = store.plan().select(["bytes"])["bytes"].to_numpy()
    place = {key: row for row, key in enumerate(meta["key"])}
    rows = np.array([place.get(key, -1) for key in plan.keys], dtype=np.int64)
    if (rows < 0).any():
        first = plan.keys[int((rows < 0).argmax())]
        raise MismatchError(
            f"{store.path} was made from other images: it lacks {(rows < 0).sum()} of {len(plan)} "
            f"in {plan.root}, {first} first; run extract-parts on this data into a new store"
        )
    changed = sizes[rows] != plan.sizes
    if changed.any():
        first = plan.keys[int(changed.argmax())]
        raise MismatchError(
            f"{changed.sum()} images in {plan.root} have changed since {store.path} was made, "
            f"{first} first; run extract-parts on this data into a new store"
        )
    good = (meta["status"].to_numpy() == "ok")[rows]
    if not good.any():
        raise MissingError(f"{store.path} holds not one good image of {plan.root}")
    return np.flatnonzero(good), rows[good]


Geometry = Literal["squash", "center"]
"""How an evaluation sees an image: whole, or its centre."""


def batches_in_order(
    images: ImageSource,
    image_size: tuple[int, int],
    batch_size: int,
    geometry: Geometry = "center",
    positions: NDArray[np.int64] | None = None,
    threads: int = 2,
) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
    """Images one after another, decoded by threads ahead of their use; bad ones are left out.

    Args:
        images: The images.
        image_size: (H, W), pixels.
        batch_size: Images at a time.
        geometry: Whole images squashed, or the centre crop of evaluations.
        positions: Which images; all by default.
        threads: Decoding threads.

    Yields:
        Positions int64 (B,) of the good images of each batch, and uint8 (B, H, W, 3).
    """
    fit_to = squash if geometry == "squash" else evaluation_crop
    wanted = np.arange(len(images)) if positions is None else positions

    def load(position: int) -> Pixels | None:
        try:
            return fit_to(images.decoded(position), image_size)
        except BadImage:
            return None

    with ThreadPoolExecutor(threads) as pool:
        chunks = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
        waiting = [pool.submit(load, int(p)) for chunk in chunks[:2] for p in chunk]
        for number, chunk in enumerate(chunks):
            if number + 2 < len(chunks):
                waiting += [pool.submit(load, int(p)) for p in chunks[number + 2]]
            loaded = [future.result() for future in waiting[: len(chunk)]]
            del waiting[: len(chunk)]
            good = [i for i, pixels in enumerate(loaded) if pixels is not None]
            if good:
                yield chunk[good], np.stack([pixels for pixels in loaded if pixels is not None])
