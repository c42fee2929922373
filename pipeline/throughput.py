"""How fast a run goes, and what its device waits for."""

import contextlib
import time
from collections.abc import Iterator

import torch

from . import memory, ranks
from .flops import FlopCount, peak_tflops


class Throughput:
    """Images a second, data wait, FLOPs and memory, since the last point of the logs.

    *Data wait* is the share of the time in which the device had nothing to do because the next
    batch was not there.  On CUDA two events around the wait tell it: work that was queued before
    still goes on meanwhile, and only what is left after its end counts.  Elsewhere it is the time
    in which the process waited.  Nothing here waits for the device in a step.

    Args:
        device: Of this process.
        batch_size: Images a step, over all processes.
        parts: Parts of a step that this process computes.
        flops: Of a part, forward and backward; None counts those of the first part.
        peak: TFLOP/s of the device at most; None where it is not known.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        parts: int,
        flops: int | None = None,
        peak: float | None = None,
    ) -> None:
        self._device, self._batch_size, self._parts = device, batch_size, parts
        self._flops, self._peak = flops, peak
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = 0.0
        self.begin(0)
        self.begin_epoch(0)

    def begin(self, step: int) -> None:
        """Count from here on, when ``step`` steps are done."""
        self._began, self._step, self._waited = time.monotonic(), step, 0.0
        self._waits.clear()

    def begin_epoch(self, step: int) -> None:
        """The same for `epoch_figures`."""
        self._epoch_began, self._epoch_step, self._epoch_waited = time.monotonic(), step, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the process waits for a batch."""
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(self._device)
            before.record(stream)
            yield
            after.record(stream)
            self._waits.append((before, after))
        else:
            began = time.monotonic()
            yield
            self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Within, a part of a step is computed, forward and backward."""
        if self._flops is not None:
            yield
            return
        with FlopCount() as count:
            yield
        self._flops = count.flops

    def figures(self, step: int) -> dict[str, float]:
        """Since `begin`; all processes must ask together, when the device has nothing left to do.

        Args:
            step: Steps done.

        Returns:
            ``images_per_second`` of all processes; ``tflops_per_second`` of this one's device, and
            ``mfu``, its share of the peak, where that is known; ``data_wait`` of the process that
            waited most; ``host_gib`` and ``device_gib`` of the largest.
        """
        now = time.monotonic()
        seconds, steps = max(now - self._began, 1e-9), step - self._step
        waited = self._waited + sum(a.elapsed_time(b) for a, b in self._waits) / 1e3
        held = memory.peaks(self._device)
        most = ranks.largest({"waited": waited, **held}, self._device)
        waited = most.pop("waited")
        self._epoch_waited += waited
        found = {"images_per_second": steps * self._batch_size / seconds}
        found["data_wait"] = waited / seconds
        if self._flops:
            found["tflops_per_second"] = self._flops * self._parts * steps / seconds / 1e12
            if self._peak:
                found["mfu"] = found["tflops_per_second"] / self._peak
        return {**found, **most}

    def epoch_figures(self, step: int) -> dict[str, float]:
        """Since `begin_epoch`, after `figures`; ``loader_gib`` is of this process's loader.

        Returns:
            ``images_per_second``, ``data_wait``, ``seconds``, ``loader_gib``.
        """
        seconds = max(time.monotonic() - self._epoch_began, 1e-9)
        images = (step - self._epoch_step) * self._batch_size
        return {
            "images_per_second": images / seconds,
            "data_wait": self._epoch_waited / seconds,
            "seconds": seconds,
            **memory.of_children(),
        }


def peak_of(device: torch.device, precision: str, given: float) -> float | None:
    """TFLOP/s of a device at most, for `Throughput`.

    Args:
        device: Which.
        precision: ``bf16`` or ``fp32`` of matrix products; GPUs may compute fp32 in TF32.
        given: What the user said; 0 looks the GPU up.
    """
    if given or device.type != "cuda":
        return given or None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return peak_tflops(torch.cuda.get_device_name(device), precision)
