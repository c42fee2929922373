"""Images of a plan as batches: for pretraining with masks, for learning parts, for a probe.

Crop, flip, mask and what is predicted of a sample are functions of (seed, epoch, index) alone, so
every number of workers and every batch gives the same samples.  Images leave as uint8; networks
normalise them on their own device.

Legend of shapes: B images, H W pixels, g_h g_w places of a stored map, L patches of a crop.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import SettingError
from .crops import crop_boxes, crop_image, crop_maps, flips, squash
from .feeding import Batch
from .image_source import ImageSource, Pixels
from .mask_counts import predicted_count, visible_count
from .mask_policies import POLICIES, MaskRequest, MaskSchedule
from .masks import predicted_places
from .part_maps import PartMaps
from .randomness import Purpose, streams
from .schedule import Draw, indices


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
    """Decode, crop and flip the images of a batch.

    Ours: a box's aspect is drawn relative to the crop's, so that crops that are not square are
    stretched no more than square ones.
    """
    found = [images.decoded_or_next(draw.index) for draw in draws]
    sizes = np.array([image.shape[:2] for _, image in found], dtype=np.int64)
    crop_streams = _streams_of(draws, seed, Purpose.CROP)
    aspect = size[1] / size[0]
    ratio = (aspect * 3 / 4, aspect * 4 / 3)
    boxes = crop_boxes(crop_streams, sizes[:, 0], sizes[:, 1], scale=scale, ratio=ratio)
    mirrored = flips(_streams_of(draws, seed, Purpose.FLIP))
    pixels = [
        crop_image(image, box, size, bool(flip))
        for (_, image), box, flip in zip(found, boxes, mirrored, strict=True)
    ]
    positions = [position for position, _ in found]
    return _Crops(positions, np.stack(pixels), boxes, sizes, mirrored)


class _ImageData:
    """What all training data made of images have in common."""

    def __init__(self, images: ImageSource) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    @property
    def fingerprint(self) -> str:
        """Of the images."""
        return self._images.fingerprint

    def warm(self) -> None:
        """Load what forked workers should share, and tell of images that are slow to come."""
        self._images.warm()
        if told := self._images.slow_in_random_order:
            print(told, file=sys.stderr)

    def digests(self) -> NDArray[np.uint64]:
        """Of the images, as `ImageSource.digests`."""
        return self._images.digests()

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """Keys of the images that are drawn there; a bad one's neighbour is not named."""
        return self._images.names(positions)


class PretrainingData(_ImageData):
    """Crops of a data set with their masks: what stage 2 trains on.

    A sample is a random resized crop, flipped with probability 1/2 (MAE's augmentation), and a mask
    from the map cropped and flipped alike.  Another image's map is cropped where the image is: the
    same share of its height and width.

    Args:
        images: The images; rows that a store holds and found good, where there is one.
        maps: What the policy reads of a store (`read_maps`), by position of the images; None where
            it reads nothing.
        parts: Channels of part maps.
        image_size: (H, W) of a crop, pixels.
        patch_size: p, pixels.
        masks: Which masks to draw.
        seed: Of crops, flips, masks and what is predicted.
        crop_scale: Least and largest share of the image's area in a crop.
        store: What tells the store that the maps came from from others, by name, its fingerprint
            first; nothing without one.
        background: Channel of the background in part maps; None without one.
        predicted_share: Share of the masked patches that are predicted.
        own_parts: Part maps by position of the images, which losses are told by where the policy
            reads none; None where there are none.

    Attributes:
        parts, background: As given.

    Raises:
        SettingError: The policy reads maps, and there are none.
    """

    def __init__(
        self,
        images: ImageSource,
        maps: PartMaps | None,
        parts: int,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        masks: MaskSchedule,
        seed: int,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        store: Mapping[str, str] | None = None,
        background: int | None = None,
        predicted_share: float = 1.0,
        own_parts: PartMaps | None = None,
    ) -> None:
        reads = POLICIES[masks.policy].reads
        if maps is None and reads is not None:
            raise SettingError(f"--masking {masks.policy} needs --parts: the part store to follow")
        super().__init__(images)
        self._maps = maps if reads is not None else None
        self._own_parts = own_parts
        self.parts, self.background = parts, background
        self._size, self._masks, self._seed = image_size, masks, seed
        self._grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        patches, ratio = self._grid[0] * self._grid[1], masks.mask_ratio
        self._masked = patches - visible_count(patches, ratio)
        self._predicted = predicted_count(patches, ratio, predicted_share)
        self._scale = crop_scale
        self._store = dict(store or {})

    @property
    def fingerprint(self) -> str:
        """Of the images, and of the store the maps came from."""
        return hashlib.sha256(" ".join(self.sources.values()).encode()).hexdigest()

    @property
    def sources(self) -> dict[str, str]:
        """Fingerprint of each of them, and what else tells the store."""
        return {"images": super().fingerprint, **self._store}

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """Crops and masks of a batch.

        Args:
            draws: B draws.

        Returns:
            ``images`` uint8 (B, H, W, 3), ``mask`` bool (B, L), ``alpha`` float32 (B,),
            ``index`` int64 (B,); and ``parts`` uint8 (B, L), the parts that the mask follows, or
            the image's own where it follows none and they are known; and ``predicted`` int64
            (B, predicted), places among the masked patches, where not all are predicted.
        """
        crops = _cropped(self._images, draws, self._seed, self._scale, self._size)
        alpha = self._masks.alpha(draws)
        mask, parts = self._masks_of(crops, draws, alpha)
        more = {} if parts is None else {"parts": torch.from_numpy(parts)}
        if self._predicted < self._masked:
            stream = _streams_of(draws, self._seed, Purpose.PREDICTED)
            places = predicted_places(self._masked, self._predicted, stream)
            more["predicted"] = torch.from_numpy(places)
        return {
            "images": torch.from_numpy(crops.pixels),
            "mask": torch.from_numpy(mask),
            "alpha": torch.from_numpy(alpha.astype(np.float32)),
            "index": torch.from_numpy(indices(draws)),
            **more,
        }

    def _masks_of(
        self, crops: _Crops, draws: Sequence[Draw], alpha: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint8] | None]:
        """The masks of some crops, bool (B, L), from maps cropped and flipped as they were.

        Beside them those maps, uint8 (B, L), where they are of parts; else the images' own parts,
        where they are known.
        """
        maps = None if self._maps is None else self._cropped_maps(self._maps, crops)
        mask = POLICIES[self._masks.policy].masks(
            MaskRequest(
                grid=self._grid,
                mask_ratio=self._masks.mask_ratio,
                alpha=alpha,
                stream=_streams_of(draws, self._seed, Purpose.MASK),
                maps=maps,
                parts=self.parts,
            )
        )
        parts = maps if maps is not None and maps.dtype == np.uint8 else None
        if parts is None and self._own_parts is not None:
            parts = self._cropped_maps(self._own_parts, crops)
        return mask, None if parts is None else np.ascontiguousarray(parts.reshape(mask.shape))

    def _cropped_maps(self, maps: PartMaps, crops: _Crops) -> NDArray[Any]:
        found = maps.of(crops.positions)
        return crop_maps(found, crops.boxes, crops.sizes, self._grid, crops.mirrored)


class SquashedData(_ImageData):
    """Whole images squashed to one size: what the part learner trains on.

    Args:
        images: The images.
        image_size: (H, W), pixels.
    """

    def __init__(self, images: ImageSource, image_size: tuple[int, int]) -> None:
        super().__init__(images)
        self._size = image_size

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``images`` uint8 (B, H, W, 3) and ``index`` int64 (B,) of a batch."""
        pixels = [squash(self._images.decoded_or_next(d.index)[1], self._size) for d in draws]
        return {
            "images": torch.from_numpy(np.stack(pixels)),
            "index": torch.from_numpy(indices(draws)),
        }


class AugmentedData(_ImageData):
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
        super().__init__(images)
        self._size, self._seed, self._scale = image_size, seed, crop_scale

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """``images`` uint8 (B, H, W, 3) and ``labels`` int64 (B,) of a batch."""
        crops = _cropped(self._images, draws, self._seed, self._scale, self._size)
        labels = torch.from_numpy(self._images.labels[crops.positions])
        return {"images": torch.from_numpy(crops.pixels), "labels": labels}
