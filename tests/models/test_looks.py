import math

import torch
from torch import Tensor

from semmae.models.looks import refined

IMAGES, PARTS, PATCHES, WIDTH = 2, 3, 7, 4


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares, looks, objects and blur."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(IMAGES, PARTS, PATCHES, generator=generator)
    looks = torch.randn(IMAGES, PATCHES, WIDTH, generator=generator)
    objects = (torch.rand(IMAGES, PATCHES, generator=generator) < 0.7).float()
    alike = torch.rand(IMAGES, PATCHES, PATCHES, generator=generator)
    return shares / shares.sum(1, keepdim=True), looks, objects, alike / alike.sum(2, keepdim=True)


def slow_round(
    given: Tensor, now: Tensor, looks: Tensor, objects: Tensor, alike: Tensor
) -> list[list[float]]:
    """A round on one image at a temperature of 0.2, number by number."""
    held = [
        [
            sum(float(alike[i, j] * now[part, j] * objects[j]) for j in range(PATCHES))
            for i in range(PATCHES)
        ]
        for part in range(PARTS)
    ]
    powers = torch.zeros(PARTS, PATCHES)
    for part in range(PARTS):
        total = sum(held[part])
        for i in range(PATCHES):
            apart = 0.0
            for d in range(WIDTH):
                mean = sum(held[part][j] * float(looks[j, d]) for j in range(PATCHES)) / total
                apart += (float(looks[i, d]) - mean) ** 2 / WIDTH
            powers[part, i] = float(given[part, i]) * math.exp(-apart / 0.4)
    return (powers / powers.sum(0)).tolist()


def test_refined__is_that_of_a_plain_loop() -> None:
    shares, looks, objects, alike = drawn()
    found = refined(shares, looks, objects, alike, 2, 0.2)
    for image in range(IMAGES):
        own = (looks[image], objects[image], alike[image])
        once = torch.tensor(slow_round(shares[image], shares[image], *own))
        twice = torch.tensor(slow_round(shares[image], once, *own))
        torch.testing.assert_close(found[image], twice, rtol=0, atol=1e-5)


def test_refined__without_rounds_or_at_great_heat_gives_the_shares_back() -> None:
    shares, looks, objects, alike = drawn()
    torch.testing.assert_close(refined(shares, looks, objects, alike, 0, 0.1), shares)
    torch.testing.assert_close(refined(shares, looks, objects, None, 3, 1e6), shares)


def test_refined__a_patch_that_nothing_else_tells_goes_with_its_like() -> None:
    # Four patches look like the first part, three like the second; one is in doubt.
    looks = torch.tensor([0.0, 0, 0, 0, 2, 2, 2])[None, :, None].expand(1, 7, 5)
    shares = torch.tensor([[0.9, 0.9, 0.9, 0.4, 0.1, 0.1, 0.1]])
    shares = torch.stack([shares, 1 - shares], dim=1)
    found = refined(shares, looks, torch.ones(1, 7), None, 3, 0.1)
    assert found[0, 0].gt(0.5).tolist() == [True] * 4 + [False] * 3
    # The same but for its look, it goes to the other.
    moved = looks.clone()
    moved[0, 3] = 2
    found = refined(shares, moved, torch.ones(1, 7), None, 3, 0.1)
    assert found[0, 0].gt(0.5).tolist() == [True] * 3 + [False] * 4


def test_refined__background_makes_no_means() -> None:
    shares, looks, objects, _ = drawn()
    moved = torch.where(objects[..., None] > 0, looks, looks + 100)
    first = refined(shares, looks, objects, None, 2, 0.2)
    second = refined(shares, moved, objects, None, 2, 0.2)
    on = objects[:, None].expand_as(first) > 0
    torch.testing.assert_close(first[on], second[on])


def test_refined__gradients_reach_the_shares_alone() -> None:
    shares, looks, objects, alike = drawn()
    shares.requires_grad_()
    looks.requires_grad_()
    refined(shares, looks, objects, alike, 2, 0.2)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert shares.grad is not None
    assert shares.grad.abs().sum() > 0
    assert looks.grad is None
