from collections.abc import Iterator

import pytest
import torch

from semmae.pipeline.training import fit
from semmae.tests.pipeline.tiny import TinyTask, Whole, options


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing interrupts."""
    run, task = tmp_path_factory.mktemp("whole") / "run", TinyTask()
    return Whole(run, fit(task, options(run, keep_checkpoints=0)), task)
