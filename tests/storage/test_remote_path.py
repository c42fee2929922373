"""Paths behind URLs, in memory, and in a file system with real folders behind a URL."""

import errno
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from semmae.errors import DamageError, MissingError, SettingError, UserError
from semmae.storage import remote_path, retries
from semmae.storage.files import atomic_file, damage_of, describe, read_json, write_json
from semmae.storage.image_cache import CachedImage, write_image_cache
from semmae.storage.part_check import complete_store, foreign_objects
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard
from semmae.storage.remote_path import RemotePath
from semmae.storage.store_paths import remove_tree, sizes_below, store_path

if TYPE_CHECKING:
    from .conftest import Example


class Folders(LocalFileSystem):  # type: ignore[misc]
    """Local folders behind a URL of their own: no object storage."""

    protocol = "folders"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("folders://")))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = retries.Patience(tries=3, first_wait=0.001, longest_wait=0.002)
    monkeypatch.setattr(retries, "PATIENCE", patience)


@pytest.fixture
def memory() -> Iterator[RemotePath]:
    system = fsspec.filesystem("memory")
    yield RemotePath("memory://bucket")
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "folders"])
def root(request: pytest.FixtureRequest, memory: RemotePath, tmp_path: Path) -> RemotePath:
    """A place in object storage, and one that has folders."""
    fsspec.register_implementation("folders", Folders, clobber=True)
    return memory if request.param == "memory" else RemotePath(f"folders://{tmp_path}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/store/", RemotePath("s3://bucket/store")),
        ("gs://bucket", RemotePath("gs://bucket")),
        ("file:///data/my%20store", Path("/data/my store")),
        ("work/store", Path("work/store")),
    ],
)
def test_store_path__is_a_path_or_a_url(text: str, expected: object) -> None:
    found = store_path(text)
    assert found == expected
    assert type(found) in (RemotePath, type(Path()))


def test_remote_path__speaks_as_pathlib_does(root: RemotePath) -> None:
    file = root / "store" / "plan/a.json"
    assert (file.name, str(file)) == ("a.json", f"{root}/store/plan/a.json")
    assert str(file.with_name("b")) == f"{root}/store/plan/b"
    assert file.absolute() == file == pickle.loads(pickle.dumps(file))
    assert not file.exists()
    assert not (root / "store").is_dir()
    assert list((root / "store").glob("*")) == []
    with pytest.raises(FileNotFoundError) as missing:
        file.read_bytes()
    assert missing.value.filename == str(file)
    file.write_bytes(b"first")
    file.write_bytes(b"content")
    assert (file.read_bytes(), file.read_range(1, 4), file.read_range(5, 99)) == (
        b"content",
        b"ont",
        b"nt",
    )
    assert file.stat().st_size == 7
    assert file.is_file()
    assert not file.is_dir()
    assert (root / "store/plan").is_dir()
    assert [path.name for path in (root / "store").iterdir()] == ["plan"]
    assert list((root / "store/plan").glob("*.json")) == [file]
    assert list((root / "store/plan").glob("*.parquet")) == []
    assert sizes_below(root / "store") == {"plan/a.json": 7}
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    file.write_bytes(b"again")
    remove_tree(root / "store")
    remove_tree(root / "store")
    assert sizes_below(root / "store") == {}


def test_blocks__are_the_whole_file(memory: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_path, "BLOCK", 4)
    for size in (0, 3, 4, 9):
        (memory / "file").write_bytes(bytes(range(size)))
        assert b"".join((memory / "file").blocks()) == bytes(range(size))


@pytest.mark.parametrize("block", [4, 1 << 20])
def test_damage_of__says_what_is_wrong_behind_a_url(
    memory: RemotePath, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semmae.storage.files.BLOCK", block)
    file, known = memory / "file", describe(b"content")
    assert damage_of(file, known) == "is missing"
    for data, wrong in (
        (b"content", None),
        (b"cintent", "has a wrong checksum"),
        (b"cont", "has 4 bytes in place of 7"),
        (b"", "has 0 bytes in place of 7"),
        (b"content and more", "has 16 bytes in place of 7"),
    ):
        file.write_bytes(data)
        assert damage_of(file, known) == wrong


def test_records__behind_a_url_are_checked(memory: RemotePath) -> None:
    with pytest.raises(MissingError, match=r"no record memory://bucket/a\.json"):
        read_json(memory / "a.json")
    write_json(memory / "a.json", {"one": 1})
    assert read_json(memory / "a.json") == {"one": 1}
    (memory / "a.json").write_bytes((memory / "a.json").read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(DamageError, match=r"memory://bucket/a\.json is not what was written"):
        read_json(memory / "a.json")


def test_atomic_file__behind_a_url_stands_when_the_block_ends_well(root: RemotePath) -> None:
    (root / "keep").write_bytes(b"")
    with pytest.raises(FileNotFoundError), atomic_file(root / "file") as temporary:
        temporary.with_name("absent").read_bytes()
    assert not (root / "file").exists()
    with atomic_file(root / "file") as temporary:
        temporary.write_bytes(b"whole")
        assert not (root / "file").exists()
    assert (root / "file").read_bytes() == b"whole"
    assert not temporary.exists()
    assert sorted(sizes_below(root)) == ["file", "keep"]


def test_atomic_file__behind_a_url_has_no_named_file_that_a_kill_would_leave(
    memory: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with atomic_file(memory / "file") as temporary, temporary.open("wb") as file:
        file.write(b"content")
        file.flush()
        assert list(tmp_path.iterdir()) == []
    assert (memory / "file").read_bytes() == b"content"


def test_atomic_file__behind_a_url_says_where_there_is_no_room(
    memory: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = r"memory://bucket/file is put together .*\(No space left.* environment variable TMPDIR"
    with pytest.raises(UserError, match=told), atomic_file(memory / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="TMPDIR"), atomic_file(memory / "file"):
        raise AssertionError("there is no file to write to")
    assert not (memory / "file").exists()


def test_remote_path__asks_again_what_may_pass(
    memory: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tries = MemoryFileSystem.pipe_file, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        tries.append(args)
        if len(tries) % 3:
            raise OSError(errno.EBUSY, "slow down")
        write(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)
    (memory / "file").write_bytes(b"content")
    assert (len(tries), (memory / "file").read_bytes()) == (3, b"content")
    monkeypatch.setattr(retries, "PATIENCE", retries.Patience(tries=2, first_wait=0.001))
    with pytest.raises(UserError, match="storage of memory://bucket/file does not answer: 2 tries"):
        (memory / "file").write_bytes(b"content")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("no"), "memory://bucket/file cannot be written, access is denied: see to"),
        (FileNotFoundError("no"), "cannot write memory://bucket/file: there is no such bucket"),
        (OSError(errno.EINVAL, "odd"), "memory://bucket/file cannot be written: OSError: .*odd"),
    ],
)
def test_write_bytes__says_in_a_sentence_what_was_refused(
    error: OSError, told: str, memory: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    with pytest.raises(UserError, match=told):
        (memory / "file").write_bytes(b"")


def test_remote_path__names_the_package_or_the_kinds_of_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(protocol: str) -> Any:
        raise ImportError(f"no {protocol}")

    with pytest.raises(SettingError, match=r"odd://a/b is a kind of URL that nothing here reads"):
        RemotePath("odd://a/b").exists()
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(SettingError, match=r"s3://a/b needs .*: pip install 'semmae\[s3\]'"):
        RemotePath("s3://a/b").exists()


def test_part_store__behind_a_url_is_that_of_a_folder(
    root: RemotePath,
    finished: Path,
    example: "Example",
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("semmae.storage.mapped_arrays._private_folder", lambda: tmp_path)
    place = root / "store"
    create_store(place, example.identity, example.plan, example.names)
    for shard in (5, 0, 1, 4, 3, 2):
        write_shard(place, shard, *example.content(shard))
    with pytest.raises(DamageError, match=r"store is not complete"):
        PartStore.open(place)
    assert complete_store(place) == complete_store(finished)
    assert foreign_objects(place) == []
    here, there = PartStore.open(finished), PartStore.open(place)
    for name in ("class_attention", "probabilities"):
        mine, other = getattr(there, name)(), getattr(here, name)()
        np.testing.assert_array_equal(mine[:], other[:])
        np.testing.assert_array_equal(mine[11:30, 1], other[11:30, 1])
        np.testing.assert_array_equal(there.shard(name, 5), here.shard(name, 5))
    np.testing.assert_array_equal(there.labels(), here.labels())
    (place / "parts.zarr/probabilities/c/3/0/0/0").unlink()
    with pytest.raises(DamageError, match="probabilities/c/3/0/0/0 is missing or cut"):
        there.probabilities()
    assert there.class_attention().shape[0] == example.identity.images


def test_create_store__behind_a_url_refuses_what_is_not_its_own(
    memory: RemotePath, example: "Example"
) -> None:
    place = memory / "store"
    (place / "notes.txt").write_bytes(b"mine")
    with pytest.raises(SettingError, match=r"memory://bucket/store is not empty .*notes\.txt"):
        create_store(place, example.identity, example.plan, example.names)
    with pytest.raises(SettingError, match=r"notes\.txt is a file; name a folder"):
        create_store(place / "notes.txt", example.identity, example.plan, example.names)
    (place / "notes.txt").unlink()
    (place / "plan/part-00000.parquet").write_bytes(b"left by a set-up that was broken off")
    create_store(place, example.identity, example.plan, example.names)
    create_store(place, example.identity, example.plan, example.names)
    assert foreign_objects(place) == []


def test_image_cache__behind_a_url_finds_damage(memory: RemotePath, example: "Example") -> None:
    place = memory / "store"
    identity = replace(
        example.identity,
        images=8,
        attention_heads=0,
        probabilities=False,
        image_cache="raw",
        image_cache_side=4,
        image_cache_recipe="none",
    )
    create_store(place, identity, example.plan.slice(0, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), dtype=np.uint8)
    with write_image_cache(place, identity, 0) as cache:
        assert cache is not None
        cache.extend(None if n == 3 else CachedImage(image, 4, 5) for n, image in enumerate(pixels))
    labels, meta, _, _ = example.content(0, identity)
    write_shard(place, 0, labels, meta, image_cache=cache.description)
    complete_store(place)
    images = PartStore.open(place).image_cache()
    again = pickle.loads(pickle.dumps(images))
    again.warm()
    np.testing.assert_array_equal(again.read(7), pixels[7])
    with pytest.raises(MissingError, match=r"image 3 .* was bad"):
        images.read(3)
    file = place / "images/00000.raw"
    sound = file.read_bytes()
    file.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with pytest.raises(DamageError, match=r"image 0 .* is not what was written"):
        images.read(0)
    np.testing.assert_array_equal(images.read(1), pixels[1])
    for damaged in (sound[:-1], b"", None):
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(DamageError, match=r"00000\.raw .*(missing or cut|footer is damaged)"):
            PartStore.open(place).image_cache().read(0)
