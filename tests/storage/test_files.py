import errno
import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.errors import DamageError, MissingError, UserError
from semmae.storage import files

RECORD = {"b": [1, 2.5, None, True], "a": {"z": "\u00e9", "y": 1e-7}, "kind": "knn"}


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.rglob("*"))


def test_write_atomically__makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    files.write_atomically(path, b"old")
    files.write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert listing(tmp_path) == ["a", "b", "file.bin"]


@pytest.mark.parametrize("times", [1, 2])
def test_write_atomically__writes_again_when_its_temporary_file_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Another run may complete the same store meanwhile; what keeps vanishing is told."""
    path, sync = tmp_path / "file.bin", files._sync
    swept: list[Path] = []

    def sweep_first(place: Path, flags: int) -> None:
        if place.is_file() and len(swept) < times:
            swept.append(place)
            place.unlink()
        sync(place, flags)

    monkeypatch.setattr(files, "_sync", sweep_first)
    if times == 1:
        files.write_atomically(path, b"content")
        assert path.read_bytes() == b"content"
    else:
        with pytest.raises(UserError, match=r"file\.bin"):
            files.write_atomically(path, b"content")
    assert len(swept) == times


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_atomic_file__keeps_the_old_file_when_the_block_fails(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file.bin"]


def test_atomic_file__temporary_is_hidden_unique_and_beside_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with files.atomic_file(path) as first, files.atomic_file(path) as second:
        first.write_bytes(b"1")
        second.write_bytes(b"2")
        assert first != second
        assert {first.parent, second.parent} == {tmp_path}
        assert first.name.startswith(".")
        assert not path.exists()
    # The outer block ends last.
    assert path.read_bytes() == b"1"


def test_atomic_file__leaves_errors_of_other_files_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="elsewhere") as caught,
        files.atomic_file(tmp_path / "file.bin"),
    ):
        (tmp_path / "elsewhere" / "image.jpg").read_bytes()
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "can be written to")]
)
def test_write_atomically__says_what_to_do_when_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def refuse(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(code, "refused", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError) as caught:
        files.write_atomically(path, b"new")
    assert str(path) in str(caught.value)
    assert advice in str(caught.value)
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file.bin"]


def test_write_atomically__names_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="another folder"):
        files.write_atomically(tmp_path / "file" / "inner", b"")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000])
def test_file_crc32__equals_that_of_the_whole(tmp_path: Path, size: int) -> None:
    data = bytes(i * 31 % 251 for i in range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert files.file_crc32(tmp_path / "file") == zlib.crc32(data[:size])


def test_write_json__layout_is_sorted_with_the_documented_checksum(tmp_path: Path) -> None:
    files.write_json(tmp_path / "r.json", RECORD)
    text = (tmp_path / "r.json").read_text()
    stored = json.loads(text)
    crc = stored.pop("crc32")
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    assert crc == zlib.crc32(canonical.encode())
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(record=st.dictionaries(st.text().filter(lambda t: t != "crc32"), json_values, max_size=4))
@settings(max_examples=40, deadline=None)
def test_json__round_trip_is_exact(
    record: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "r.json"
    files.write_json(path, record)
    first = path.read_bytes()
    assert files.read_json(path) == record
    files.write_json(path, dict(reversed(record.items())))
    assert path.read_bytes() == first


def test_json__keys_that_are_numbers_become_strings(tmp_path: Path) -> None:
    files.write_json(tmp_path / "r.json", {"by_shard": {10: 1, 9: 2}, "pair": (1, 2)})
    assert files.read_json(tmp_path / "r.json") == {"by_shard": {"10": 1, "9": 2}, "pair": [1, 2]}


def test_read_json__finds_every_single_bit_flip(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    files.write_json(path, RECORD)
    sound = path.read_bytes()
    for place in range(len(sound)):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamageError, match=r"r\.json"):
                files.read_json(path)
    for cut in range(0, len(sound), 7):
        path.write_bytes(sound[:cut])
        with pytest.raises(DamageError):
            files.read_json(path)


@pytest.mark.parametrize("text", ["[1]", "3", '{"a": 1}', '{"crc32": NaN}', "\u00e9", "[" * 99999])
def test_read_json__refuses_what_it_did_not_write(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamageError):
        files.read_json(tmp_path / "r.json")


def test_read_json__missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"absent\.json"):
        files.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("record", [{"crc32": 1}, {"x": float("nan")}, {"x": float("inf")}])
def test_write_json__refuses_what_would_not_come_back(
    tmp_path: Path, record: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"crc32|JSON"):
        files.write_json(tmp_path / "r.json", record)
    assert listing(tmp_path) == []


def test_damage_of__tells_the_kinds_apart(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(b"content")
    known = files.describe(b"content")
    assert files.damage_of(path, known) is None
    assert files.read_checked(path, known) == b"content"
    for content, words in ((b"contant", "checksum"), (b"cont", "4 bytes in place of 7")):
        path.write_bytes(content)
        assert words in str(files.damage_of(path, known))
        with pytest.raises(DamageError, match=words):
            files.read_checked(path, known)
    path.unlink()
    assert files.damage_of(path, known) == "is missing"
    with pytest.raises(DamageError, match="is missing"):
        files.read_checked(path, known)


def test_refuse_unwritable__before_anything_is_written(tmp_path: Path) -> None:
    files.refuse_unwritable(tmp_path / "new" / "deep")
    files.refuse_unwritable(tmp_path)
    assert listing(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/below: Not a directory; a part of"):
        files.refuse_unwritable(tmp_path / "file" / "below")
