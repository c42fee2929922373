import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from semmae.errors import DamageError, MissingError, SettingError
from semmae.pipeline.sources import ImageReader, Split, list_images
from semmae.tests.pipeline.images import picture, write_tar


def named(count: int, *, first: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{number:05d}.jpg", picture(number)) for number in range(first, first + count)]


def with_class(number: int, label: int) -> list[tuple[str, bytes]]:
    return [(f"{number:05d}.jpg", picture(number)), (f"{number:05d}.cls", str(label).encode())]


def read_all(folder: Path, split: Split = "all") -> dict[str, bytes]:
    plan = list_images(folder, split)
    reader = ImageReader(plan)
    order = np.random.default_rng(0).permutation(len(plan)).tolist()
    data = {str(plan.keys[index]): reader.read(index) for index in order}
    return {key: data[key] for key in plan.keys}


def test_list_images__indexes_tars_by_path_and_position(tmp_path: Path) -> None:
    write_tar(tmp_path / "b-1.tar", named(3))
    write_tar(tmp_path / "b-0.tar", [*reversed(named(2)), ("notes.txt", b"none")])
    plan = list_images(tmp_path)
    keys = ["b-0.tar#00001.jpg", "b-0.tar#00000.jpg", *(f"b-1.tar#{n:05d}.jpg" for n in range(3))]
    assert plan.keys.tolist() == keys
    assert plan.table["path"].to_pylist() == ["b-0.tar"] * 2 + ["b-1.tar"] * 3
    assert plan.table["row"].to_pylist() == [0, 1, 0, 1, 2]
    assert plan.sizes.tolist() == [len(picture(n)) for n in (1, 0, 0, 1, 2)]
    assert (plan.root, plan.class_names) == (str(tmp_path), ())
    assert plan.labels.tolist() == [-1] * 5
    assert list(read_all(tmp_path).values()) == [picture(n) for n in (1, 0, 0, 1, 2)]
    with tarfile.open(tmp_path / "b-1.tar") as archive:
        offsets = [member.offset_data for member in archive.getmembers()]
    assert plan.table["offset"].to_pylist()[2:] == offsets


def test_list_images__takes_a_single_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "mine.tar", named(2))
    write_tar(tmp_path / "other.tar", named(2))
    plan = list_images(tmp_path / "mine.tar")
    assert (plan.root, plan.keys[1]) == (str(tmp_path), "mine.tar#00001.jpg")
    assert ImageReader(plan).read(1) == picture(1)


def test_list_images__reads_classes_of_tars(tmp_path: Path) -> None:
    sample = [*with_class(0, 4), *with_class(1, 0)[::-1], *named(1, first=2)]
    told = json.dumps({"label": 2, "url": "x"}).encode()
    untold = json.dumps({"label": "cat"}).encode()
    sample += [*named(1, first=3), ("00003.json", told)]
    sample += [*named(1, first=4), ("00004.json", untold), ("00004.txt", b"a cat")]
    write_tar(tmp_path / "train-0.tar", sample)
    write_tar(tmp_path / "val-0.tar", with_class(9, 6))
    plan = list_images(tmp_path, "train")
    assert plan.labels.tolist() == [4, 0, -1, 2, -1]
    assert plan.class_names == tuple("0123456")
    assert list_images(tmp_path, "val").class_names == plan.class_names
    (tmp_path / "classes.txt").write_text("".join(f"n{n}\tkind {n}\n" for n in range(7)))
    assert list_images(tmp_path, "train").class_names[4] == "kind 4"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["a/b.c/0.jpg", "a/b.c/0.cls", "a/0.jpg"], ["a/b.c/0.jpg", "a/0.jpg"]),
        (["./a/0.jpg", "./a/1.PNG"], ["a/0.jpg", "a/1.PNG"]),
        (["0.seg.png", "0.jpg"], ["0.jpg"]),
        (["0.input.jpg", "0.txt"], ["0.input.jpg"]),
        (["._0.jpg", ".hidden/1.jpg", "2.jpg"], ["2.jpg"]),
        (["0.txt", "1.jpg"], ["1.jpg"]),
        ([f"{'long/' * 30}0.jpg"], [f"{'long/' * 30}0.jpg"]),
        (["ü/ö.jpg"], ["ü/ö.jpg"]),
    ],
)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_list_images__finds_one_image_a_sample(
    members: list[str], expected: list[str], format: int, tmp_path: Path
) -> None:
    content = [(name, b"7" if name.endswith(".cls") else picture(3)) for name in members]
    write_tar(tmp_path / "a.tar", content, format)
    found = read_all(tmp_path)
    assert found == {f"a.tar#{name}": picture(3) for name in expected}


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train-000", "val-000"], "train", ["train-000"]),
        (["imagenet-train-000000", "imagenet-val-000000"], "train", ["imagenet-train-000000"]),
        (["imagenet-train-000000", "imagenet-val-000000"], "val", ["imagenet-val-000000"]),
        (["train-0", "test-0"], "val", ["test-0"]),
        (["train/0", "train/1", "val/0"], "train", ["train/0", "train/1"]),
        (["a", "b"], "train", ["a", "b"]),
        (["train-0", "val-0"], "all", ["train-0", "val-0"]),
    ],
)
def test_list_images__chooses_the_tars_of_a_split(
    files: list[str], split: Split, expected: list[str], tmp_path: Path
) -> None:
    for file in files:
        write_tar(tmp_path / f"{file}.tar", named(1))
    keys = list_images(tmp_path, split).keys.tolist()
    assert keys == [f"{name}.tar#00000.jpg" for name in expected]


def test_fingerprint__of_tars_packed_anew_with_other_members_stays(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", named(3))
    before = list_images(tmp_path)
    write_tar(tmp_path / "a.tar", [pair for one in named(3) for pair in (("x.txt", b"y"), one)])
    after = list_images(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.table["offset"] != before.table["offset"]
    assert ImageReader(after).read(2) == picture(2)
    with pytest.raises(DamageError, match=r"a.tar does not hold 00002.jpg where it lay when it"):
        ImageReader(before).read(2)


def test_image_reader__tells_what_happened_to_a_tar(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "a.tar", named(3))
    plan, whole = list_images(tmp_path), place.read_bytes()
    offset = plan.table["offset"].to_pylist()[2]
    place.write_bytes(whole[: offset + 10])
    assert ImageReader(plan).read(0) == picture(0)
    for length in (offset + 10, offset, offset - 600):
        place.write_bytes(whole[:length])
        with pytest.raises(DamageError, match=r"does not hold 00002\.jpg"):
            ImageReader(plan).read(2)
    (tmp_path / "other").touch()
    place.unlink()
    with pytest.raises(MissingError, match=r"a\.tar cannot be opened: No such file"):
        ImageReader(plan).read(2)


def boundaries(place: Path) -> Sequence[int]:
    """Lengths to which a tar of three images may be cut: in a header, in an image, between."""
    with tarfile.open(place) as archive:
        last = archive.getmembers()[-1]
    return (last.offset, last.offset + 100, last.offset_data, last.offset_data + 20)


@pytest.mark.parametrize("cut", range(4))
def test_list_images__refuses_a_truncated_tar(cut: int, tmp_path: Path) -> None:
    place = write_tar(tmp_path / "a.tar", named(3))
    length = boundaries(place)[cut]
    place.write_bytes(place.read_bytes()[:length])
    with pytest.raises(DamageError, match=r"a.tar is (cut off|no sound tar).*fetch or write"):
        list_images(tmp_path)


def test_list_images__refuses_what_only_looks_like_a_tar(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "a.tar", named(3))
    data = bytearray(place.read_bytes())
    data[boundaries(place)[0] + 3] ^= 1
    place.write_bytes(data)
    with pytest.raises(DamageError, match=r"a.tar is cut off or damaged at byte"):
        list_images(tmp_path)
    place.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DamageError, match=r"a.tar is no sound tar"):
        list_images(tmp_path)
    place.write_bytes(b"")
    with pytest.raises(DamageError, match=r"a.tar is no sound tar"):
        list_images(tmp_path)


def test_list_images__refuses_tars_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("notes.txt", b"none")])
    with pytest.raises(MissingError, match=r"holds no images for split all: its 2 files \(a.tar"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "A.TAR.ZST"])
def test_list_images__refuses_compressed_tars(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w"):
        pass
    (tmp_path / name).write_bytes(gzip.compress(stream.getvalue()))
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(SettingError, match=f"{name} is a compressed tar.*: unpack it"):
            list_images(data)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x"), ("0.cls", b"cat")], r"0\.cls in .*a\.tar is 'cat': expected a class"),
        ([("0.jpg", b"x"), ("0.cls", b"-7")], r"the classes of .*a\.tar runs from -7"),
        ([("0.jpg", b"x"), ("0.json", b"{")], r"0\.json in .*a\.tar is no valid JSON"),
        ([("0.jpg", b"x"), ("1.jpg", b"y"), ("0.jpg", b"z")], r"a\.tar holds 0\.jpg twice"),
    ],
)
def test_list_images__says_what_is_wrong_in_a_tar(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(SettingError, match=message):
        list_images(tmp_path)


def test_list_images__asks_for_one_of_images_and_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", named(1))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.jpg").write_bytes(picture(0))
    with pytest.raises(SettingError, match="holds both image files and tar files: give the folder"):
        list_images(tmp_path)


def test_list_images__of_images_does_not_mind_compressed_tars_beside(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "devkit.tar.gz").write_bytes(b"whatever")
    assert list_images(tmp_path).keys.tolist() == ["cat/0.jpg"]


def test_list_images__of_tars_minds_compressed_ones_beside(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", named(1))
    (tmp_path / "b.tar.gz").write_bytes(b"whatever")
    with pytest.raises(SettingError, match=r"b\.tar\.gz is a compressed tar"):
        list_images(tmp_path)
