import torch

from semmae.models.gathering import Gathered


def test_gathered__is_what_the_batches_joined_are() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(size, 3, 2, generator=generator).half(), torch.arange(size) + size)
        for size in (4, 4, 1)
    ]
    made = Gathered(11)  # two did not come
    assert (len(made), made.parts) == (0, ())
    for batch in batches:
        made.add(*batch)
    assert len(made) == 9
    for found, joined in zip(made.parts, map(torch.cat, zip(*batches, strict=True)), strict=True):
        assert found.dtype == joined.dtype
        assert torch.equal(found, joined)
