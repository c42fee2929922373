"""The pixel decoder of the part learner (paper, section 3.1, figure 2).

Part maps go through a StyleGAN-like synthesis network: convolutions, each followed by adaptive
instance normalisation (AdaIN; Huang and Belongie, ICCV 2017) with the class token as style, and
upsampling to the image.  The paper gives the outline; width, depth and output size are ours.

Legend of shapes: B images, P parts, h w patches, D width of the class token, C channels.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdaIN(nn.Module):
    """Instance normalisation whose scale and shift come from a style vector.

    Args:
        channels: C.
        style_width: D.
    """

    def __init__(self, channels: int, style_width: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.style = nn.Linear(style_width, 2 * channels)
        nn.init.zeros_(self.style.bias)

    def forward(self, features: Tensor, style: Tensor) -> Tensor:
        """Features (B, C, h, w) in the style (B, D)."""
        scale, shift = self.style(style)[:, :, None, None].chunk(2, dim=1)
        return self.norm(features) * (1 + scale) + shift  # type: ignore[no-any-return]


class StyledLayer(nn.Module):
    """Convolution, optional noise, AdaIN, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, style_width: int, noise: bool) -> None:
        super().__init__()
        # The normalisation behind it takes any bias away.
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.noise = nn.Parameter(torch.zeros(outputs, 1, 1)) if noise else None
        self.adain = AdaIN(outputs, style_width)

    def forward(self, features: Tensor, style: Tensor) -> Tensor:
        """Features (B, C, h, w) to (B, C', h, w)."""
        features = self.convolution(features)
        if self.noise is not None and self.training:
            features = features + self.noise * torch.randn_like(features[:, :1])
        return F.leaky_relu(self.adain(features, style), 0.2)


class PixelDecoder(nn.Module):
    """Part maps and a style back into an image.

    Args:
        parts: P, channels of the part maps.
        style_width: D.
        width: C of the first layer; it halves with each upsampling, down to a quarter.
        upsamplings: Doublings of the resolution: the image has 2 ** upsamplings pixels a patch.
        noise: Add per-layer noise in training, as StyleGAN does.
    """

    def __init__(
        self,
        parts: int,
        style_width: int,
        width: int = 64,
        upsamplings: int = 2,
        noise: bool = False,
    ) -> None:
        super().__init__()
        self.upsamplings = upsamplings
        widths = [max(width >> level, width // 4) for level in range(upsamplings + 1)]
        self.first = StyledLayer(parts, width, style_width, noise)
        self.layers = nn.ModuleList(
            StyledLayer(inputs, outputs, style_width, noise) for inputs, outputs in pairwise(widths)
        )
        self.to_pixels = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """Synthesise images.

        Args:
            maps: (B, P, h, w), soft part maps.
            style: (B, D), the class token.

        Returns:
            (B, 3, h * 2 ** upsamplings, w * 2 ** upsamplings), normalised pixels.
        """
        features = self.first(maps, style)
        for layer in self.layers:
            features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            features = layer(features, style)
        return self.to_pixels(features)  # type: ignore[no-any-return]
