"""Memory that a run takes, on its device and on the host, in GiB."""

import multiprocessing
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a driver that counts its own memory does without
    import torch

_GIB = 2**30


def peaks(device: "torch.device") -> dict[str, float]:
    """The most that this process held so far.

    Returns:
        ``host_gib``: resident; ``device_gib``: allocated by torch on a GPU, where it is one.
    """
    found = {"host_gib": peak_resident() / _GIB}
    if device.type == "cuda":
        import torch

        found["device_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return found


def of_children() -> dict[str, float]:
    """What the processes that this one started hold now, its loader's workers.

    Pages that several share are shared out among them.  Linux counts page by page: 10 ms a
    process, so this is nothing for every step.

    Returns:
        ``loader_gib``; nothing without such processes, or where the system does not say.
    """
    sizes = []
    for child in multiprocessing.active_children():
        with suppress(OSError, StopIteration):
            sizes.append(_kibibytes(Path(f"/proc/{child.pid}/smaps_rollup"), "Pss:"))
    return {"loader_gib": sum(sizes) * 1024 / _GIB} if sizes else {}


def peak_resident() -> int:
    """Bytes, the most that this process held so far."""
    with suppress(OSError, StopIteration):
        # What getrusage says may be of the process that started this one.
        return _kibibytes(Path("/proc/self/status"), "VmHWM:") * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _kibibytes(file: Path, field: str) -> int:
    """A field of a file of ``/proc``; OSError without the file, StopIteration without the field."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next(int(line[1]) for line in lines if line[:1] == [field])
