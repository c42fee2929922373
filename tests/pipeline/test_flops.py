import itertools
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from semmae.models.autoencoder import Architecture, MaskedAutoencoder
from semmae.pipeline.flops import PEAK_TFLOPS, FlopCount, peak_tflops


def flops_of(work: Callable[[], Tensor]) -> int:
    with FlopCount() as count:
        work().sum().backward()  # type: ignore[no-untyped-call]
    flops: int = count.flops
    return flops


def test_flop_count__is_two_a_multiplication_forward_and_for_both_gradients() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    assert flops_of(lambda: layer(x)) == 3 * 2 * 3 * 5 * 7
    # Nobody asks for the gradient of the images.
    assert flops_of(lambda: layer(x.detach())) == 2 * 2 * 3 * 5 * 7
    with torch.no_grad(), FlopCount() as count:
        layer(x)
    assert count.flops == 2 * 3 * 5 * 7


def test_flop_count__knows_convolutions() -> None:
    layer, x = nn.Conv2d(3, 4, 2, stride=2), torch.randn(5, 3, 6, 8)
    assert flops_of(lambda: layer(x)) == 2 * 2 * (5 * 3 * 4) * (3 * 2 * 2) * 4


def test_flop_count__of_attention_does_not_depend_on_how_it_is_computed() -> None:
    layer, x = Attention(16, num_heads=2), torch.randn(3, 5, 16)
    counts = []
    for fused, device in itertools.product((False, True), ("cpu", "meta")):
        layer.fused_attn = fused
        layer.to_empty(device=device)
        counts.append(flops_of(lambda device=device: layer(x.to(device))))  # type: ignore[misc]
    scores = 2 * 2 * (3 * 2) * 5 * 5 * 8
    products = 2 * 3 * 5 * 16 * (3 * 16 + 16)
    # All but the gradient of the input, which nobody asks for.
    assert counts == [3 * scores + 3 * products - 2 * 3 * 5 * 16 * 3 * 16] * 4


def test_flop_count__changes_no_number() -> None:
    shape = {"width": 16, "depth": 2, "heads": 2, "decoder_width": 16, "decoder_depth": 1}
    model = MaskedAutoencoder(
        Architecture(image_size=(16, 16), patch_size=4, decoder_heads=2, **shape)
    )
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    mask = torch.arange(16).expand(2, -1) % 4 > 0
    found = []
    for counting in (False, True):
        model.zero_grad()
        torch.manual_seed(5)

        def loss() -> Tensor:
            predicted = torch.rand(2, 12).argsort(dim=1)[:, :6]
            losses: Tensor = model(images, mask, 4, predicted)
            return losses * F.dropout(torch.ones(2), 0.5)

        if counting:
            assert flops_of(loss) > 0
        else:
            loss().sum().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_peak_tflops__knows_gpus_by_the_names_that_cuda_gives(name: str, known_as: str) -> None:
    found = tuple(peak_tflops(name, precision) for precision in ("bf16", "tf32", "fp32"))
    assert found == PEAK_TFLOPS[known_as]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H800",
        "NVIDIA L40",
        "Tesla V100-SXM2-16GB",
        "",
    ],
)
def test_peak_tflops__says_nothing_of_others(name: str) -> None:
    assert peak_tflops(name, "bf16") is None
