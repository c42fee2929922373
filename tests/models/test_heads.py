import pytest
import torch

from semmae.models.heads import LinearHead


def test_linear_head__standardises_features_of_the_batch() -> None:
    torch.manual_seed(0)
    head = LinearHead(6, 4)
    features = 5 + 3 * torch.randn(32, 6)
    mean, variance = features.mean(dim=0), features.var(dim=0, correction=0)
    expected = head.linear((features - mean) / (variance + 1e-6).sqrt())
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-5)


def test_linear_head__uses_running_statistics_in_evaluation() -> None:
    torch.manual_seed(0)
    head = LinearHead(6, 4)
    for _ in range(200):
        head(2 + 3 * torch.randn(64, 6))
    head.eval()
    features = 2 + 3 * torch.randn(8, 6)
    torch.testing.assert_close(head(features[:1]), head(features)[:1])
    torch.testing.assert_close(head(features), head.linear((features - 2) / 3), rtol=0, atol=0.01)


def test_linear_head__trains_only_its_linear_layer() -> None:
    head = LinearHead(64, 100)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    assert not head.linear.bias.any()
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
