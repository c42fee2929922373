"""Where on its object a patch lies, told from what it is: features that a change of coat leaves.

Ours.  Tokens of a frozen encoder say part and kind of thing together (the head of a raven), and
their clusters follow the kind, which has the larger variance.  What heads have in common is where
on the thing they are found: so a small network learns, from tokens of random views of the images,
where on the object each patch lies, or that it lies on the background.  It sees nothing but the
view, so it can only go by content, and what it predicts, a distribution over places, is alike for
the same part of things of any look.  The object is what a first vote for the background left
over; what the network learns to predict of it from all images is the better mask.  The task is
that of position prediction (Zhai et al. 2022, MP3), asked of tokens that are frozen.

Mirrored things have the same parts, so left and right are folded together in the features.

Legend of shapes: B images, L = h w patches, K patches of a view, D width, Q = cells a side squared,
F = Q / 2 features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .predictors import PatchPredictor

CELLS = 8
"""Cells a side that places are told by; even, so that left and right can be folded together."""

SPAN = 1.6
"""How far the cells reach from the middle of the object, in radii of a disc of its area."""


class PlacePredictor(PatchPredictor):
    """From patch tokens to a distribution over the cells of the object, and the background.

    A cell's share is that of itself and its mirror image.

    Args:
        width: D.
        cells: Cells a side.
        patches: L, of whole images.
    """

    def __init__(self, width: int, cells: int, patches: int) -> None:
        super().__init__(width, cells**2, cells**2 // 2, patches, reach=(1,))
        self.cells = cells

    def joined_shares(self, shares: Tensor) -> Tensor:
        """Shares (B, L, F) of shares of the cells (B, L, Q)."""
        square = shares.reshape(*shares.shape[:2], self.cells, self.cells)
        return (square + square.flip(3))[..., : self.cells // 2].flatten(2)


def object_cells(
    frame: Tensor, view: tuple[int, int], objects: Tensor, grid: tuple[int, int], cells: int
) -> Tensor:
    """Where on the object each patch of a view lies.

    The cells are laid over the middle of the object's patches, `SPAN` radii to each side; what
    reaches beyond them counts to those at the edge.  Where all of the image is object, they are
    laid over the middle of the image and reach beyond it.

    Args:
        frame: (B, 2, 3), where the view was taken, as in `pipeline.views.View`.
        view: (h, w), of the view's patches, K in all.
        objects: (B, L), 1 on the object, 0 on background, in the whole image.
        grid: (h, w), of the whole image.
        cells: Cells a side.

    Returns:
        int64 (B, K), row by row: the cell, or Q on the background.
    """
    rows, columns = grid
    places = F.affine_grid(frame, [len(frame), 1, *view], align_corners=False).flatten(1, 2)
    size = places.new_tensor([columns, rows])
    there = (places + 1) / 2 * size
    column, row = there.floor().clamp(min=0).minimum(size - 1).long().unbind(dim=2)
    middle, radius = _discs(objects, grid)
    apart = (there - middle[:, None]) / (SPAN * radius)[:, None, None]
    across, down = ((apart + 1) / 2 * cells).floor().clamp(0, cells - 1).long().unbind(dim=2)
    seen = objects.gather(1, row * columns + column) > 0
    return torch.where(seen, down * cells + across, cells**2)


def _discs(objects: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Middle (B, 2), (x, y), and radius (B,) of a disc like the object (B, L), in patches."""
    count = objects.sum(dim=1).clamp_min(1)
    row, column = torch.meshgrid(*(torch.arange(n) + 0.5 for n in grid), indexing="ij")
    patches = torch.stack([column, row], dim=2).flatten(0, 1).to(objects)
    return objects @ patches / count[:, None], (count / torch.pi).sqrt()
