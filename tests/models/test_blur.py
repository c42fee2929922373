import torch

from semmae.models.blur import affinities, within


def test_within__keeps_to_its_side_and_sums_to_one() -> None:
    weights = affinities(torch.randn(3, 12, 5), (3, 4), 1.0, 0.5)
    objects = (torch.arange(12) % 3 == 0).float().expand(3, -1)
    found = within(weights, objects)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(3, 12))
    apart = objects[:, :, None] != objects[:, None]
    assert not found[apart].any()
    assert found[~apart].gt(0).all()
    # Weights on the same side keep their ratios.
    torch.testing.assert_close(found[:, 0, 3] / found[:, 0, 6], weights[:, 0, 3] / weights[:, 0, 6])


def test_within__of_one_side_changes_nothing() -> None:
    weights = affinities(torch.randn(2, 12, 5), (3, 4), 1.0, 0.0)
    torch.testing.assert_close(within(weights, torch.ones(2, 12)), weights)
    torch.testing.assert_close(within(weights, torch.zeros(2, 12)), weights)
