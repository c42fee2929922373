"""What part maps are trained by, beside pixels (paper, section 3.1).

Legend of shapes: B images, P channels of the part map, L patches, D width.
"""

from torch import Tensor
from torch.nn import functional as F


def rebuilt_features(maps: Tensor, patches: Tensor) -> Tensor:
    """Each place rebuilt from the mean feature of each part in its image.

    Args:
        maps: (B, P, L), summing to 1 at each place.
        patches: (B, L, D).

    Returns:
        (B, L, D): the sum over parts of map times mean feature.
    """
    means = maps @ patches / maps.sum(dim=2, keepdim=True).clamp_min(1e-6)
    return maps.transpose(1, 2) @ means


def diversity(maps: Tensor) -> Tensor:
    """The diversity constraint L_d: parts attend to different places (paper, section 3.1).

    Ours: the paper does not give the formula.  This is the mean cosine between the blurred maps
    of two different parts, 0 where no two parts overlap, 1 where all are the same map.

    Args:
        maps: (B, P, L).

    Returns:
        (B,), in [0, 1].
    """
    unit = F.normalize(maps, dim=2)
    parts = maps.shape[1]
    cosines = unit @ unit.transpose(1, 2)
    off_diagonal = cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    return off_diagonal / max(parts * (parts - 1), 1)
