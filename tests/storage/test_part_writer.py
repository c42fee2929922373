import errno
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from semmae.errors import DamageError, MismatchError, SettingError, UserError
from semmae.storage import files, part_writer
from semmae.storage.part_check import committed_shards, complete_store, damaged_shards
from semmae.storage.part_identity import UNLABELLED
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store, write_shard

if TYPE_CHECKING:
    from .conftest import Example


def test_create_store__metadata_has_checksums_and_only_standard_codecs(finished: Path) -> None:
    for name in ("labels", "class_attention", "probabilities"):
        metadata = json.loads((finished / "parts.zarr" / name / "zarr.json").read_bytes())
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "zstd"]
        assert inner["codecs"][1]["configuration"]["checksum"] is True
        assert inner["index_codecs"][-1]["name"] == "crc32c"


def test_write_shard__chunks_of_nothing_but_fill_are_written(
    example: "Example", tmp_path: Path
) -> None:
    identity = replace(example.identity, images=8, attention_heads=0, probabilities=False)
    create_store(tmp_path, identity, example.plan.slice(0, 8))
    labels, meta, *_ = example.content(0, identity, bad=set(range(8)))
    write_shard(tmp_path, 0, labels, meta)
    complete_store(tmp_path)
    assert (tmp_path / "parts.zarr/labels/c/0/0/0").stat().st_size > 0
    assert (PartStore.open(tmp_path).labels() == UNLABELLED).all()


def test_write_shard__order_and_repetition_change_no_byte(
    example: "Example", finished: Path, tmp_path: Path
) -> None:
    order = [*range(6), *range(6)]
    random.Random(1).shuffle(order)
    example.fill(tmp_path / "other", order)
    complete_store(tmp_path / "other")
    assert example.digests(tmp_path / "other") == example.digests(finished)


def test_write_shard__padding_of_bad_rows_and_chunking_leave_no_trace(
    example: "Example", finished: Path, store: Path
) -> None:
    labels, meta, attention, soft = example.content(0)
    labels[3], attention[3], soft[3] = 7, np.nan, np.inf
    meta = pa.concat_tables([meta.slice(0, 5), meta.slice(5)])
    write_shard(store, 0, labels, meta, attention, soft)
    assert example.digests(store) == example.digests(finished)


def test_write_shard__mends_a_damaged_shard(
    example: "Example", finished: Path, store: Path
) -> None:
    place = store / "parts.zarr/labels/c/5/0/0"
    place.write_bytes(place.read_bytes()[:-9] + b"123456789")
    with pytest.raises(DamageError, match=r"parts\.zarr/labels/c/5/0/0 has a wrong"):
        complete_store(store)
    write_shard(store, 5, *example.content(5))
    complete_store(store)
    assert example.digests(store) == example.digests(finished)


@pytest.mark.parametrize("survived", range(5))
def test_write_shard__kill_between_objects_leaves_it_uncommitted(
    example: "Example",
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    # Objects of a shard: labels, class attention, probabilities, meta; then the commit.
    path = tmp_path / "store"
    example.fill(path, [0, 1, 3, 4, 5])
    written = 0

    def killed(place: Path, data: bytes) -> None:
        nonlocal written
        if written == survived:
            place.parent.mkdir(parents=True, exist_ok=True)
            (place.parent / ".half.tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        written += 1
        files.write_atomically(place, data)

    with monkeypatch.context() as patch:
        patch.setattr(part_writer, "write_atomically", killed)
        patch.setattr(part_writer, "write_json", lambda p, r: killed(p, files.encode_json(r)))
        with pytest.raises(KeyboardInterrupt):
            write_shard(path, 2, *example.content(2))
    assert committed_shards(path) == {0, 1, 3, 4, 5}
    assert damaged_shards(path) == {2}
    with pytest.raises(DamageError, match="shard is not committed"):
        complete_store(path)
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(path)
    # A new run finds the store, writes what is missing, and all is as if nothing had happened.
    example.fill(path, [2])
    complete_store(path)
    for stray in path.rglob(".half.tmp"):
        stray.unlink()
    assert example.digests(path) == example.digests(finished)


def test_create_store__again_is_a_resume(example: "Example", store: Path) -> None:
    before = example.digests(store)
    create_store(store, example.identity, example.plan, example.names)
    assert example.digests(store) == before


def test_create_store__another_identity_names_each_field(example: "Example", store: Path) -> None:
    other = replace(example.identity, batch_size=16, preprocessing={"mean": (0.5, 0.5, 0.4)})
    with pytest.raises(MismatchError) as caught:
        create_store(store, other, example.plan, ("cat", "cow"))
    message = str(caught.value)
    for part in (
        "batch_size: the store has 8, this run wants 16",
        "preprocessing.mean: the store has [0.5, 0.5, 0.5], this run wants [0.5, 0.5, 0.4]",
        "preprocessing.interpolation: the store has 'bicubic', this run wants None",
        "class_names",
        "another --output",
    ):
        assert part in message
    assert "dtype" not in message


def test_create_store__redoes_an_interrupted_set_up(
    example: "Example", finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"

    def fails(place: Path, data: bytes) -> None:
        if place.name == "plan.json":
            raise KeyboardInterrupt
        files.write_atomically(place, data)

    with monkeypatch.context() as patch:
        patch.setattr(part_writer, "write_atomically", fails)
        with pytest.raises(KeyboardInterrupt):
            create_store(path, example.identity, example.plan, example.names)
    (path / "plan/part-00009.parquet").write_bytes(b"of an earlier, longer plan")
    example.fill(path)
    complete_store(path)
    assert example.digests(path) == example.digests(finished)


@pytest.mark.parametrize(
    "name", ["photo.jpg", "plan/notes.txt", "parts.zarr/labels/c/0/0", "commits/00000.json"]
)
def test_create_store__leaves_a_foreign_folder_alone(
    example: "Example", tmp_path: Path, name: str
) -> None:
    files.write_atomically(tmp_path / name, b"mine")
    with pytest.raises(SettingError, match=name.split("/")[0]):
        create_store(tmp_path, example.identity, example.plan, example.names)
    assert example.digests(tmp_path).keys() == {name}


def test_create_store__long_plan_is_cut_into_files(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "PLAN_FILE_ROWS", 10)
    example.fill(tmp_path)
    complete_store(tmp_path)
    assert len(list((tmp_path / "plan").iterdir())) == 5
    assert PartStore.open(tmp_path).plan().to_pydict() == example.plan.to_pydict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.zeros((8, 4, 3), np.uint8)}, "labels"),
        ({"labels": np.zeros((8, 3, 4), np.int64)}, "int64"),
        ({"labels": np.full((8, 3, 4), 5, np.uint8)}, "not below 5"),
        ({"class_attention": None}, "class_attention"),
        ({"class_attention": np.full((8, 2, 3, 4), np.nan, np.float16)}, "class_attention"),
    ],
)
def test_write_shard__refuses_what_does_not_fit(
    example: "Example", tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    create_store(tmp_path, example.identity, example.plan)
    given = dict(
        zip(("labels", "meta", "class_attention", "probabilities"), example.content(0), strict=True)
    )
    with pytest.raises(MismatchError, match=words):
        write_shard(tmp_path, 0, **{**given, **changes})
    assert committed_shards(tmp_path) == set()


def test_write_shard__refuses_meta_rows_of_another_shard_or_schema(
    example: "Example", tmp_path: Path
) -> None:
    create_store(tmp_path, example.identity, example.plan)
    labels, meta, *floats = example.content(0)
    wrong = {"indices 0 to 8": example.content(1)[1], "error": meta.drop_columns(["error"])}
    for words, rows in wrong.items():
        with pytest.raises(MismatchError, match=words):
            write_shard(tmp_path, 0, labels, rows, *floats)
    assert committed_shards(tmp_path) == set()


def test_write_shard__refuses_an_array_the_store_has_not(
    example: "Example", tmp_path: Path
) -> None:
    create_store(tmp_path, replace(example.identity, probabilities=False), example.plan)
    with pytest.raises(MismatchError, match="without probabilities"):
        write_shard(tmp_path, 0, *example.content(0))
    with pytest.raises(IndexError):
        write_shard(tmp_path, 6, *example.content(0))


def test_write_shard__full_disk_is_a_clear_error(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_store(tmp_path, example.identity, example.plan)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="free some space"):
        write_shard(tmp_path, 0, *example.content(0))
    assert committed_shards(tmp_path) == set()


def test_create_store__takes_the_plan_in_tables_of_any_length(
    example: "Example", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_writer, "PLAN_FILE_ROWS", 10)
    create_store(tmp_path / "whole", example.identity, example.plan)
    whole = example.digests(tmp_path / "whole")
    for rows in (3, 10, 42, 50):
        tables = [example.plan.slice(start, rows) for start in range(0, 43, rows)]
        path = tmp_path / f"tables of {rows}"
        create_store(path, example.identity, tables)
        assert example.digests(path) == whole
        (path / "plan/part-00002.parquet").unlink()
        create_store(path, example.identity, tables)
        assert example.digests(path) == whole


def test_create_store__refuses_a_plan_of_another_length(example: "Example", tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="the plan has 42 rows for 43 images"):
        create_store(tmp_path, example.identity, example.plan.slice(1))
    assert not (tmp_path / "plan.json").exists()
