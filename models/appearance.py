"""What a patch looks like, predicted from what it is: a task that makes an encoder hold parts.

The encoder sees an image whose regions have lost their colours
(`pipeline.views.recoloured_regions`) and predicts how each patch looked: which of a few
appearances, words of mean colour and its spread.
The head also knows the palette, which appearances the true image holds, but not where.  So what the
token has to say is which part of the thing a patch is; that this part is red here the palette says.
It is the split into shape and appearance of Jakab et al. (2018) and Lorenz et al. (2019), which
find landmarks and parts by it, and of SemMAE's own decoder: part maps, and a style from elsewhere.

Legend of shapes: B images, L = h w patches, K patches that the encoder sees, D width, Q words.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 6
"""Of an appearance: mean of red, green, blue, and twice their standard deviations."""


class AppearanceModel(nn.Module):
    """An encoder, and a head that predicts appearances from its tokens and a palette.

    Args:
        transformer: The encoder where it starts, with fixed sine-cosine positions.
        words: (Q, 6), the appearances that patches are sorted by.
    """

    words: Tensor

    def __init__(self, transformer: VisionTransformer, words: Tensor) -> None:
        super().__init__()
        transformer.pos_embed.requires_grad_(False)
        self.student = transformer
        self.register_buffer("words", words)
        width, count = transformer.embed_dim, len(words)
        self.of_palette = nn.Sequential(
            nn.Linear(2 * count, width), nn.GELU(), nn.Linear(width, width)
        )
        self.of_token = nn.Linear(width, width)
        self.predict = nn.Sequential(
            nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, count)
        )

    def scores(self, tokens: Tensor, palette: Tensor) -> Tensor:
        """How likely each appearance is.

        Args:
            tokens: (B, K, D), of patches.
            palette: (B, 2 Q), from `palette_of`.

        Returns:
            (B, K, Q).
        """
        style = self.of_palette(palette)[:, None].expand(-1, tokens.shape[1], -1)
        token = self.of_token(tokens)
        # The product lets a part have another look in each style, which a sum would not.
        return self.predict(torch.cat([token, style, token * style], dim=2))  # type: ignore[no-any-return]

    def words_of(self, pixels: Tensor) -> Tensor:
        """The appearance of each patch, int64 (B, L), of images (B, 3, H, W) in [0, 1]."""
        size = int(self.student.patch_embed.patch_size[0])
        return torch.cdist(appearances(pixels, size), self.words).argmin(dim=2)


def appearances(pixels: Tensor, patch_size: int) -> Tensor:
    """Mean and twice the standard deviation of each colour in each patch.

    Args:
        pixels: float (B, 3, H, W), in [0, 1].
        patch_size: p.

    Returns:
        (B, L, 6).
    """
    patches = F.unfold(pixels, patch_size, stride=patch_size)
    patches = patches.reshape(len(patches), 3, patch_size**2, -1)
    return torch.cat([patches.mean(dim=2), 2 * patches.std(dim=2)], dim=1).transpose(1, 2)


def palette_of(words: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """Which appearances an image holds: in all of it, and in its middle, where things are.

    Args:
        words: int64 (B, L).
        count: Q.
        grid: (h, w).

    Returns:
        (B, 2 Q): four times the square roots of shares, the middle half of rows and columns last.
    """
    down, across = grid[0] // 4, grid[1] // 4
    middle = words.reshape(-1, *grid)[:, down : grid[0] - down, across : grid[1] - across]
    shares = [F.one_hot(held, count).float().mean(dim=1) for held in (words, middle.flatten(1))]
    return 4 * torch.cat(shares, dim=1).sqrt()
