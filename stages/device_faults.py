"""What goes wrong on a device, in one sentence: its memory ran out, or it failed."""

import contextlib
from collections.abc import Iterator

import torch

from ..errors import UserError, first_line, ran_out_of_memory
from ..pipeline.shard_worker import WorkerLostError

_FAILED = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS_",
    "No CUDA GPUs are available",
    "CUDA unknown error",
    "cudaGetDeviceCount()",
    "CUDA driver initialization failed",
)
"""What torch says of a GPU that failed, or does not start, where it has no class of its own."""

_CLASSES = (torch.AcceleratorError, torch.cuda.DeferredCudaCallError)
"""Its classes of a GPU that failed; the second one is met where it starts."""


@contextlib.contextmanager
def device_faults(device: torch.device, way_out: str) -> Iterator[None]:
    """Tell faults of the device that are met in the block from faults of the program.

    Args:
        device: What is computed on.
        way_out: What to do where its memory ran out.

    Raises:
        UserError: The memory ran out; the process is none the worse for it.
        WorkerLostError: The GPU failed, and this process can use it no more.
    """
    try:
        yield
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        told = str(error)
        if ran_out_of_memory(error):
            raise UserError(f"the memory of {device} ran out: {way_out}") from error
        if isinstance(error, _CLASSES) or any(word in told for word in _FAILED):
            # The lines below the first are advice to programmers.
            raise WorkerLostError(
                f"{device} failed ({first_line(error)}): see to the GPU and its driver"
            ) from error
        raise
