"""Heads that are trained on frozen features to evaluate an encoder."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """A linear classifier behind a batch normalisation without affine (MAE, appendix A.1).

    Args:
        width: D, of the features.
        classes: Classes to tell apart.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of features (B, D)."""
        return self.linear(self.norm(features))  # type: ignore[no-any-return]
