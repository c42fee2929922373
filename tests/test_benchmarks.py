import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from semmae.benchmarks import part_learner, pretraining_step
from semmae.benchmarks.intervals import interval
from semmae.stages.learn_parts import LearnPartsOptions
from semmae.tests.world import World


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], "1.500 ± 6.353"),  # 12.706 * 0.7071 / sqrt(2)
        ([1.0, 2.0, 3.0, 4.0, 5.0], "3.000 ± 1.963"),  # 2.776 * 1.5811 / sqrt(5)
        ([3.0] * 9, "3.000 ± 0.000"),
    ],
)
def test_interval__is_students(values: list[float], expected: str) -> None:
    assert interval(values) == expected


def test_pretraining_step__says_images_a_second_and_the_share_of_a_peak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(pretraining_step, "seconds", lambda step, device: 0.5)
    given = ["", "--size", "micro", "--batch", "2", "--rounds", "2", "--peak-tflops", "0.01"]
    for words in (given, given[:-2]):  # no peak is known of a CPU
        monkeypatch.setattr(sys, "argv", words)
        pretraining_step.main()
        said = capsys.readouterr().out
        assert "\nours: 4.000 ± 0.000 images/s\n" in said
        assert "ours, share of the limit: 1.000" in said
        done = re.search(r"([0-9.]+) TFLOP an image", said)
        shares = re.findall("share of 0.01 TFLOP/s: ([0-9.]+)", said)
        assert done is not None
        expected = [float(done[1]) * 2 / 0.5 / 0.01] if words is given else []
        assert [float(share) for share in shares] == pytest.approx(expected, abs=0.03)


def test_part_learner__measures_the_variants_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["paper with a wider decoder", "paper and perceptual 1"]
    small = ["--seeds", "2", "--train-images", "40", "--val-images", "16", "--steps", "2"]
    # Baselines stand beside places, which are slow to learn.
    small += ["--rounds", "1", "--place-images", "16", "--no-baselines"]
    data = [str(world.encoder), world.data]
    monkeypatch.setattr(sys, "argv", ["", *data, *small, "--variants", ",".join(names)])
    part_learner.main()
    said = capsys.readouterr().out
    for name in names:
        assert re.search(rf"^{name} +([0-9.]+|-) ", said, re.MULTILINE)


def test_part_learner__every_variant_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(part_learner, "open_encoder", MagicMock())
    monkeypatch.setattr(part_learner, "image_size_of", MagicMock())
    monkeypatch.setattr(part_learner, "bench", MagicMock())
    monkeypatch.setattr(part_learner, "position_share", lambda tokens: 0.0)
    monkeypatch.setattr(part_learner, "line", lambda name, run, seeds: asked.append(name))
    monkeypatch.setattr(sys, "argv", ["", "encoder", "data"])
    part_learner.main()
    assert asked[: len(part_learner.VARIANTS)] == list(part_learner.VARIANTS)
    for changes in part_learner.VARIANTS.values():
        LearnPartsOptions(data="d", encoder="e", output=Path("o"), **changes)  # type: ignore[arg-type]
