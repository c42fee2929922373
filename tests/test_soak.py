import sys
from pathlib import Path

import pytest

from semmae.tests import soak

FAILS = """
import pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
runs = output.with_name("runs")
with runs.open("a") as file:
    file.write("-")
sys.exit("semmae: it cannot be done" if 1 < runs.stat().st_size < 9 else 0)
"""
"""A command that fails after its first run, for so long that a test which waits for it ends."""


def test_soak__gives_up_where_undisturbed_runs_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "prepare", lambda work: [sys.executable, "-c", FAILS])
    (tmp_path / "store").mkdir()
    with pytest.raises(AssertionError, match="3 runs failed, undisturbed:\nsemmae: it cannot be"):
        soak.soak(0, 0, tmp_path)
    assert (tmp_path / "runs").read_text() == "-" * 4
