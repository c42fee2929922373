"""Data listed by name beside a plan that knows their sizes, as pretraining does beside a store."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semmae.errors import MismatchError
from semmae.pipeline import data_root, plan_rows
from semmae.pipeline.plan import Plan
from semmae.pipeline.plan_rows import FiledRows, sorted_rows
from semmae.pipeline.sources import ImageReader, list_images
from semmae.tests.pipeline.images import picture, write_forms

IMAGES = [picture(number) + bytes(number) for number in range(12)]


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    return write_forms(tmp_path, IMAGES)


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is asked for its size, and no image column is read."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("an image was looked at")

    monkeypatch.setattr(data_root, "_size", refused)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refused)


@pytest.mark.parametrize("form", ["folder", "parquet", "tars"])
def test_list_images__beside_a_known_plan_is_the_same_plan(
    form: str, forms: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    whole = list_images(forms[form], "train")
    request.getfixturevalue("no_looks")
    beside = list_images(forms[form], "train", whole.tables())
    assert beside.table.equals(whole.table)
    assert (beside.fingerprint, beside.class_names) == (whole.fingerprint, whole.class_names)
    reader = ImageReader(beside)
    assert sorted(reader.read(row) for row in range(12)) == sorted(IMAGES)


def test_list_images__beside_a_known_plan_sees_what_came_and_went(
    forms: dict[str, Path], no_looks: None
) -> None:
    data = forms["folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_root, "_size", lambda entry: entry.stat().st_size)
        whole = list_images(data)
    (data / "train/class-0/000.png").unlink()
    (data / "train/class-1/new.png").write_bytes(picture(3))
    beside = list_images(data, known=whole.tables())
    sizes = dict(zip(beside.keys.tolist(), beside.sizes.tolist(), strict=True))
    known = dict(zip(whole.keys.tolist(), whole.sizes.tolist(), strict=True))
    assert known.pop("train/class-0/000.png") == len(IMAGES[0])
    assert sizes.pop("train/class-1/new.png") == -1
    assert sizes == known


def test_list_images__takes_the_sizes_that_a_url_tells(forms: dict[str, Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://known-sizes-{os.getpid()}"
    fsspec.filesystem("memory").put(str(forms["folder"]), url, recursive=True)
    known = list_images(forms["folder"])
    wrong = plan_rows.with_sizes(known.rows, known.sizes + 1)
    there = list_images(url, known=Plan(known.root, wrong, known.class_names).tables())
    assert there.sizes.tolist() == known.sizes.tolist()


@pytest.mark.parametrize(("form", "key"), [("folder", "003.png"), ("parquet", "train-0.parquet#3")])
def test_image_reader__refuses_an_image_of_another_size_in_one_sentence(
    form: str, key: str, forms: dict[str, Path], tmp_path: Path
) -> None:
    known = list_images(forms[form], "train")
    shutil.rmtree(forms[form])
    write_forms(tmp_path, [*IMAGES[:3], IMAGES[3] + b"more", *IMAGES[4:]])
    plan = list_images(forms[form], "train", known.tables())
    assert plan.fingerprint == known.fingerprint
    reader, changed = ImageReader(plan), [key in name for name in plan.keys].index(True)
    sizes = len(IMAGES[3]) + 4, len(IMAGES[3])
    said = f"{key} has {sizes[0]} bytes, and had {sizes[1]} when it was listed .*extract-parts"
    with pytest.raises(MismatchError, match=said) as raised:
        reader.read(changed)
    assert "\n" not in str(raised.value)
    others = [reader.read(row) for row in range(12) if row != changed]
    assert sorted(others) == sorted([*IMAGES[:3], *IMAGES[4:]])


def test_with_sizes__changes_sizes_alone_in_memory_and_in_a_file(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = list_images(forms["tars"]).table
    monkeypatch.setattr(plan_rows, "RUN_ROWS", 5)
    monkeypatch.setattr(plan_rows, "TABLE_ROWS", 5)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    long = sorted_rows([short.drop_columns("index")])
    assert isinstance(long, FiledRows)
    sizes = np.arange(100, 112)
    for rows in (short, long):
        found = plan_rows.with_sizes(rows, sizes)
        assert type(found) is type(rows)
        table = found if isinstance(found, pa.Table) else pa.concat_tables(found)
        assert table["bytes"].to_pylist() == sizes.tolist()
        assert table.drop_columns("bytes").equals(short.drop_columns("bytes"))
    assert not list((tmp_path / "temporary").iterdir())
