"""Parts of one image, told by how they look in it.

Legend of shapes: B images, L patches, D width of tokens, N parts.
"""

import torch
from torch import Tensor


def refined(
    shares: Tensor,
    looks: Tensor,
    objects: Tensor,
    alike: Tensor | None,
    rounds: int,
    temperature: float,
) -> Tensor:
    """Shares of parts, where patches also go by how parts look in their own image.

    Ours.  What tells parts alike in all images (where on the object content such as this is found)
    is blunt at their borders; there the image itself knows better, since coat and shade change from
    part to part.  Rounds of expectation and maximisation: the mean token of each part in the image,
    by shares that are blurred, then shares by the given ones and the distance to that mean.

    Args:
        shares: (B, N, L), summing to 1 over parts; gradients reach them, and nothing else.
        looks: (B, L, D), standardised tokens.
        objects: (B, L), 1 on objects, 0 on background, which makes no means.
        alike: (B, L, L), the blur's weights; None does not blur.
        rounds: 0 gives the shares back.
        temperature: Of the mean squared distance to the mean token.

    Returns:
        (B, N, L), summing to 1 over parts.
    """
    given = shares.clamp_min(1e-6).log()
    for _ in range(rounds):
        with torch.no_grad():
            held = shares * objects[:, None]
            if alike is not None:
                held = held @ alike.transpose(1, 2)
            means = held @ looks / held.sum(dim=2, keepdim=True).clamp_min(1e-3)
            apart = torch.cdist(means, looks).square() / looks.shape[2]
        shares = (given - apart / (2 * temperature)).softmax(dim=1)
    return shares
