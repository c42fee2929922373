import os
import weakref
from collections.abc import Collection
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semmae.errors import MissingError, SettingError
from semmae.pipeline import plan_rows
from semmae.pipeline.data_root import FolderListing, LocalRoot
from semmae.pipeline.decoding import BadImage, decode_image
from semmae.pipeline.sources import (
    IMAGE_EXTENSIONS,
    ImageReader,
    Split,
    list_images,
    refuse_among_images,
)


def picture(number: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (4 + number % 3, 4), (number % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def fill(root: Path, *files: str) -> Path:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(picture(number))
    return root


def labels_of(data: Path, split: Split = "all") -> dict[str, int]:
    plan = list_images(data, split)
    return dict(zip(plan.keys.tolist(), plan.labels.tolist(), strict=True))


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


def test_image_reader__reads_plain_files(tmp_path: Path) -> None:
    fill(tmp_path, "a/0.jpg", "a/1.jpg", "b/2.jpg")
    reader = ImageReader(list_images(tmp_path))
    reader.warm()
    assert [reader.read(index) for index in range(3)] == [picture(number) for number in range(3)]
    assert decode_image(reader.read(2))[0, 0].tolist() == [2, 0, 0]


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
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "parquet" / "train-0.parquet")
    missing: list[tuple[str, Split]] = [("plain", "val"), ("split", "train"), ("parquet", "val")]
    for folder, split in missing:
        with pytest.raises(MissingError, match=rf"{folder} has no {split} split: .*split all$"):
            list_images(tmp_path / folder, split)


def test_list_images__refuses_other_files_and_splits(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg")
    with pytest.raises(SettingError, match=r"1.jpg is one file: give a folder"):
        list_images(tmp_path / "1.jpg")
    with pytest.raises(SettingError, match="split is train, val or all, not 'dev'"):
        list_images(tmp_path, "dev")  # type: ignore[arg-type]


def test_list_images__asks_for_one_of_images_and_parquet(tmp_path: Path) -> None:
    fill(tmp_path, "pictures/1.jpg")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(SettingError, match="holds both image files and Parquet files"):
        list_images(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_list_images__asks_to_rename_files_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SettingError, match="not UTF-8: rename it"):
        list_images(tmp_path)


def test_list_images__keeps_few_folders_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, most = 300, 0
    for number in range(folders):
        (tmp_path / f"{number:03d}").mkdir()
        (tmp_path / f"{number:03d}" / "a.jpg").write_bytes(b"?" * number)
    kept: list[weakref.ref[object]] = []
    plain = LocalRoot.scan

    def watched(
        root: LocalRoot, folder: str, endings: Collection[str], sizes: bool = True
    ) -> FolderListing:
        nonlocal most
        listing = plain(root, folder, endings, sizes)
        kept.append(weakref.ref(listing.sizes))
        most = max(most, sum(listed() is not None for listed in kept))
        return listing

    monkeypatch.setattr(LocalRoot, "scan", watched)
    monkeypatch.setattr(plan_rows, "RUN_ROWS", 2)
    found = list_images(tmp_path)
    assert found.sizes.tolist() == list(range(folders))
    assert most < 100


@pytest.mark.parametrize(
    ("output", "split", "refused"),
    [
        *(("run", "train", False), ("run", "val", False), ("run", "all", True)),
        *(("train/cat/run", "train", True), ("val/run", "train", True), (".run", "all", False)),
        *(("../run", "all", False), ("train/../../run", "all", False), (".", "all", False)),
    ],
)
def test_refuse_among_images__unless_it_is_passed_over(
    tmp_path: Path, output: str, split: Split, refused: bool
) -> None:
    data = fill(tmp_path / "data", "train/cat/a.jpg", "val/cat/b.jpg")
    keys = list_images(data, "all").keys.tolist()
    if refused:
        with pytest.raises(SettingError, match="among the images"):
            refuse_among_images(data / output, str(data), split)
        return
    refuse_among_images(data / output, str(data), split)
    if output != ".":
        fill(data / output, "picture.png")
    assert [key for key in list_images(data, split).keys.tolist() if key not in keys] == []


def test_refuse_among_images__without_folders_of_splits_or_behind_urls(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "a.jpg")
    with pytest.raises(SettingError, match=r"--output .*run lies in .*data, among the images"):
        refuse_among_images(data / "run", str(data), "train")
    refuse_among_images(data / "run", "s3://bucket/data", "train")
