"""Folders are looked at ahead of use only where looking is waiting."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from semmae.pipeline import image_folders as subject
from semmae.pipeline.data_root import LocalRoot
from semmae.pipeline.image_folders import plan_of_folder


@pytest.mark.parametrize("used", [0.0, 0.4, 0.6, 1.0])
def test_plan_of_folder__threads_share_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: float
) -> None:
    folders = [f"class{number:02}" for number in range(12)]
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    passed = iter(range(1000))
    spent = iter(range(1000))
    clock = SimpleNamespace(
        perf_counter=lambda: float(next(passed)), thread_time=lambda: next(spent) * used
    )
    monkeypatch.setattr(subject, "time", clock)
    by = {}
    scan = LocalRoot.scan

    def watched(root: LocalRoot, folder: str, **given: object) -> object:
        by[folder] = threading.current_thread()
        return scan(root, folder, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalRoot, "scan", watched)

    plan = plan_of_folder(LocalRoot(str(tmp_path)), "all")

    assert [plan.key(row) for row in range(12)] == [f"{folder}/a.png" for folder in folders]
    here = [by[folder] is threading.main_thread() for folder in folders]
    assert here == [number < subject._TRIED or used > 0.5 for number in range(12)]
