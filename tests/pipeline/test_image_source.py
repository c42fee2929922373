import pickle
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch.multiprocessing import get_context

from semmae.errors import MissingError
from semmae.pipeline import plan_rows
from semmae.pipeline.data_root import LocalRoot
from semmae.pipeline.image_source import Geometry, ImageSource, batches_in_order
from semmae.pipeline.plan import Plan
from semmae.pipeline.sources import list_images


def picture(number: int) -> bytes:
    """An image whose every pixel says which one it is."""
    stream = BytesIO()
    Image.new("RGB", (8 + number % 5, 9), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, count: int, bad: set[int] | None = None) -> Plan:
    root.mkdir()
    for number in range(count):
        data = b"broken" if number in (bad or set()) else picture(number)
        (root / f"{number:03d}.png").write_bytes(data)
    return list_images(root)


def parquet(root: Path, count: int, files: int) -> Plan:
    root.mkdir()
    each = count // files
    for file in range(files):
        data = [picture(file * each + row) for row in range(each)]
        table = pa.table({"image": pa.array(data, pa.binary()), "label": list(range(each))})
        pq.write_table(table, root / f"train-{file}.parquet", write_page_checksum=True)
    return list_images(root)


def number_of(pixels: NDArray[np.uint8]) -> int:
    assert len(np.unique(pixels[..., 0])) == 1
    return int(pixels[0, 0, 0])


def test_decoded_or_next__takes_the_next_good_one_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ImageSource(folder(tmp_path / "d", 8, {2, 3, 7}))
    good = [0, 1, 4, 5, 6]
    for _ in range(3):
        for position in range(8):
            expected = min((g for g in good if g >= position), default=0)
            found, pixels = images.decoded_or_next(position)
            assert (found, number_of(pixels)) == (expected, expected)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [
        f"skipped {number:03d}.png" for number in (2, 3, 7)
    ]


def _read_all(images: ImageSource) -> None:
    for position in range(len(images)):
        images.decoded_or_next(position)


def test_decoded_or_next__warns_once_for_all_forked_workers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = ImageSource(folder(tmp_path / "d", 4, {1}))
    for _ in range(2):
        worker = get_context("fork").Process(target=_read_all, args=(images,))
        worker.start()
        worker.join()
    assert capfd.readouterr().err.count("skipped 001.png") == 1


def test_decoded_or_next__gives_up_where_nothing_can_be_read(tmp_path: Path) -> None:
    images = ImageSource(folder(tmp_path / "d", 3, {0, 1, 2}))
    with pytest.raises(MissingError, match=r"not one of 3 images .* from 001\.png on") as raised:
        images.decoded_or_next(1)
    assert "\n" not in str(raised.value)


def test_decoded_or_next__does_not_search_a_folder_that_is_gone_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSource(folder(tmp_path / "d", 12, set(range(12))))
    monkeypatch.setattr("semmae.pipeline.image_source._NEIGHBOURS", 5)
    with pytest.raises(MissingError, match="not one of 5 images in a row"):
        images.decoded_or_next(9)


def test_image_source__counts_among_its_rows(tmp_path: Path) -> None:
    plan = folder(tmp_path / "d", 8, {3})
    rows = np.array([6, 1, 4])
    images = ImageSource(plan, rows)
    assert [number_of(images.decoded(position)) for position in range(3)] == rows.tolist()
    assert len(images) == 3
    prints = {ImageSource(plan, r).fingerprint for r in (None, rows, rows[::-1], rows[:2])}
    assert len(prints) == 4
    copied = pickle.loads(pickle.dumps(images))
    assert copied.fingerprint == images.fingerprint
    assert number_of(copied.decoded(1)) == 1


def test_image_source__labels_are_those_of_its_rows(tmp_path: Path) -> None:
    plan = parquet(tmp_path / "d", 12, 2)
    rows = np.array([11, 0, 7])
    assert ImageSource(plan, rows).labels.tolist() == plan.labels[rows].tolist() == [5, 0, 1]


@pytest.mark.parametrize("geometry", ["squash", "center"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches_in_order__give_all_good_images_once_in_order(
    geometry: Geometry, batch: int, tmp_path: Path
) -> None:
    bad = {0, 5, 6, 7, 12}
    images = ImageSource(folder(tmp_path / "d", 13, bad))
    seen: list[int] = []
    for positions, pixels in batches_in_order(images, (6, 4), batch, geometry):
        assert pixels.shape == (len(positions), 6, 4, 3)
        assert 1 <= len(positions) <= batch
        assert [number_of(image) for image in pixels] == positions.tolist()
        seen += positions.tolist()
    assert seen == sorted(set(range(13)) - bad)


def test_batches_in_order__keep_to_the_positions_asked_for(tmp_path: Path) -> None:
    images = ImageSource(folder(tmp_path / "d", 9, {2}), np.array([8, 7, 2, 5, 0]))
    wanted = np.array([4, 2, 1, 3])
    found = list(batches_in_order(images, (4, 4), 3, positions=wanted))
    assert [positions.tolist() for positions, _ in found] == [[4, 1], [3]]
    assert [number_of(image) for _, pixels in found for image in pixels] == [0, 7, 5]
    assert list(batches_in_order(images, (4, 4), 3, positions=wanted[:0])) == []


def test_batches_in_order__end_their_threads_when_left(tmp_path: Path) -> None:
    images, before = ImageSource(folder(tmp_path / "d", 9)), threading.active_count()
    batches: Any = batches_in_order(images, (4, 4), 2, threads=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each Parquet file is opened."""
    counts: Counter[str] = Counter()
    original = LocalRoot.open

    def counted(root: LocalRoot, path: str) -> BinaryIO:
        counts[path] += 1
        return original(root, path)

    monkeypatch.setattr(LocalRoot, "open", counted)
    return counts


def test_batches_in_order__read_each_parquet_file_once_for_all_threads(
    tmp_path: Path, opened: Counter[str]
) -> None:
    images = ImageSource(parquet(tmp_path / "d", 40, 4))
    opened.clear()
    for _ in range(2):
        found = list(batches_in_order(images, (4, 4), 8, threads=8))
        assert [number_of(image) for _, pixels in found for image in pixels] == list(range(40))
    assert opened == {f"train-{file}.parquet": 1 for file in range(4)}


def test_warm__is_not_repeated(tmp_path: Path, opened: Counter[str]) -> None:
    images = ImageSource(parquet(tmp_path / "d", 6, 2))
    opened.clear()
    for _ in range(3):
        images.warm()
    _read_all(images)
    assert opened == {"train-0.parquet": 1, "train-1.parquet": 1}


@pytest.mark.parametrize("filed", [False, True])
def test_keys__come_in_the_order_that_is_asked_for(
    filed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filed:
        monkeypatch.setattr(plan_rows, "RUN_ROWS", 8)
        monkeypatch.setattr(plan_rows, "TABLE_ROWS", 4)
    listed = folder(tmp_path / "d", 24)
    assert isinstance(listed.rows, plan_rows.FiledRows) == filed
    images = ImageSource(listed, np.arange(2, 24))
    asked = np.random.default_rng(0).permutation(22)[:15]
    asked = np.append(asked, asked[3])
    assert images.names(asked) == [f"{2 + position:03d}.png" for position in asked]
