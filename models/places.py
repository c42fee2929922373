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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = 8
"""Cells a side that places are told by; even, so that left and right can be folded together."""

SPAN = 1.6
"""How far the cells reach from the middle of the object, in radii of a disc of its area."""

HIDDEN = 128
"""Channels of the predictor's hidden layers."""


@dataclass(frozen=True)
class Told:
    """What patches tell of their place.

    Attributes:
        shares: (B, L, F), of the cells of an object, if the patch lies on one: rows sum to 1.
        background: (B, L), how likely it lies on none, 0 to 1.
    """

    shares: Tensor
    background: Tensor

    @classmethod
    def joined(cls, batches: "Sequence[Told]") -> "Told":
        """Batches as one."""
        return cls(
            torch.cat([told.shares for told in batches]),
            torch.cat([told.background for told in batches]),
        )


class PlacePredictor(nn.Module):
    """From patch tokens to a distribution over the cells of the object, and the background.

    Two hidden layers, the second over 3 x 3 patches, since what surrounds a patch tells its part.

    Buffers, set by `stages.place_learning` over a data set: ``token_mean`` (L, D), the mean token
    of each place of the image, which must not tell it, and ``token_std`` (D); ``root_mean`` (F) and
    ``root_std`` (one number) standardise the features of objects.

    Args:
        width: D.
        cells: Cells a side.
        patches: L, of whole images.
    """

    token_mean: Tensor
    token_std: Tensor
    root_mean: Tensor
    root_std: Tensor

    def __init__(self, width: int, cells: int, patches: int) -> None:
        super().__init__()
        self.cells = cells
        self.first = nn.Conv2d(width, HIDDEN, 1)
        self.around = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(HIDDEN, cells**2 + 1, 1)
        self.register_buffer("token_mean", torch.zeros(patches, width))
        self.register_buffer("token_std", torch.ones(width))
        self.register_buffer("root_mean", torch.zeros(cells**2 // 2))
        self.register_buffer("root_std", torch.ones(()))

    def forward(self, tokens: Tensor, grid: tuple[int, int], dropout: float = 0.0) -> Tensor:
        """Scores of the cells, the background last, to be softmaxed.

        Args:
            tokens: (B, K, D), standardised, of whole images or of views.
            grid: (h, w), of the view, with h w = K.
            dropout: Of the first hidden layer, while it learns.

        Returns:
            (B, K, Q + 1).
        """
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
        hidden = F.gelu(self.around(F.dropout(F.gelu(self.first(maps)), dropout)))
        return self.last(hidden).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def told(self, tokens: Tensor, grid: tuple[int, int]) -> Told:
        """What the tokens (B, L, D) of whole images tell.

        A cell's share is that of itself and its mirror image.
        """
        scores: Tensor = self((tokens.float() - self.token_mean) / self.token_std, grid)
        shares = scores[..., :-1].softmax(dim=2)
        shares = shares.reshape(*shares.shape[:2], self.cells, self.cells)
        folded = (shares + shares.flip(3))[..., : self.cells // 2].flatten(2)
        return Told(folded, scores.softmax(dim=2)[..., -1])

    def features(self, shares: Tensor) -> Tensor:
        """The square roots of shares (B, L, F), less their mean, at unit variance over all cells.

        Euclidean distance between roots is Hellinger's distance of the distributions.
        """
        return (shares.sqrt() - self.root_mean) / self.root_std


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
