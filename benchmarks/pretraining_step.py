"""A pretraining step beside a plain one, and beside its matrix multiplications alone.

Run it::

    python -m semmae.benchmarks.pretraining_step [--size base] [--batch 8] [--rounds 9]
        [--precision fp32] [--compile] [--device cpu] [--peak-tflops 0]

A step is loss, gradients and AdamW; its FLOPs are counted as training counts them for its logs:
those of the products that it computes, without scores that fused attention makes again backwards.
The plain step is MAE's as it is usually written: a convolution embeds all patches, decoder and loss
see all of them, AdamW goes through lists of tensors, and the faster of timm's two attention paths
is taken.  The limit is every matrix product of our step, forward and backward, attention's among
them, and nothing else.  With ``--compile`` ours is also timed compiled, as ``stage2 pretrain
--compile`` computes it.  All are timed in turn, one thread, CPU time; GPUs by events.

Of a GPU (``--device cuda --precision bf16 --batch 256``) it also says which share of its peak the
FLOPs are: dense, of the precision, as NVIDIA's data sheet has it (`semmae.pipeline.flops`; 989
TFLOP/s for bf16 on H100 and H200), or ``--peak-tflops`` where it is not listed.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semmae.benchmarks.intervals import interval
from semmae.models.autoencoder import SIZES, Architecture, MaskedAutoencoder
from semmae.models.vision import normalise, patchify
from semmae.pipeline.flops import FlopCount
from semmae.pipeline.mask_counts import visible_count
from semmae.pipeline.masks import random_masks
from semmae.pipeline.tasks import decay_groups
from semmae.pipeline.throughput import peak_of

Step = Callable[[], None]


class PlainAutoencoder(MaskedAutoencoder):
    """The same network computed as MAE's usual code does: all patches, everywhere."""

    def forward(
        self, images: Tensor, mask: Tensor, visible: int, predicted: Tensor | None = None
    ) -> Tensor:
        encoder, pixels = self.encoder, normalise(images, self.mean, self.std)
        tokens = encoder.patch_embed(pixels) + encoder.pos_embed[:, 1:]
        order = mask.byte().argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        width = tokens.shape[2]
        tokens = tokens.gather(1, order[:, :visible, None].expand(-1, -1, width))
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        tokens = self.decoder_embed(encoder.norm(encoder.blocks(tokens)))
        width = tokens.shape[2]
        masked = self.mask_token.expand(len(tokens), mask.shape[1] - visible, -1)
        rest = torch.cat([tokens[:, 1:], masked.to(tokens.dtype)], dim=1)
        rest = rest.gather(1, back[..., None].expand(-1, -1, width))
        tokens = torch.cat([tokens[:, :1], rest], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        made = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        target = self.target(patchify(pixels, self.architecture.patch_size))
        error = (made.float() - target).square().mean(dim=-1)
        loss: Tensor = (error * mask).sum(dim=1) / mask.sum(dim=1)
        return loss


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products that are done, by shapes and dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: Counter[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(arguments[0], arguments[1])
        elif name == "addmm":
            self._add(arguments[1], arguments[2])
        elif "dot_product" in name:
            self._add_attention(arguments, backward="backward" in name)
        return function(*arguments, **(named or {}))

    def _add(self, first: Tensor, second: Tensor, times: int = 1) -> None:
        self.done[tuple(first.shape), tuple(second.shape), first.dtype] += times

    def _add_attention(self, arguments: Any, backward: bool) -> None:
        """Scores and mixing; backwards each of them twice, for either factor."""
        queries, keys = (t.flatten(0, 1) for t in arguments[backward : backward + 2])
        scores = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
        for _ in range(1 + backward):
            self._add(queries, keys.transpose(1, 2))
            self._add(scores, keys)


def stepper(model: MaskedAutoencoder, given: argparse.Namespace, **adamw: Any) -> Step:
    """One optimiser step on one fixed batch."""
    device = torch.device(given.device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-6, betas=(0.9, 0.95), **adamw)
    patches = math.prod(model.architecture.grid)
    side = model.architecture.image_size[0]
    images = torch.randint(0, 256, (given.batch, side, side, 3), dtype=torch.uint8, device=device)
    streams = np.arange(given.batch, dtype=np.uint64)
    mask = torch.from_numpy(random_masks(patches, 0.75, streams)).to(device)
    visible = visible_count(patches, 0.75)
    half = given.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = model(images, mask, visible).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def limit(step: Step, device: torch.device) -> Step:
    """Every matrix product of a step, and nothing else."""
    with Products() as products:
        step()
    made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for first, second, dtype in products.done:
        made[first, second, dtype] = (
            torch.randn(first, device=device).to(dtype),
            torch.randn(second, device=device).to(dtype),
        )

    @torch.no_grad()
    def multiply() -> None:
        for key, times in products.done.items():
            for _ in range(times):
                torch.matmul(*made[key])

    return multiply


def seconds(step: Step, device: torch.device) -> float:
    """CPU seconds of all threads, or seconds of the GPU."""
    if device.type != "cuda":
        began = time.process_time()
        step()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


def with_attention(step: Step, model: MaskedAutoencoder, fused: bool) -> Step:
    """The step by one of timm's two attention paths."""

    def chosen() -> None:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused  # type: ignore[assignment]
        step()

    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="base", choices=SIZES)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=0.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    torch.manual_seed(0)
    shape = Architecture(image_size=(224, 224), patch_size=given.patch_size, **SIZES[given.size])
    ours, plain = MaskedAutoencoder(shape), PlainAutoencoder(shape)
    step = stepper(ours, given, fused=True)
    usual = stepper(plain, given, foreach=True)
    subjects = {
        "ours": step,
        "plain, fused attention": with_attention(usual, plain, True),
        "plain, plain attention": with_attention(usual, plain, False),
        "limit": limit(step, device),
    }
    if given.compile:
        compiled = MaskedAutoencoder(shape)
        compiled.patch_losses = torch.compile(compiled.patch_losses)  # type: ignore[method-assign]
        began = time.monotonic()
        subjects["compiled"] = stepper(compiled, given, fused=True)
        subjects["compiled"]()
        print(f"compiled in {time.monotonic() - began:.0f} s")
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(given.rounds + 1):
        for name, run in subjects.items():
            needed = seconds(run, device)
            if turn:  # the first one warms up
                taken[name].append(needed)
    times = {name: np.array(values) for name, values in taken.items()}
    own = times["ours"]
    best = min(list(subjects)[1:3], key=lambda name: times[name].mean())
    print(f"{given.size}/{given.patch_size}, batch {given.batch}, {given.precision}, {device}:")
    with FlopCount() as count:
        step()
    done, peak = count.flops / 1e12, peak_of(device, given.precision, given.peak_tflops)
    print(f"{done / given.batch:.4f} TFLOP an image")
    print(f"{best}: {interval((given.batch / times[best]).tolist())} images/s")
    for name in ("ours", *(["compiled"] if given.compile else [])):
        print(f"{name}: {interval((given.batch / times[name]).tolist())} images/s")
        print(f"  over that: {interval((times[best] / times[name]).tolist())}")
        print(f"  TFLOP/s: {interval((done / times[name]).tolist())}")
        if peak is not None:
            print(f"  share of {peak:g} TFLOP/s: {interval((done / times[name] / peak).tolist())}")
    print(f"ours, share of the limit: {interval((times['limit'] / own).tolist())}")


if __name__ == "__main__":
    main()
