import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions
import ray.train.torch

from semmae.errors import UserError
from semmae.pipeline import ray_training
from semmae.pipeline.ray_training import VAIN_TRIES, train_on_ray
from semmae.tests.pipeline.tiny import options


def test_train_on_ray__says_in_a_sentence_that_what_watches_over_the_workers_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Ray's memory monitor ends it, which takes the newest processes first."""
    fits: list[object] = []

    class Trainer:
        def __init__(self, *given: object, **settings: object) -> None: ...

        def fit(self) -> None:
            fits.append(self)
            told = "7 workers were killed: low on memory\nTop 10"
            raise ray.exceptions.OutOfMemoryError(told)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def joined(placement: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(unit="CPU")

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray_training, "joined", joined)
    told = r"were lost 3 times .* 7 workers were killed: low on memory; see whether memory"
    with pytest.raises(UserError, match=told):
        train_on_ray(lambda given: Path(), options(tmp_path / "run"))
    assert len(fits) == VAIN_TRIES
    assert capfd.readouterr().err.count("all go on from step 0") == VAIN_TRIES - 1
    assert not (tmp_path / "run").exists()
