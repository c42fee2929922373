"""The records of a part store and where its objects lie.

    plan.json                   identity, and checksums of the set-up; written last of the set-up
    plan/part-*.parquet         one row an image in index order
    parts.zarr/labels           (N, rows, columns) uint8
    parts.zarr/class_attention  optional (N, H, rows, columns) float16
    parts.zarr/probabilities    optional (N, P, rows, columns) float16
    meta/part-<shard>.parquet   one row an image, bad ones too
    images/<shard>.jpeg, .raw   optional cache of the images (`image_cache`)
    commits/<shard>.json        written last of a shard, vouches for its objects
    complete.json               written by `complete_store`, vouches for every commit
    runs/, cache/               what differs from run to run, and what is derived

Legend: N images, H attention heads, P parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DamageError, MismatchError, MissingError
from .files import read_checked, read_json
from .part_identity import VERSION, StoreIdentity
from .part_shards import array_specs
from .store_paths import StorePath

WAY_OUT = (
    "run what made it, `semmae stage1 extract-parts` or `semmae parts import`, again with the same "
    "--output, which mends it"
)
"""How a user mends a store that is not complete; ends an error message."""


def encode_table(table: pa.Table) -> bytes:
    """A table as Parquet; equal tables give equal bytes, however they were chunked.

    Args:
        table: Any table.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def decode_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table that `encode_table` wrote; page checksums are verified.

    Args:
        data: The whole Parquet file.
        columns: Columns wanted, in this order; None for all.
    """
    names = None if columns is None else list(columns)
    return pq.read_table(pa.BufferReader(data), columns=names, page_checksum_verification=True)


def meta_name(shard: int) -> str:
    """Place of a shard's meta rows, relative to the store."""
    return f"meta/part-{shard:05d}.parquet"


def image_cache_name(identity: StoreIdentity, shard: int) -> str:
    """Place of a shard's cached images, relative to the store, which must keep them."""
    return f"images/{shard:05d}.{identity.image_cache}"


def commit_name(shard: int) -> str:
    """Place of a shard's commit record, relative to the store."""
    return f"commits/{shard:05d}.json"


def commit_path(path: StorePath, shard: int) -> StorePath:
    """Place of a shard's commit record in the store at ``path``."""
    return path / commit_name(shard)


def object_names(identity: StoreIdentity, shard: int) -> list[str]:
    """The objects of a shard, relative to the store: arrays, meta rows, images if it keeps them."""
    arrays = array_specs(identity).items()
    names = [f"parts.zarr/{name}/{spec.key(shard)}" for name, spec in arrays]
    images = [image_cache_name(identity, shard)] if identity.image_cache else []
    return [*names, meta_name(shard), *images]


def read_set_up(path: StorePath) -> tuple[dict[str, Any], StoreIdentity]:
    """The record ``plan.json`` of a store, complete or not, and the identity in it.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        MismatchError: The store has another format version.
        DamageError: The record is damaged.
    """
    try:
        plan = read_json(path / "plan.json")
    except MissingError:
        raise MissingError(
            f"{path} is no part store: there is no plan.json in it; name the --output of "
            "`semmae stage1 extract-parts` or `semmae parts import`"
        ) from None
    if plan.get("version") != VERSION:
        raise MismatchError(
            f"the part store {path} has format version {plan.get('version')}, this semmae reads "
            f"version {VERSION}; extract or import the parts anew into another --output"
        )
    return plan, StoreIdentity.from_record(plan["identity"])


def same_store(path: StorePath) -> tuple[dict[str, Any], StoreIdentity]:
    """As `read_set_up`, of a store that was there before in this run.

    Where its disk is no longer mounted an empty folder is left, which must not be written to.

    Raises:
        MissingError: The store is gone.
        MismatchError: The store has another format version.
        DamageError: The record is damaged.
        UnreadableError: The system refuses to read it.
    """
    try:
        return read_set_up(path)
    except MissingError:
        raise MissingError(
            f"the part store {path} is gone: its plan.json was there before and is not now; see "
            "whether the disk that it lies on is still mounted and its folder is in its place, and "
            "run again"
        ) from None


def plan_table(
    path: StorePath, plan: Mapping[str, Any], start: int = 0, stop: int | None = None
) -> pa.Table:
    """The file plan of a store, or some rows of it, one row an image in index order.

    Only the files that hold the rows are read.

    Args:
        path: Folder of a store that was set up; it need not be complete.
        plan: Its record ``plan.json``.
        start: First row wanted.
        stop: One past the last row wanted; None for all.

    Raises:
        DamageError: A file of the plan is not what was written.
    """
    objects = plan["objects"]
    names = sorted(name for name in objects if name.startswith("plan/"))
    rows: int = plan["plan_rows"]
    last = None if stop is None else max(start // rows + 1, -(-stop // rows))
    first = start // rows
    found = [decode_table(read_checked(path / n, objects[n])) for n in names[first:last]]
    length = None if stop is None else stop - start
    return pa.concat_tables(found).slice(start - first * rows, length)


def plan_tables(path: StorePath, plan: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The file plan of a store as tables in index order, in the memory of one of its files.

    Args:
        path: Folder of a store that was set up; it need not be complete.
        plan: Its record ``plan.json``.

    Raises:
        DamageError: A file of the plan is not what was written.
    """
    objects = plan["objects"]
    for name in sorted(name for name in objects if name.startswith("plan/")):
        yield decode_table(read_checked(path / name, objects[name]))


def read_commit(path: StorePath, identity: StoreIdentity, shard: int) -> dict[str, Any]:
    """A shard's commit record, after checking that it is this shard's.

    Args:
        path: Folder of the store.
        identity: Identity of the store.
        shard: Number of the shard.

    Raises:
        IndexError: There is no such shard.
        MissingError: The shard is not committed.
        DamageError: The record is damaged, or is that of another shard or store.
    """
    place = commit_path(path, shard)
    commit = read_json(place)
    wanted = (shard, *identity.shard_range(shard))
    if (commit.get("shard"), commit.get("start"), commit.get("stop")) != wanted:
        raise DamageError(f"the record {place} is not that of shard {shard}")
    if set(commit["objects"]) != set(object_names(identity, shard)):
        raise DamageError(f"the record {place} does not name the objects of this store")
    return commit
