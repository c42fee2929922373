"""Self-distillation of patch tokens: a student, and the teacher that follows it slowly.

As in iBOT the teacher is a moving average of the student, and the student learns which prototypes
the teacher gives a patch.  What student and teacher see differs as the caller wants it to.

Legend of shapes: B images, L patches, K patches that the student sees, D width, Q prototypes.
"""

import copy
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .vision import sincos_positions


class Distillation(nn.Module):
    """Student and teacher, a head to prototypes on each.

    Args:
        transformer: Where both start, with fixed sine-cosine positions.
        make_head: Makes a head from (N, D) to prototype scores (N, Q).
    """

    def __init__(self, transformer: VisionTransformer, make_head: Callable[[], nn.Module]) -> None:
        super().__init__()
        transformer.pos_embed.requires_grad_(False)
        self.student, self.teacher = transformer, copy.deepcopy(transformer)
        # A head with weight normalisation cannot be copied.
        self.student_head, self.teacher_head = make_head(), make_head()
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)

    def train(self, mode: bool = True) -> "Distillation":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.teacher_head.eval()
        return self

    @torch.no_grad()
    def follow(self, momentum: float, kept: Tensor) -> None:
        """Move the teacher a step towards the student.

        Args:
            momentum: Share of the teacher that stays, 0 to 1.
            kept: 1, or 0 to move nothing; a float32 scalar on the device.
        """
        towards = (1 - momentum) * kept
        pairs = ((self.teacher, self.student), (self.teacher_head, self.student_head))
        for slow, fast in pairs:
            for followed, new in zip(slow.parameters(), fast.parameters(), strict=True):
                followed.lerp_(new, towards)


def kept_patches(count: int, grid: tuple[int, int], share: float) -> Tensor:
    """Which patches the student sees: all but a few regions.

    Args:
        count: B.
        grid: (h, w).
        share: Of the patches that are kept, above 0, at most 1.

    Returns:
        int64 (B, K), in random order.
    """
    coarse = nn.functional.interpolate(torch.rand(count, 1, 3, 3), grid, mode="bicubic")
    patches = grid[0] * grid[1]
    rank = (coarse.flatten(1) + 0.15 * torch.rand(count, patches)).argsort(dim=1)
    return rank[:, : max(int(patches * share), 1)]


def encoded(model: VisionTransformer, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Tokens of some patches of a view, or of all.

    Args:
        model: A transformer with fixed sine-cosine positions, a class token and no registers.
        pixels: (B, 3, H, W), normalised; of any size in patches.
        kept: int64 (B, K); None keeps all.

    Returns:
        (B, 1 + K, D), after the last norm; the class token first.
    """
    maps = model.patch_embed.proj(pixels)
    positions = sincos_positions(maps.shape[1], (maps.shape[2], maps.shape[3])).to(maps)
    tokens = maps.flatten(2).transpose(1, 2) + positions[:, 1:]
    if kept is not None:
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    return model.norm(model.blocks(tokens))  # type: ignore[no-any-return]
