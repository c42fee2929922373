"""Small networks that tell from a frozen encoder's patch tokens what their patches are.

Ours.  They learn from random views of the images and see nothing but the view, so they go by
content; and what they have learned from all images holds in crops, too.

Legend of shapes: B images, L = h w patches, K patches of a view, D width, Q kinds of patches on
objects, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 128
"""Channels of the hidden layers."""


@dataclass(frozen=True)
class Told:
    """What patches tell of themselves.

    Attributes:
        shares: (B, L, F), of the kinds, if the patch lies on an object: rows sum to 1.
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


class PatchPredictor(nn.Module):
    """From patch tokens to a distribution over kinds of patches, and the background.

    The first hidden layer sees a patch alone, the others what surrounds it, which tells its part.

    Buffers, set by `stages.predictor_learning` over a data set: ``token_mean`` (L, D), the mean
    token of each place of the image, which must not tell it, and ``token_std`` (D); ``root_mean``
    (F) and ``root_std`` (one number) standardise the features of objects.

    Args:
        width: D.
        kinds: Q.
        features: F.
        patches: L, of whole images.
        reach: Of each layer that sees 3 x 3 patches: how many patches they lie apart.
    """

    token_mean: Tensor
    token_std: Tensor
    root_mean: Tensor
    root_std: Tensor

    def __init__(
        self, width: int, kinds: int, features: int, patches: int, reach: Sequence[int]
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, HIDDEN, 1)
        self.around = nn.ModuleList(map(_separable, reach))
        self.last = nn.Conv2d(HIDDEN, kinds + 1, 1)
        self.register_buffer("token_mean", torch.zeros(patches, width))
        self.register_buffer("token_std", torch.ones(width))
        self.register_buffer("root_mean", torch.zeros(features))
        self.register_buffer("root_std", torch.ones(()))

    def forward(self, tokens: Tensor, grid: tuple[int, int], dropout: float = 0.0) -> Tensor:
        """Scores of the kinds, the background last, to be softmaxed.

        Args:
            tokens: (B, K, D), standardised, of whole images or of views.
            grid: (h, w), of the view, with h w = K.
            dropout: Of the first hidden layer, while it learns.

        Returns:
            (B, K, Q + 1).
        """
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
        hidden = F.dropout(F.gelu(self.first(maps)), dropout)
        for layer in self.around:
            hidden = hidden + F.gelu(layer(hidden))
        return self.last(hidden).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def told(self, tokens: Tensor, grid: tuple[int, int]) -> Told:
        """What the tokens (B, L, D) of whole images tell."""
        scores: Tensor = self((tokens.float() - self.token_mean) / self.token_std, grid)
        shares = self.joined_shares(scores[..., :-1].softmax(dim=2))
        return Told(shares, scores.softmax(dim=2)[..., -1])

    def joined_shares(self, shares: Tensor) -> Tensor:
        """Shares (B, L, F) of shares of the kinds (B, L, Q), some of which may count as one."""
        return shares

    def features(self, shares: Tensor) -> Tensor:
        """The square roots of shares (B, L, F), less their mean, at unit variance over all kinds.

        Euclidean distance between roots is Hellinger's distance of the distributions.
        """
        return (shares.sqrt() - self.root_mean) / self.root_std


def _separable(apart: int) -> nn.Sequential:
    """3 x 3 patches of each channel, then all channels of a patch; a full 3 x 3 gains nothing."""
    return nn.Sequential(
        nn.Conv2d(
            HIDDEN,
            HIDDEN,
            3,
            padding=apart,
            dilation=apart,
            groups=HIDDEN,
            padding_mode="replicate",
        ),
        nn.Conv2d(HIDDEN, HIDDEN, 1),
    )


class PartPredictor(PatchPredictor):
    """From patch tokens to parts that were found before, and the background.

    What it learned, where parts lie in crops, it tells with the context of half an object's width:
    on their own, patches of animals' coats look alike wherever they are.

    Args:
        width: D.
        parts: Q, which is F.
        patches: L, of whole images.
    """

    REACH = (1, 2, 4, 8)

    def __init__(self, width: int, parts: int, patches: int) -> None:
        super().__init__(width, parts, parts, patches, self.REACH)
