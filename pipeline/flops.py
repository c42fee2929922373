"""Floating point operations of a network, counted while it computes, and what devices can do.

Counted are two for each multiplication of every matrix product and convolution, of the forward pass
and of its gradients; attention is the same whichever way it is computed.  What a network spares
itself (patches that no encoder sees) is not counted; blocks that it computes again to spare memory
are, so *model* FLOPs are those of the network without (`Task.flops`).
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_Shape = tuple[int, ...]


class FlopCount(FlopCounterMode):
    """Counts what is computed within, forward and backward; numbers stay what they are.

    A compiled network is not seen: it is computed uncompiled within.
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        kinds = ("efficient", "flash", "cudnn")
        backward = [getattr(aten, f"_scaled_dot_product_{k}_attention_backward") for k in kinds]
        on_cpu = aten._scaled_dot_product_flash_attention_for_cpu
        backward.append(aten._scaled_dot_product_flash_attention_for_cpu_backward)
        # Torch counts none on CPUs, and elsewhere the scores that it makes again backwards.
        formulas = {on_cpu: _attention, **dict.fromkeys(backward, _attention_backward)}
        super().__init__(display=False, custom_mapping=formulas)

    @property
    def flops(self) -> int:
        """FLOPs so far."""
        return int(self.get_total_flops())


def _attention(queries: _Shape, keys: _Shape, values: _Shape, *rest: Any, **named: Any) -> int:
    flops: int = sdpa_flop_count(queries, keys, values)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(
    gradient: _Shape, queries: _Shape, keys: _Shape, values: _Shape, *rest: Any, **named: Any
) -> int:
    return 2 * _attention(queries, keys, values)


PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "A100": (312, 156, 19.5),
    "B200": (2250, 1125, 75),
    "GH200": (989, 494, 67),
    "H100": (989, 494, 67),
    "H100 NVL": (835, 417, 60),
    "H100 PCIe": (756, 378, 51),
    "H200": (989, 494, 67),
    "H200 NVL": (835, 417, 60),
    "L4": (121, 60, 30.3),
    "L40S": (362, 183, 91.6),
    "RTX 3090": (71, 35.6, 35.6),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX A6000": (155, 77.4, 38.7),
}
"""Dense bf16, TF32 and fp32 TFLOP/s, by words of a GPU's name, as NVIDIA's data sheets and
architecture white papers have them (half of what is printed "with sparsity")."""


def peak_tflops(device_name: str, precision: str) -> float | None:
    """What a GPU can do at most.

    Args:
        device_name: As CUDA tells it, such as ``"NVIDIA H100 80GB HBM3"``.
        precision: ``bf16``, ``tf32`` or ``fp32``.

    Returns:
        Dense TFLOP/s; None for a GPU that is not in `PEAK_TFLOPS`, a share of one or a variant.
    """
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "Laptop", "Ti", "D", "SUPER"}:
        return None
    named = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    if not named:
        return None
    most_said = max(named, key=lambda name: len(name.split()))
    return PEAK_TFLOPS[most_said][("bf16", "tf32", "fp32").index(precision)]
