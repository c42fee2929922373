from pathlib import Path

import pytest

from semmae.stages.demo import EMBEDDED_ENCODER, DemoOptions, demo
from semmae.stages.networks import open_encoder


def test_demo__makes_every_file_that_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = DemoOptions(
        output=tmp_path / "demo",
        train=132,
        val=24,
        epochs=1,
        workers=0,
        bootstrap=True,
        bootstrap_epochs=1,
    )
    demo(options)
    named = [
        Path(line.strip())
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  " + str(tmp_path))
    ]
    assert len(named) == 5
    assert all(path.exists() for path in named)
    demo(options)  # a second call finds all done and ends the same way
    table = (tmp_path / "demo" / "results.txt").read_text()
    assert "untrained.top1" in table
    assert "fg_nmi" in table


def test_demo__ships_an_encoder_that_fits_its_images() -> None:
    assert EMBEDDED_ENCODER.stat().st_size <= 3_000_000
    encoder = open_encoder(str(EMBEDDED_ENCODER))
    assert encoder.native_size == (96, 96)
    assert encoder.patch_size == 8
