import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry

from semmae.errors import MismatchError, MissingError, SettingError, UserError
from semmae.pipeline.data_root import DataRoot, LocalRoot
from semmae.pipeline.decoding import BadImage
from semmae.pipeline.remote import RemoteRoot, locate, open_root
from semmae.pipeline.sources import ImageReader, Split, list_images
from semmae.storage import retries
from semmae.tests.pipeline.images import picture, write_forms

IMAGES = [picture(number) for number in range(9)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = retries.Patience(tries=3, first_wait=0.001, longest_wait=0.002)
    monkeypatch.setattr(retries, "PATIENCE", patience)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Copies a folder into fsspec's memory; gives the URL of the copy."""
    store = fsspec.filesystem("memory")

    def copied(folder: Path) -> str:
        for file in folder.rglob("*"):
            if file.is_file():
                store.pipe_file(f"/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
        return f"memory://{folder.relative_to(tmp_path).as_posix()}"

    yield copied
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("form", ["folder", "parquet", "tars"])
@pytest.mark.parametrize("split", ["train", "all"])
def test_list_images__of_a_url_is_that_of_the_same_local_data(
    form: str, split: Split, memory: Callable[[Path], str], tmp_path: Path
) -> None:
    place = write_forms(tmp_path, IMAGES)[form]
    local, plan = list_images(place, split), list_images(memory(place) + "/", split)
    assert plan.root == f"memory://{form}"
    assert plan.table.equals(local.table)
    assert plan.class_names == local.class_names
    there, here = ImageReader(plan, 0), ImageReader(local, 0)
    assert [there.read(index) for index in range(9)] == [here.read(index) for index in range(9)]


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_list_images__takes_the_url_of_one_file(
    form: str, memory: Callable[[Path], str], tmp_path: Path
) -> None:
    place = write_forms(tmp_path, IMAGES)[form]
    memory(place)
    (first, _) = sorted(place.iterdir())
    plan = list_images(f"memory://{form}/{first.name}")
    assert (plan.root, len(plan)) == (f"memory://{form}", 4)
    assert ImageReader(plan).read(3) == IMAGES[3]
    assert list_images(first.as_uri()).fingerprint == plan.fingerprint


def test_list_images__of_a_url_skips_hidden_names_and_takes_classes_txt(
    memory: Callable[[Path], str], tmp_path: Path
) -> None:
    forms = write_forms(tmp_path, IMAGES)
    (forms["folder"] / "train" / "class-0" / ".hidden.png").write_bytes(IMAGES[0])
    assert len(list_images(memory(forms["folder"]))) == 9
    (forms["tars"] / "classes.txt").write_text("a\tcat\nb\tdog\n")
    assert list_images(memory(forms["tars"])).class_names == ("cat", "dog")


def test_locate__says_what_is_wrong_with_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match=r"memory://nowhere does not exist: give a folder"):
        list_images("memory://nowhere")
    with pytest.raises(SettingError, match=r"sftx://x is a kind of URL that nothing here reads"):
        list_images("sftx://x")
    for protocol, package, extra in (("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")):
        monkeypatch.delitem(_registry, protocol, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SettingError, match=rf"not installed: pip install 'semmae\[{extra}\]'"):
            list_images(f"{protocol}://bucket/images")


@pytest.fixture(params=["local", "memory"])
def root(
    request: pytest.FixtureRequest, memory: Callable[[Path], str], tmp_path: Path
) -> tuple[DataRoot, Path]:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.bin").write_bytes(bytes(range(200)))
    (tmp_path / "d" / "sub" / "b.JPG").write_bytes(b"1234567")
    url = memory(tmp_path / "d")
    here = open_root(url if request.param == "memory" else str(tmp_path / "d"))
    assert isinstance(here, RemoteRoot if request.param == "memory" else LocalRoot)
    return here, tmp_path / "d"


def test_data_root__reads_and_lists_alike_here_and_there(root: tuple[DataRoot, Path]) -> None:
    here, _ = root
    assert here.read("a.bin") == bytes(range(200))
    assert here.read("a.bin", 10, 20) == bytes(range(10, 20))
    assert here.read("a.bin", 190, 900) == bytes(range(190, 200))
    assert here.read("a.bin", 7, 7) == b""
    top, sub = here.scan("", {".bin"}), here.scan("sub", {".jpg"})
    assert (top.files.to_pylist(), top.sizes.tolist(), top.folders) == (["a.bin"], [200], ["sub"])
    assert (sub.files.to_pylist(), sub.sizes.tolist(), sub.folders) == (["sub/b.JPG"], [7], [])
    assert here.scan("", {".jpg"}).files.to_pylist() == []
    assert here.status("none") is None
    for path in ("none", "sub"):
        with pytest.raises(FileNotFoundError, match=f"{path} is no file"):
            here.open(path)
    with pytest.raises(MissingError, match=r"none cannot be listed \(.*\): make it readable"):
        here.scan("none", {".jpg"})


@pytest.mark.parametrize("read_ahead", [1, 16, 1000])
def test_data_root__opens_files_to_seek_in(read_ahead: int, root: tuple[DataRoot, Path]) -> None:
    with root[0].open("a.bin", read_ahead) as file:
        assert file.read(5) == bytes(range(5))
        assert file.seek(100) == 100
        assert file.read(3) == bytes(range(100, 103))
        assert file.seek(-2, os.SEEK_END) == 198
        assert file.read() == bytes((198, 199))
        assert file.read(1) == b""
        assert (file.seek(500), file.read(1)) == (500, b"")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
@pytest.mark.parametrize("form", ["folder", "parquet", "tars"])
def test_image_reader__a_failing_mount_is_no_bad_image(
    number: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = list_images(write_forms(tmp_path, IMAGES)[form])
    read, failures = LocalRoot._read, [OSError(number, os.strerror(number))] * 2

    def failing(root: LocalRoot, path: str, start: int, stop: int | None) -> bytes:
        if failures:
            raise failures.pop()
        return read(root, path, start, stop)

    monkeypatch.setattr(LocalRoot, "_read", failing)
    assert ImageReader(plan).read(0) == IMAGES[0]
    failures += [OSError(number, os.strerror(number))] * 3
    with pytest.raises(UserError, match=r"storage of .* does not answer: 3 tries.*mount") as met:
        ImageReader(plan).read(0)
    assert not isinstance(met.value, OSError)
    assert failures == []


def fail(monkeypatch: pytest.MonkeyPatch, number: int, *paths: str) -> list[str]:
    """Have the system refuse to read files, all without any named; gives what is asked for."""
    read, asked = LocalRoot._read, list[str]()

    def failing(root: LocalRoot, path: str, start: int, stop: int | None) -> bytes:
        asked.append(path)
        if not paths or path.endswith(paths):
            raise OSError(number, os.strerror(number))
        return read(root, path, start, stop)

    monkeypatch.setattr(LocalRoot, "_read", failing)
    return asked


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
@pytest.mark.parametrize("alone_in_folder", [False, True])
def test_image_reader__a_file_that_its_disk_has_lost_is_a_bad_image_said_once(
    number: int, alone_in_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(0), picture(1)] if alone_in_folder else IMAGES
    reader = ImageReader(list_images(write_forms(tmp_path, images)["folder"]))
    lost = str(reader.plan.keys[0])
    asked = fail(monkeypatch, number, lost)
    told = []
    for tries in (4, 4):  # three, and one after another file was read
        with pytest.raises(BadImage, match="unreadable: its disk has lost it") as bad:
            reader.read(0)
        told.append((bad.value.message, bad.value.kind))
        assert asked.count(lost) + sum(path.endswith("/" + lost) for path in asked) == tries
    assert told == [("its disk has lost it", "OSError")] * 2
    assert reader.read(1)


def test_image_reader__a_lost_disk_is_told_from_a_lost_file_whatever_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ImageReader(list_images(write_forms(tmp_path, IMAGES)["folder"]))
    dropped, drop = [], os.posix_fadvise
    asked = fail(monkeypatch, errno.EIO)

    def dropping(file: int, start: int, length: int, advice: int) -> None:
        dropped.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        drop(file, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", dropping)
    with pytest.raises(UserError, match=r"storage of .* does not answer: 3 tries"):
        reader.read(0)
    others = [path for path in asked if path != reader.plan.keys[0]]
    assert others == dropped
    assert len(set(others)) > 3


def test_image_reader__many_lost_files_are_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(number) for number in range(20)]
    reader = ImageReader(list_images(write_forms(tmp_path, images)["folder"]))
    fail(monkeypatch, errno.EIO, *(str(key) for key in reader.plan.keys[1:10]))
    for number in range(1, 9):
        with pytest.raises(BadImage, match="its disk has lost it"):
            reader.read(number)
    told = rf"lost 9 images \({reader.plan.keys[1]}, .*, {reader.plan.keys[9]}\), too many"
    with pytest.raises(UserError, match=told):
        reader.read(9)
    assert reader.read(0)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_image_reader__what_is_said_of_mounts_alone_is_no_bad_image(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ImageReader(list_images(write_forms(tmp_path, IMAGES)["folder"]))
    fail(monkeypatch, number, str(reader.plan.keys[0]))
    with pytest.raises(UserError, match=r"storage of .* does not answer"):
        reader.read(0)


def test_image_reader__files_of_another_disk_say_nothing_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_forms(tmp_path, IMAGES[:2])["folder"]
    reader = ImageReader(list_images(place))
    fail(monkeypatch, errno.EIO, str(reader.plan.keys[0]))
    plain, own = Path.stat, place / str(reader.plan.keys[0])

    class Elsewhere:
        st_dev = -1

    def stat(path: Path, **options: bool) -> object:
        return Elsewhere if path == own else plain(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match=r"storage of .* does not answer"):
        reader.read(0)


def test_image_reader__one_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    place = write_forms(tmp_path, IMAGES)["folder"]
    reader = ImageReader(list_images(place))
    gone = place / str(reader.plan.keys[0])
    gone.unlink()
    gone.mkdir()
    for kind in ("IsADirectoryError", "FileNotFoundError"):
        with pytest.raises(BadImage, match="unreadable") as bad:
            reader.read(0)
        assert bad.value.kind == kind
        if gone.exists():
            gone.rmdir()


@pytest.mark.parametrize("empty", [False, True])
def test_image_reader__a_lost_folder_is_no_bad_image(empty: bool, tmp_path: Path) -> None:
    place = write_forms(tmp_path, IMAGES)["folder"]
    reader = ImageReader(list_images(place))
    place.rename(tmp_path / "elsewhere")
    if empty:  # what a lost mount leaves
        place.mkdir()
    with pytest.raises(MissingError, match=r"class-\d is gone or empty, though .*: mount it again"):
        reader.read(0)


@pytest.mark.parametrize("empty", [False, True])
def test_image_reader__a_lost_folder_inside_is_no_bad_image(empty: bool, tmp_path: Path) -> None:
    place = write_forms(tmp_path, IMAGES)["folder"]
    reader = ImageReader(list_images(place))
    lost = place / "train" / "class-1"
    keys = list(reader.plan.keys)
    inside, outside = (
        next(index for index, key in enumerate(keys) if key.startswith(f"train/class-{number}"))
        for number in (1, 0)
    )
    lost.rename(tmp_path / "elsewhere")
    if empty:  # what a lost mount leaves
        lost.mkdir()
    with pytest.raises(MissingError, match=r"train/class-1 is gone or empty, though"):
        reader.read(inside)
    assert reader.read(outside)


def test_image_reader__a_file_of_another_size_than_listed_is_refused(tmp_path: Path) -> None:
    place = write_forms(tmp_path, IMAGES)["folder"]
    reader = ImageReader(list_images(place))
    file = place / str(reader.plan.keys[0])
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(MismatchError, match=f"has {size + 1} bytes, and had {size} when it was"):
        reader.read(0)


def test_locate__finds_the_folder_of_a_file_at_the_top(memory: Callable[[Path], str]) -> None:
    fsspec.filesystem("memory").pipe_file("/a.tar", b"x")
    root, name = locate("memory://a.tar")
    assert (root.root, name) == ("memory://", "a.tar")
    assert root.read("a.tar") == b"x"
    assert root.place("a.tar") == "memory://a.tar"


def test_remote_root__denied_access_is_no_missing_image(
    memory: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = memory(write_forms(tmp_path, IMAGES)["folder"])
    reader = ImageReader(list_images(url))
    store = type(fsspec.filesystem("memory"))

    def denied(*arguments: object, **settings: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(store, "cat_file", denied)
    with pytest.raises(BadImage, match="unreadable: Permission denied"):
        reader.read(0)
    monkeypatch.setattr(store, "ls", denied)
    with pytest.raises(MissingError, match=r"memory://folder cannot be listed \(access denied\)"):
        list_images(url)
    monkeypatch.setattr(store, "info", denied)
    with pytest.raises(MissingError, match=r"access to memory://folder is denied: give this user"):
        list_images(url)
    with pytest.raises(MissingError, match=r"memory://folder is gone or empty"):  # expired rights
        reader.read(0)
