import numpy as np
import pytest
import torch

from semmae.stages.evals import part_probe
from semmae.stages.evals.part_probe import probe_parts


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_probe, "STEPS", 120)
    monkeypatch.setattr(part_probe, "PATCHES_A_STEP", 256)


def labelled(count: int, seed: int, noise: float) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens with a direction a label, of very different scales, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count, 12), generator=generator)
    directions = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    tokens = directions[labels] + noise * torch.randn(count, 12, 8, generator=generator)
    scales = torch.tensor([100.0, 0.01, 1, 1, 1, 1, 1, 1])
    return tokens * scales + 5, labels.numpy().astype(np.uint8).reshape(count, 3, 4)


def test_probe_parts__finds_what_tokens_tell_on_other_images() -> None:
    train, labels = labelled(80, 0, 0.1)
    held, true = labelled(30, 1, 0.1)
    found = probe_parts(train.half(), labels, held, true, seed=0)
    assert found.keys() == {"fg_nmi", "fg_ari", "accuracy"}
    assert all(value > 97 for value in found.values())


def test_probe_parts__finds_nothing_where_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    train, held = torch.randn(300, 12, 8, generator=generator), torch.randn(60, 12, 8)
    labels, true = labelled(300, 0, 1)[1], labelled(60, 1, 1)[1]
    found = probe_parts(train, labels, held, true, seed=0)
    assert abs(found["fg_ari"]) < 5
    assert found["accuracy"] < 35


def test_probe_parts__gives_the_same_figures_again_and_others_by_another_seed() -> None:
    train, labels = labelled(40, 0, 1.5)
    held, true = labelled(40, 1, 1.5)
    first, again, other = (probe_parts(train, labels, held, true, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_probe_parts__knows_labels_that_the_train_images_lack_as_wrong() -> None:
    train, labels = labelled(40, 0, 0.1)
    held, true = labelled(40, 1, 0.1)
    fewer = np.minimum(labels, 2)
    share = float((true <= 2).mean())
    found = probe_parts(train, fewer, held, true, seed=0)
    assert found["accuracy"] == pytest.approx(100 * share, abs=2)
