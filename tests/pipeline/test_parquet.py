import os
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semmae.errors import DamageError, MissingError, SettingError
from semmae.pipeline import image_source
from semmae.pipeline.data_root import LocalRoot
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.loaders import SquashedData
from semmae.pipeline.parquet import ParquetImages
from semmae.pipeline.sources import ImageReader, Split, list_images


def picture(number: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (4 + number % 3, 4), (number % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(
    place: Path, images: Sequence[bytes | None], rows: int = 1000, **columns: Any
) -> Path:
    """As data sets lie on the hub: structs of bytes and path."""
    place.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(structs, kind), **columns})
    pq.write_table(table, place, row_group_size=rows, write_page_checksum=True)
    return place


def test_list_images__reads_parquet_of_the_hub(tmp_path: Path) -> None:
    images = [picture(number) for number in range(12)]
    write_parquet(
        tmp_path / "data" / "train-00000.parquet", images[:11], rows=4, label=[*range(11)]
    )
    write_parquet(tmp_path / "data" / "validation-0.parquet", images[11:], label=[3])
    plan = list_images(tmp_path, "train")
    assert plan.keys.tolist() == [f"data/train-00000.parquet#{row}" for row in range(11)]
    assert plan.labels.tolist() == list(range(11))
    assert plan.sizes.tolist() == [len(data) for data in images[:11]]
    val = list_images(tmp_path, "val")
    assert val.keys.tolist() == ["data/validation-0.parquet#0"]
    assert val.class_names == plan.class_names == tuple(str(label) for label in range(11))
    assert len(list_images(tmp_path)) == 12


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train-0", "test-0"], "val", ["test-0"]),
        (["train-0", "val-0", "test-0"], "val", ["val-0"]),
        (["train_0", "other"], "train", ["train_0"]),
        (["trains", "other"], "train", ["other", "trains"]),
        (["train", "other"], "all", ["other", "train"]),
    ],
)
def test_list_images__chooses_the_parquet_files_of_a_split(
    files: list[str], split: Split, expected: list[str], tmp_path: Path
) -> None:
    for file in files:
        write_parquet(tmp_path / f"{file}.parquet", [picture(0)])
    plan = list_images(tmp_path, split)
    assert plan.keys.tolist() == [f"{name}.parquet#0" for name in expected]
    assert plan.labels.tolist() == [-1] * len(expected)
    assert plan.class_names == ()


def test_list_images__takes_a_single_parquet_file_of_plain_binary(tmp_path: Path) -> None:
    place = tmp_path / "mine.parquet"
    labels = pa.array([1, None, 0], pa.uint8())
    pq.write_table(pa.table({"image": [picture(0), None, b""], "label": labels}), place)
    plan = list_images(place)
    assert (plan.root, plan.keys[2]) == (str(tmp_path), "mine.parquet#2")
    assert plan.sizes.tolist() == [len(picture(0)), 0, 0]
    assert plan.labels.tolist() == [1, -1, 0]
    assert [ImageReader(plan).read(index) for index in range(3)] == [picture(0), b"", b""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n1\tgoldfish, Carassius\nn2\tslug\n", ("goldfish, Carassius", "slug")),
        ("n1\tone\nn2\ttwo\nn3\tthree\n", ("one", "two", "three")),
        ("n1\tgoldfish\n", ("0", "1")),
        ("goldfish\nslug\n", ("0", "1")),
    ],
)
def test_list_images__names_classes_by_a_complete_list_only(
    text: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "train-0.parquet", [picture(0)], label=[0])
    write_parquet(tmp_path / "val-0.parquet", [picture(0)], label=[1])
    (tmp_path / "classes.txt").write_text(text)
    assert list_images(tmp_path, "train").class_names == expected


@pytest.fixture
def parquet(tmp_path: Path) -> tuple[Path, list[bytes]]:
    images = [picture(number) for number in range(25)]
    images[7] = b""
    nullable: list[bytes | None] = [data or None for data in images]
    write_parquet(tmp_path / "train-0.parquet", nullable[:15], rows=4)
    write_parquet(tmp_path / "train-1.parquet", nullable[15:], rows=3)
    return tmp_path, images


def read_all(reader: ImageReader, seed: int = 0) -> list[bytes]:
    data = [b"unread"] * len(reader)
    for index in np.random.default_rng(seed).permutation(len(reader)).tolist():
        data[index] = reader.read(index)
    return data


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("warm", [False, True])
def test_image_reader__gives_what_was_written_in_any_order(
    limit: int, warm: bool, parquet: tuple[Path, list[bytes]]
) -> None:
    folder, images = parquet
    reader = ImageReader(list_images(folder), limit)
    if warm:
        reader.warm()
    assert len(reader) == 25
    assert read_all(reader) == images == read_all(reader, seed=1)
    assert read_all(pickle.loads(pickle.dumps(reader))) == images


def test_image_reader__serves_from_memory_once_warm(parquet: tuple[Path, list[bytes]]) -> None:
    folder, images = parquet
    reader = ImageReader(list_images(folder))
    reader.warm()
    for file in folder.glob("*.parquet"):
        file.unlink()
    assert read_all(reader) == images


def test_training_data__tell_of_parquet_that_is_slow_in_random_order(
    parquet: tuple[Path, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = list_images(parquet[0])
    SquashedData(ImageSource(plan), (4, 4)).warm()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(image_source, "ImageReader", partial(ImageReader, in_memory_limit=0))
    SquashedData(ImageSource(plan), (4, 4)).warm()
    told = capsys.readouterr().err
    assert told.startswith(f"{parquet[0]} holds more Parquet than is kept in memory")
    assert "--images cache" in told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_image_reader__reads_in_forked_processes(
    limit: int, parquet: tuple[Path, list[bytes]]
) -> None:
    folder, images = parquet
    reader = ImageReader(list_images(folder), limit)
    assert reader.read(3) == images[3]
    children = []
    for seed in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if read_all(reader, seed) == images else 1
            finally:
                os._exit(status)
        children.append(child)
    assert read_all(reader) == images
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize("index", [-1, 25])
def test_image_reader__refuses_positions_outside_the_plan(
    index: int, parquet: tuple[Path, list[bytes]]
) -> None:
    with pytest.raises(IndexError, match=f"image {index} of a plan of 25 images"):
        ImageReader(list_images(parquet[0])).read(index)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_image_reader__tells_what_happened_to_a_parquet_file(
    limit: int, parquet: tuple[Path, list[bytes]]
) -> None:
    folder, _ = parquet
    plan, place = list_images(folder), folder / "train-1.parquet"
    write_parquet(place, [picture(0)])
    with pytest.raises(
        DamageError, match=r"train-1.parquet has fewer rows than when it was listed"
    ):
        ImageReader(plan, limit).read(24)
    place.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DamageError, match=r"train-1.parquet is not a sound Parquet file"):
        ImageReader(plan, limit).read(24)
    place.unlink()
    with pytest.raises(MissingError, match=r"train-1.parquet cannot be opened"):
        ImageReader(plan, limit).read(24)


def test_image_reader__notices_a_flipped_bit(parquet: tuple[Path, list[bytes]]) -> None:
    folder, images = parquet
    plan, place = list_images(folder), folder / "train-0.parquet"
    data = bytearray(place.read_bytes())
    data[data.index(images[0][-30:-12])] ^= 4
    place.write_bytes(bytes(data))
    with pytest.raises(DamageError, match="not a sound Parquet file"):
        ImageReader(plan).read(0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"]}, "needs a column image, .* its columns are picture: binary"),
        ({"image": ["x"]}, "needs a column image, .* its columns are image: string"),
        ({"image": [{"path": "x"}]}, "needs a column image"),
        ({"image": [b"x"], "label": ["cat"]}, "column label of .* is string: expected integers"),
        ({"image": [b"x"], "label": [-2]}, "column label of .* runs from -2 to -2"),
        ({"image": [b"x"], "label": [1 << 40]}, "column label of .* runs from"),
    ],
)
def test_list_images__names_the_wrong_column(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    with pytest.raises(SettingError, match=message):
        list_images(tmp_path)


def test_list_images__names_the_damaged_parquet_file(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", [picture(0)] * 50).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    with pytest.raises(DamageError, match=r"b.parquet is not a sound Parquet file: fetch or"):
        list_images(tmp_path)
    (tmp_path / "b.parquet").unlink()
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(MissingError, match=r"its 1 files \(a.parquet first\) are empty"):
        list_images(tmp_path)


def test_list_images__classes_are_those_of_all_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-a.parquet", [picture(0), picture(1)], label=[0, 1])
    write_parquet(tmp_path / "val-b.parquet", [picture(2)], label=[4])
    plan = list_images(tmp_path, "train")
    assert plan.keys.tolist() == ["train-a.parquet#0", "train-a.parquet#1"]
    assert plan.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_parquet_images__equal_a_plain_read_of_the_table(
    in_memory: bool, rows: int, tmp_path: Path
) -> None:
    place = write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(13)], rows)
    expected = [image["bytes"] for image in pq.read_table(place)["image"].to_pylist()]
    images = ParquetImages(LocalRoot(str(tmp_path)), in_memory)
    order = np.random.default_rng(0).permutation(13).tolist()
    assert [images.read("a.parquet", row) for row in order] == [expected[row] for row in order]
    with pytest.raises(DamageError, match="fewer rows"):
        images.read("a.parquet", 13)


def test_parquet_images__warm_loads_nothing_that_would_not_be_kept(tmp_path: Path) -> None:
    ParquetImages(LocalRoot(str(tmp_path)), in_memory=False).warm(["absent.parquet"])
    with pytest.raises(MissingError, match=r"absent\.parquet cannot be opened"):
        ParquetImages(LocalRoot(str(tmp_path)), in_memory=True).warm(["absent.parquet"])


@pytest.mark.parametrize("threads", [2, 8])
def test_parquet_images__threads_in_plan_order_read_each_row_group_once(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", [picture(n) for n in range(64)], rows=16)
    plain, loads = ParquetImages._load_group, list[int]()

    def load(self: ParquetImages, path: str, group: int) -> pa.ChunkedArray:
        loads.append(group)
        time.sleep(0.05)  # long enough for all threads to ask meanwhile
        return plain(self, path, group)

    monkeypatch.setattr(ParquetImages, "_load_group", load)
    images = ParquetImages(LocalRoot(str(tmp_path)), in_memory=False)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda row: images.read("a.parquet", row), range(64)))
    assert found == [picture(n) for n in range(64)]
    assert sorted(loads) == [0, 1, 2, 3]
