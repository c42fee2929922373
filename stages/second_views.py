"""A second look at each image, where the part learner is to find the same parts.

Ours.  Parts of a crop, mirrored at times, must be those of the whole image at the same places:
nothing else in the losses keeps a part from depending on where it lies in the picture.

Legend of shapes: B images, H W pixels, P channels of the part map, h w patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.encoders import FrozenEncoder, Tokens
from ..models.gathering import Gathered
from ..models.vision import normalise_pixels, scaled
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from ..pipeline.views import draw_view, meeting_places, patches_at, whole_frames

SCALE = 0.4
"""Least share of the image's area in a second view; the most is 1."""


@dataclass(frozen=True)
class SecondView:
    """What an encoder makes of a view of each image of a batch.

    Attributes:
        tokens: Of the view.
        frame: float32 (B, 2, 3), where the view was taken, as in `pipeline.views.View`.
    """

    tokens: Tokens
    frame: Tensor

    def split(self) -> Iterator["SecondView"]:
        """Of as many images each as `Tokens.split` gives, in order."""
        start = 0
        for tokens in self.tokens.split():
            stop = start + len(tokens.patches)
            yield SecondView(tokens, self.frame[start:stop])
            start = stop

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The frame, and all of the tokens."""
        return self.frame, *self.tokens.parts

    @classmethod
    def of(cls, frame: Tensor, *tokens: Tensor) -> "SecondView":
        """A view of these parts."""
        return cls(Tokens(*tokens), frame)


@torch.no_grad()
def look_again(
    encoder: FrozenEncoder,
    images: Tensor,
    size: tuple[int, int] | None = None,
    scale: float | tuple[float, float] = SCALE,
) -> SecondView:
    """Encode a random crop of each image, mirrored by half.

    Args:
        encoder: The frozen encoder.
        images: uint8 (B, H, W, 3), RGB, on its device.  Randomness is torch's CPU generator.
        size: Pixels of the view, down and across; None: those of the whole image.
        scale: As in `pipeline.views.draw_view`.
    """
    view = draw_view(scaled(images), size or (images.shape[1], images.shape[2]), scale)
    pixels = normalise_pixels(view.pixels, encoder.mean, encoder.std)
    return SecondView(encoder.features(pixels), view.frame)


def seen_in(maps: Tensor, frame: Tensor, grid: tuple[int, int]) -> Tensor:
    """What maps of whole images say where the patches of views of them are.

    Args:
        maps: (B, L, P).
        frame: (B, 2, 3), where the views were taken.
        grid: (h, w) of both, with h w = L.

    Returns:
        (B, L, P).
    """
    places, _ = meeting_places(frame, whole_frames(frame), grid)
    return patches_at(maps, places, grid)


def disagreement(whole: Tensor, seen: Tensor, frame: Tensor) -> Tensor:
    """How far the maps of views are from those of the whole images at the same places.

    Args:
        whole: (B, P, h, w), soft part maps of whole images, summing to 1 at each place.
        seen: (B, P, h, w), of their views.
        frame: (B, 2, 3), where the views were taken.

    Returns:
        A scalar, 0 to 1: half the summed squared difference, mean over the patches of the views;
        1 where each is sure of another part.
    """
    there = seen_in(whole.flatten(2).transpose(1, 2), frame, (whole.shape[2], whole.shape[3]))
    here = seen.flatten(2).transpose(1, 2)
    return (there - here).square().sum(dim=2).mean() / 2


def sample_views(
    encoder: FrozenEncoder, images: ImageSource, size: tuple[int, int], count: int, seed: int
) -> SecondView:
    """One fixed second view of each image of `part_start.sample_tokens`, in its order, on the CPU.

    Args:
        encoder: The frozen encoder.
        images: The data.
        size: (H, W) that images are squashed to.
        count: Images, at most.
        seed: Of their choice and of the views.

    Returns:
        Patch tokens in float16, the class token in float32; no attention.
    """
    chosen = drawn(len(images), count, seed)
    made = Gathered(len(chosen))
    with torch.random.fork_rng(devices=[]), Progress("views", len(chosen), "image") as progress:
        torch.default_generator.manual_seed(seed)
        for _, pixels in batches_in_order(images, size, 64, "squash", chosen):
            view = look_again(encoder, torch.from_numpy(pixels).to(encoder.mean.device))
            made.add(*kept_view(view).parts)
            progress.update(len(pixels))
    return SecondView.of(*made.parts)


def kept_view(view: SecondView) -> SecondView:
    """A view to be kept, as of `kept_tokens`."""
    return SecondView(kept_tokens(view.tokens), view.frame.cpu())


def kept_tokens(tokens: Tokens) -> Tokens:
    """Tokens to be kept: on the CPU, patches in float16, without attention."""
    unread = tokens.attention.new_zeros(len(tokens.patches), 1, 1)  # learned variants read none
    return Tokens(tokens.class_token.float().cpu(), tokens.patches.half().cpu(), unread.cpu())
