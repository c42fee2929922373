"""Processes that train together, for tests: forked from a clean server, so torch loads once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from semmae.errors import MissingError, UserError
from semmae.pipeline.feeding import Batch
from semmae.pipeline.launching import launch
from semmae.pipeline.options import TrainingOptions
from semmae.pipeline.runs import Run
from semmae.pipeline.training import fit
from semmae.tests.pipeline.tiny import TinyTask, options

PATIENCE_SECONDS = 60.0

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "timm",
    "pytest",
    "semmae.stages.learn_parts",
    "semmae.tests.pipeline.peers",
]
"""Modules that each process would take seconds to import."""


@dataclass
class Told:
    """What became of a process: what it returned, its exit code, and its error's class and text."""

    value: Any = None
    ended: int = 0
    error: str = ""


def together(count: int, work: Callable[[int], Any]) -> list[Told]:
    """What became of ``work(rank)`` in each of some processes, started as torchrun would."""
    # As torchrun does, so that it outlives them all.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running = []
    for rank in range(count):
        mine, theirs = context.Pipe()
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = context.Process(target=_peer, args=(theirs, settings, work, rank))
        process.start()
        theirs.close()
        running.append((process, mine))
    found = []
    for process, mine in running:
        told = Told(ended=-1, error="it hung, and was killed")
        if mine.poll(PATIENCE_SECONDS):
            try:
                told = mine.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                told = Told(ended=process.exitcode or 0)
        found.append(told)
    for process, mine in running:
        process.kill()
        process.join()
        mine.close()
    return found


def _peer(
    answer: Connection, settings: dict[str, str], work: Callable[[int], Any], rank: int
) -> None:
    os.environ.update(settings)
    torch.set_num_threads(1)
    try:
        told = Told(value=work(rank))
    except UserError as error:
        told = Told(ended=1, error=f"{type(error).__name__}: {error}")
    except SystemExit as error:
        told = Told(ended=int(str(error.code)))
    except BaseException:
        told = Told(ended=1, error=traceback.format_exc())
    answer.send(told)


class DeepTask(TinyTask):
    """A stack of equal blocks, a parameter that is never used, and no use of ``forward``.

    Args:
        fails_at: Call of ``loss`` at which `fail` is called, in the process of rank ``failing``.
        failing: That rank.
        dropout: As of `TinyTask`.
    """

    def __init__(self, fails_at: int | None = None, failing: int = 1, dropout: float = 0.3) -> None:
        super().__init__(dropout=dropout)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.layers = list(self.model)
        self.model.add_module("blocks", self.blocks)
        self.model.register_parameter("scale", self.scale)
        self.model.register_parameter("unused", nn.Parameter(torch.ones(3, 5)))
        self.is_failing = int(os.environ.get("RANK", "0")) == failing
        if self.is_failing:
            self.fails_at = fails_at

    def values(self, x: Tensor) -> Tensor:
        first, gelu, dropout, last = self.layers
        scale: Any = self.model.scale  # the parameter of now: sharding puts another in its place
        hidden = dropout(gelu(first(x))) * scale[0]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return last(hidden).squeeze(1)  # type: ignore[no-any-return]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.calls == self.fails_at:
            self.fail()
        self.calls += 1
        value = (self.values(batch["x"]) - batch["x"].sum(1)).float().square().mean()
        return value, {"draw_mean": batch["index"].float().mean()}

    def fail(self) -> None:
        os._exit(9)

    def finish_epoch(self, epoch: int, run: Run) -> dict[str, float]:
        (run.folder / "pictures").mkdir(exist_ok=True)
        (run.folder / "pictures" / str(epoch)).write_text("a picture")
        with torch.no_grad():
            return {"at_ones": float(self.values(torch.ones(2, 6)).sum())}


class MistakenTask(DeepTask):
    """A task whose images go missing for one process."""

    def fail(self) -> None:
        raise MissingError("the images are gone")


def _fit(given: TrainingOptions, task: Callable[[], TinyTask]) -> Path:
    return fit(task(), given)


def peer_run(
    rank: int, output: Path, task: Callable[[], TinyTask] = DeepTask, **changes: Any
) -> Path:
    """A run in one of several processes, or in this one."""
    return launch(partial(_fit, task=task), options(output, log_steps=1, **changes))
