"""Memory that ran out while something trained, in one sentence that names what to make smaller."""

import contextlib
from collections.abc import Iterator

from ..errors import MemoryFullError, UserError, ran_out_of_memory
from . import ranks
from .options import TrainingOptions

_ON = "the same command goes on from the newest checkpoint"


@contextlib.contextmanager
def memory_faults(
    options: TrainingOptions, of_device: str = "", of_machine: str = ""
) -> Iterator[None]:
    """Tell what to make smaller where memory runs out in the block.

    Args:
        options: What trains there.
        of_device: What to do where the device's memory runs out before a step is computed; by
            default a step is what took it.
        of_machine: Likewise of the machine's.

    Raises:
        MemoryFullError: The memory of the device or of the machine ran out, or the system killed a
            loader worker, which is how a machine without memory ends processes.
    """
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        told, workers = str(error).strip(), options.loader_workers
        if told.startswith("DataLoader worker (pid"):
            raise MemoryFullError(
                f"{told.splitlines()[0]}: expected memory for --loader-workers {workers}, which "
                f"most likely ran out, if nothing else ended it; try {workers // 2}, and {_ON}"
            ) from error
        if not ran_out_of_memory(error):
            raise
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in told:
            way_out = of_device or f"{_smaller(options)}; {_ON}"
            raise MemoryFullError(f"the memory of the device ran out: {way_out}") from error
        way_out = (
            of_machine or f"{_smaller(options)}, or fewer --loader-workers than {workers}; {_ON}"
        )
        raise MemoryFullError(f"the memory of the machine ran out: {way_out}") from error


def _smaller(options: TrainingOptions) -> str:
    """What a device computes at once, and what it should."""
    size = options.batch_size // options.batch_parts(ranks.count())
    now = f"--micro-batch is {options.micro_batch}"
    if size == 1:
        return f"{now}, and one image at a time is the least; take a smaller network"
    if size != options.micro_batch:
        now += f", so {size} images are computed at once"
    share = options.batch_size // ranks.count()
    half = next(count for count in range(size // 2, 0, -1) if share % count == 0)
    return f"{now}; try --micro-batch {half}"
