"""Where in its image a patch lies, told from what it is: features that a change of coat leaves.

Ours.  Tokens of a frozen encoder say part and kind of thing together (the head of a raven), and
their clusters follow the kind, which has the larger variance.  What heads have in common is where
they are found: so a small network learns, from tokens of windows cut out of the images, where in
the whole image each patch lies.  It sees nothing but the window, so it can only go by content, and
what it predicts, a distribution over places, is alike for the same part of things of any look.  The
task is that of position prediction (Zhai et al. 2022, MP3), asked of tokens that are frozen.

Mirrored things have the same parts, so left and right are folded together in the features.

Legend of shapes: B images, L = h w patches, D width, Q = cells a side squared, F = Q / 2 features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = 8
"""Cells a side that places are told by; even, so that left and right can be folded together."""

HIDDEN = 128
"""Channels of the predictor's hidden layers."""


class PlacePredictor(nn.Module):
    """From patch tokens to a distribution over the cells of the whole image.

    Two hidden layers, the second over 3 x 3 patches, since what surrounds a patch tells its part.

    Buffers, set by `stages.place_learning` over a data set: ``token_mean`` (L, D), the mean token
    of each place, which must not tell it, and ``token_std`` (D); ``root_mean`` (F) and
    ``root_std`` (one number) standardise the features.

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
        self.last = nn.Conv2d(HIDDEN, cells**2, 1)
        self.register_buffer("token_mean", torch.zeros(patches, width))
        self.register_buffer("token_std", torch.ones(width))
        self.register_buffer("root_mean", torch.zeros(cells**2 // 2))
        self.register_buffer("root_std", torch.ones(()))

    def forward(self, tokens: Tensor, grid: tuple[int, int], dropout: float = 0.0) -> Tensor:
        """Scores of cells, to be softmaxed.

        Args:
            tokens: (B, L, D), standardised, of whole images or of windows.
            grid: (h, w), with h w = L.
            dropout: Of the first hidden layer, while it learns.

        Returns:
            (B, L, Q).
        """
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
        hidden = F.gelu(self.around(F.dropout(F.gelu(self.first(maps)), dropout)))
        return self.last(hidden).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def roots(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Square roots of the shares of cells, of whole images' tokens (B, L, D): (B, L, F).

        A cell's share is that of itself and its mirror image.  Euclidean distance between roots is
        Hellinger's distance of the distributions.
        """
        standard = (tokens.float() - self.token_mean) / self.token_std
        shares: Tensor = self(standard, grid).softmax(dim=2)
        shares = shares.reshape(*shares.shape[:2], self.cells, self.cells)
        folded = (shares + shares.flip(3))[..., : self.cells // 2]
        return folded.flatten(2).sqrt()

    def features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The roots less their mean, at unit variance over all cells, (B, L, F)."""
        return (self.roots(tokens, grid) - self.root_mean) / self.root_std


def cells_of(frame: Tensor, grid: tuple[int, int], cells: int) -> Tensor:
    """The cell of the whole image that each patch of a window lies in.

    Args:
        frame: (B, 2, 3), where the window was taken, as in `pipeline.views.View`.
        grid: (h, w), of the window's patches.
        cells: Cells a side.

    Returns:
        int64 (B, L), row by row.
    """
    places = F.affine_grid(frame, [len(frame), 1, *grid], align_corners=False).flatten(1, 2)
    cell = ((places + 1) / 2 * cells).floor().clamp(0, cells - 1).long()
    return cell[..., 1] * cells + cell[..., 0]
