"""Training by Ray Train: it starts the processes, and starts them again where one is lost.

Checkpoints are the run's own (`storage.checkpoints`), so Ray is told of none: whatever happened, a
worker that starts goes on from the newest one.  Ray's own notes lie in ``RUN/.ray`` meanwhile, and
what the first process says, to be said here.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingError, UserError, first_line
from ..storage.checkpoints import newest_checkpoints
from .cluster import joined
from .launching import only_first_speaks
from .options import TrainingOptions
from .placement import Placement

O = TypeVar("O", bound=TrainingOptions)  # noqa: E741

VAIN_TRIES = 3
"""Times that workers are lost, without a new checkpoint in between, until the run ends."""

REPEAT_SECONDS = 1.0
"""Seconds between two looks at what the first process says."""


def train_on_ray(train: Callable[[O], Path], options: O) -> Path:
    """Train in ``options.workers`` processes; where one is lost, all go on from the newest
    checkpoint.

    Args:
        train: As of `launching.launch`.
        options: Its argument.

    Returns:
        What ``train`` returned.

    Raises:
        SettingError: The machine or the cluster has no room for the workers.
        UserError: What a worker raised; or workers are lost again and again.
    """
    placement = Placement(workers=options.workers, address=options.address, device=options.device)
    if options.output.is_file():
        raise SettingError(f"{options.output} is a file: name a folder as --output")
    notes = options.output.absolute() / ".ray"
    # Its own print would say everything twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    said = notes / f"said-{uuid.uuid4().hex}"
    work = partial(_work, train, options, Path.cwd(), said)
    with _cleared(notes), joined(placement) as share, _ended_by_interrupt(), _repeated(said):
        tries, before = 0, list[Path]()
        while True:
            try:
                return Path(_once(work, placement.workers, share.unit == "GPU", notes))
            except _WorkerLostError as error:
                newest = newest_checkpoints(options.output)
                tries = tries + 1 if newest == before else 1
                step = _named(newest, options.output)
                if tries >= VAIN_TRIES:
                    raise UserError(
                        f"workers of {options.output} were lost {tries} times without a new "
                        f"checkpoint, after {step}: {error}; see whether memory runs out, "
                        "or set --checkpoint-steps"
                    ) from error
                before = newest
                print(f"a worker was lost: all go on from {step}", file=sys.stderr)


def _named(newest: list[Path], run: Path) -> str:
    """The step that a run goes on from."""
    if not newest:
        return "step 0"
    path = max(newest, key=lambda path: path.stat().st_mtime_ns)
    inner = path.parent.parent.relative_to(run).name
    step = f"step {int(path.stem.removeprefix('step-'))}"
    return f"{step} of {inner}" if inner else step


class _WorkerLostError(Exception):
    """A worker ended, and not by a mistake that a user can mend."""


def _once(work: Callable[[], str], workers: int, on_gpus: bool, notes: Path) -> str:
    """Run the workers to their end, or until one is lost."""
    import ray.exceptions
    import ray.train
    import ray.train.torch

    api: Any = ray.train
    trainer = api.torch.TorchTrainer(
        work,
        scaling_config=api.ScalingConfig(num_workers=workers, use_gpu=on_gpus),
        run_config=api.RunConfig(
            # A name that was there before would be gone on with by Ray, too.
            name=uuid.uuid4().hex,
            storage_path=str(notes),
            logging_config=api.LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        return str(trainer.fit().return_value)
    except api.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {0: error}).values()
        for failure in failures:
            if isinstance(failure, UserError):
                raise failure from None
        raise _WorkerLostError(_told(failures)) from error
    except ray.exceptions.RayError as error:  # what watches over the workers was lost itself
        raise _WorkerLostError(first_line(error)) from error


def _told(failures: Any) -> str:
    """What is known of the ends of workers, in one line."""
    lines = {str(failure).strip().splitlines()[-1] for failure in failures if str(failure).strip()}
    return "; ".join(sorted(lines)) or "no reason is known"


def _work(train: Callable[[O], Path], options: O, folder: Path, said: Path) -> str:
    """What a worker does; the first one's standard error goes into the file ``said``."""
    with contextlib.suppress(OSError):  # relative paths are those of the command
        os.chdir(folder)
    rank = int(os.environ["RANK"])
    with (
        (said if rank == 0 else Path(os.devnull)).open("a", buffering=1) as opened,
        contextlib.redirect_stderr(opened),
        only_first_speaks(rank),
    ):
        return str(train(options))


@contextlib.contextmanager
def _cleared(notes: Path) -> Iterator[None]:
    """A folder that is there while the block runs."""
    notes.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(notes, ignore_errors=True)
        with contextlib.suppress(OSError):  # nothing but them was written
            notes.parent.rmdir()


@contextlib.contextmanager
def _repeated(said: Path) -> Iterator[None]:
    """While the block runs, what is written to a file is said on standard error."""
    over = threading.Event()

    def repeat() -> None:
        done, ending = 0, False
        while not ending:
            ending = over.wait(REPEAT_SECONDS)
            with contextlib.suppress(FileNotFoundError), said.open() as opened:
                opened.seek(done)
                sys.stderr.write(opened.read())
                done = opened.tell()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Ctrl-C is a `KeyboardInterrupt`; Ray Train would end the process, well."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        with contextlib.suppress(ValueError):  # not the main thread: nothing was changed
            signal.signal(signal.SIGINT, before)
