import os
import pickle
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from semmae.errors import DamageError, MissingError, SettingError
from semmae.pipeline.decoding import BadImage, decode_image
from semmae.pipeline.sources import IMAGE_EXTENSIONS, ImageReader, Split, list_images


def picture(number: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (4 + number % 3, 4), (number % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def fill(root: Path, *files: str) -> Path:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(picture(number))
    return root


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


def labels_of(data: Path, split: Split = "all") -> dict[str, int]:
    plan = list_images(data, split)
    return dict(zip(plan.keys.tolist(), plan.labels.tolist(), strict=True))


# Folders.


def test_list_images__finds_what_a_plain_walk_finds(tmp_path: Path) -> None:
    fill(tmp_path, "b.JPG", "a/x.jpeg", "a/deep/er/y.Png", "a-b/z.webp", "ü/ö.tif", "B/q.gif")
    fill(tmp_path, ".hidden/h.jpg", "a/.h.jpg", "a/notes.txt", "a/jpg", "a/archive.jpg.gz")
    expected = [
        path
        for path in tmp_path.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(tmp_path).parts)
    ]
    keys = sorted((path.relative_to(tmp_path).as_posix() for path in expected), key=str.encode)
    plan = list_images(tmp_path)
    assert len(keys) == 6
    assert plan.keys.tolist() == keys == plan.table["path"].to_pylist()
    assert plan.sizes.tolist() == [(tmp_path / key).stat().st_size for key in keys]
    assert set(plan.table["row"].to_pylist()) == {-1}
    assert plan.root == str(tmp_path)


def test_list_images__labels_by_first_level_folder(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.jpg", "ant/deep/2.jpg", "bee/3.jpg")
    assert labels_of(tmp_path) == {"ant/deep/2.jpg": 0, "bee/3.jpg": 1, "cat/1.jpg": 2}
    assert list_images(str(tmp_path)).class_names == ("ant", "bee", "cat")
    assert labels_of(tmp_path, "train") == labels_of(tmp_path)


def test_list_images__gives_no_labels_where_images_lie_beside_folders(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg", "more/2.jpg")
    assert labels_of(tmp_path) == {"1.jpg": -1, "more/2.jpg": -1}
    assert list_images(tmp_path).class_names == ()


def test_list_images__has_the_same_classes_in_every_split(tmp_path: Path) -> None:
    fill(tmp_path, "train/bee/1.jpg", "train/cat/2.jpg", "val/ant/3.jpg", "val/cat/4.jpg")
    fill(tmp_path, "extra/dog/5.jpg")
    plans = {split: list_images(tmp_path, split) for split in ("train", "val", "all")}
    assert {plan.class_names for plan in plans.values()} == {("ant", "bee", "cat")}
    train = {"train/bee/1.jpg": 1, "train/cat/2.jpg": 2}
    val = {"val/ant/3.jpg": 0, "val/cat/4.jpg": 2}
    assert labels_of(tmp_path, "train") == train
    assert labels_of(tmp_path, "val") == val
    assert labels_of(tmp_path, "all") == {"extra/dog/5.jpg": -1, **train, **val}


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["train", "val", "test"], "val", ["val"]),
        (["train", "test"], "val", ["test"]),
        (["training", "validation"], "train", ["training"]),
        (["training", "validation"], "val", ["validation"]),
        (["Train", "Valid"], "val", ["Valid"]),
        (["train", "val", "test"], "all", ["test", "train", "val"]),
        (["bird", "dog"], "train", ["bird", "dog"]),
    ],
)
def test_list_images__chooses_the_split_folder(
    folders: list[str], split: Split, expected: list[str], tmp_path: Path
) -> None:
    fill(tmp_path, *(f"{folder}/1.jpg" for folder in folders))
    assert list_images(tmp_path, split).keys.tolist() == [f"{name}/1.jpg" for name in expected]


def test_list_images__takes_the_images_of_an_ade20k_layout(tmp_path: Path) -> None:
    fill(tmp_path, "images/training/1.jpg", "images/validation/2.jpg", "annotations/training/1.png")
    for data in (tmp_path, tmp_path / "images"):
        plan = list_images(data, "train")
        assert (plan.root, plan.keys.tolist()) == (str(tmp_path / "images"), ["training/1.jpg"])
        assert list_images(data).labels.tolist() == [-1, -1]


def test_list_images__keeps_damaged_files_and_dead_links_in_the_plan(tmp_path: Path) -> None:
    fill(tmp_path, "a/good.png")
    (tmp_path / "a" / "empty.jpg").touch()
    (tmp_path / "a" / "text.jpg").write_text("no image")
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    plan = list_images(tmp_path)
    assert plan.keys.tolist() == ["a/empty.jpg", "a/gone.jpg", "a/good.png", "a/text.jpg"]
    assert plan.sizes.tolist() == [0, 0, len(picture(0)), 8]
    with pytest.raises(BadImage, match="unreadable: No such file"):
        ImageReader(plan).read(1)


def test_list_images__follows_links_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "store", "n1/1.jpg", "loose.jpg")
    data = tmp_path / "data"
    (data / "n2").mkdir(parents=True)
    (data / "n1").symlink_to(tmp_path / "store" / "n1")
    (data / "n2" / "2.jpg").symlink_to(tmp_path / "store" / "loose.jpg")
    (data / "n2" / "up").symlink_to(data)
    assert labels_of(data) == {"n1/1.jpg": 0, "n2/2.jpg": 1}


def test_list_images__does_not_depend_on_where_the_data_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("one", "two"):
        fill(tmp_path / place, "a/1.jpg", "b/2.jpg")
    monkeypatch.chdir(tmp_path)
    assert list_images("one").fingerprint == list_images(tmp_path / "two").fingerprint
    assert Path(list_images("one").root).is_absolute()


# Parquet.


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


# Reading.


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


def test_image_reader__reads_plain_files(tmp_path: Path) -> None:
    fill(tmp_path, "a/0.jpg", "a/1.jpg", "b/2.jpg")
    reader = ImageReader(list_images(tmp_path))
    reader.warm()
    assert [reader.read(index) for index in range(3)] == [picture(number) for number in range(3)]
    assert decode_image(reader.read(2))[0, 0].tolist() == [2, 0, 0]


def test_image_reader__serves_from_memory_once_warm(parquet: tuple[Path, list[bytes]]) -> None:
    folder, images = parquet
    reader = ImageReader(list_images(folder))
    reader.warm()
    for file in folder.glob("*.parquet"):
        file.unlink()
    assert read_all(reader) == images


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


# Users' mistakes.


def test_list_images__says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere does not exist: give a folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(
        MissingError, match=r"holds no images for split all: looked for \.bmp \.gif"
    ):
        list_images(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(MissingError, match="holds no images"):
        list_images(tmp_path, "train")


def test_list_images__says_which_split_is_missing(tmp_path: Path) -> None:
    fill(tmp_path / "plain", "a/1.jpg")
    fill(tmp_path / "split", "val/1.jpg")
    write_parquet(tmp_path / "parquet" / "train-0.parquet", [picture(0)])
    missing: list[tuple[str, Split]] = [("plain", "val"), ("split", "train"), ("parquet", "val")]
    for folder, split in missing:
        with pytest.raises(MissingError, match=rf"{folder} has no {split} split: .*split all$"):
            list_images(tmp_path / folder, split)


def test_list_images__reads_local_data_only(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="s3://bucket/images is a URL, but only local"):
        list_images("s3://bucket/images")
    fill(tmp_path, "1.jpg")
    with pytest.raises(SettingError, match=r"1.jpg is one file: give a folder"):
        list_images(tmp_path / "1.jpg")
    with pytest.raises(SettingError, match="split is train, val or all, not 'dev'"):
        list_images(tmp_path, "dev")  # type: ignore[arg-type]


def test_list_images__asks_for_one_of_images_and_parquet(tmp_path: Path) -> None:
    fill(tmp_path, "pictures/1.jpg")
    write_parquet(tmp_path / "data" / "train-0.parquet", [picture(0)])
    with pytest.raises(SettingError, match="holds both image files and Parquet files"):
        list_images(tmp_path)


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
    with pytest.raises(MissingError, match="its Parquet files are empty"):
        list_images(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_list_images__asks_to_rename_files_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SettingError, match="not UTF-8: rename it"):
        list_images(tmp_path)
