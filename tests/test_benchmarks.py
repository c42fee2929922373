import re
import sys

import pytest
import torch

from semmae.benchmarks import pretraining_step
from semmae.benchmarks.intervals import interval


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
