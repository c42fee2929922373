"""Pictures of masks and of what a masked autoencoder makes of them."""

from torch import Tensor

from ..models.autoencoder import MaskedAutoencoder
from ..pipeline.feeding import Batch
from .pictures import Pixels, bands, masked, masked_parts

PICTURED = 8
"""Images in the picture of reconstructions."""


def reconstruction_picture(
    model: MaskedAutoencoder,
    images: Tensor,
    mask: Tensor,
    visible: int,
    *more: list[Pixels],
) -> Pixels:
    """Images, what the encoder sees of them, and what the decoder makes of that, in columns.

    Args:
        model: The autoencoder.
        images: uint8 (B, H, W, 3).
        mask: bool (B, L).
        visible: V.
        *more: Further pictures of each image, to stand under the others.

    Returns:
        A contact sheet, uint8 (H, W, 3).
    """
    device = model.mean.device
    made = model.reconstruct(images.to(device), mask.to(device), visible)
    pixels, grid = images.numpy(), model.architecture.grid
    seen = [masked(image, row, grid) for image, row in zip(pixels, mask.numpy(), strict=True)]
    rebuilt = list((made * 255).round().byte().cpu().numpy())
    return bands([list(pixels), seen, rebuilt, *more], PICTURED, 128)


def mask_pictures(batch: Batch, grid: tuple[int, int], colours: Pixels) -> list[Pixels]:
    """Masks over the parts that they follow, as `masked_parts`.

    Args:
        batch: B samples with ``images``, ``mask`` and ``parts``.
        grid: (h, w).
        colours: uint8 (P, 3).

    Returns:
        B pictures, uint8 (H, W, 3).
    """
    rows = zip(*(batch[name].numpy() for name in ("images", "mask", "parts")), strict=True)
    return [masked_parts(image, mask, ids.reshape(grid), colours) for image, mask, ids in rows]
