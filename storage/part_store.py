"""The part store: which part each patch of each image belongs to, with what is needed to trust it.

    plan.json                   identity, and checksums of the set-up; written last of the set-up
    plan/part-*.parquet         one row an image in index order
    parts.zarr/labels           (N, rows, columns) uint8
    parts.zarr/class_attention  optional (N, H, rows, columns) float16
    parts.zarr/probabilities    optional (N, P, rows, columns) float16
    meta/part-<shard>.parquet   one row an image, bad ones too
    commits/<shard>.json        written last of a shard, vouches for its objects
    complete.json               written by `complete_store`, vouches for every commit
    runs/, cache/               what differs from run to run, and what is derived

One writer a shard; a shard is done when its commit record stands, never because an array can be
read: Zarr gives the fill value for a shard that is missing.  A shard's bytes are a function of its
content alone, so writers that overlap (a rerun beside workers that outlived a killed driver) leave
the same store.

Zarr encodes and decodes in memory here and the files are written by `write_atomically`: its own
store leaves plainly named temporary files when killed, does not sync, and reads a sharded object
before it replaces it, so a damaged shard could not be written again (zarr 3.1.6).

Legend: N images, K rows of a shard, H attention heads, P parts.
"""

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from ..errors import DamageError, MismatchError, MissingError, SettingError, UserError
from .files import (
    atomic_file,
    damage_of,
    describe,
    file_crc32,
    read_checked,
    read_json,
    write_atomically,
    write_json,
)

VERSION = 1
UNLABELLED = 255
"""Label of every patch of a bad image, and the fill value of the array: never a part."""

KEPT_BITS = 6
"""Mantissa bits kept of the float16 arrays (of 10): a relative error of at most 2**-7."""

_CHUNK = 512
_PLAN_ROWS = 1_000_000
_WAY_OUT = "run `semmae stage1 extract-parts` again with the same --output"

META_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),  # place of the image in the plan
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64()),  # class, null without classes
        pa.field("width", pa.int32()),  # pixels of the image as stored; null if unreadable
        pa.field("height", pa.int32()),
        pa.field("crc32", pa.int64()),  # of the encoded image bytes
        pa.field("status", pa.string(), nullable=False),  # "ok" or "bad"
        pa.field("error_code", pa.string()),
        pa.field("error_kind", pa.string()),
        pa.field("error", pa.string()),
        pa.field("confidence", pa.float32()),  # mean over patches of best minus second-best part
        pa.field("part_areas", pa.list_(pa.float32())),  # share of the patches of each part
    ]
)
"""Columns of ``meta/``: explicit, since a shard without errors would otherwise type them null."""


def shard_size_for(images: int) -> int:
    """Images a shard: the power of two nearest to ``images / 160``, within [32, 8192].

    It depends on the data alone, never on the workers, since it belongs to the identity of a store.

    Args:
        images: Images of the plan, N.
    """
    return min((1 << power for power in range(5, 14)), key=lambda size: abs(images - 160 * size))


@dataclass(frozen=True, kw_only=True)
class StoreIdentity:
    """What makes two runs write the same store, bit for bit.

    Raises:
        SettingError: A field is out of its range.
    """

    images: int
    """Images of the plan, N."""
    shard_size: int
    """Images a shard, K; a multiple of 512 above 512."""
    grid: tuple[int, int]
    """Rows and columns of a label map, in patches."""
    parts: int
    """Channels of the learner, the background included if it has one; 1 to 255."""
    background: int | None
    """Part id of the background; None without one."""
    image_size: tuple[int, int]
    """Height and width in pixels fed to the learner: the whole image is squashed to it."""
    batch_size: int
    """Images the learner sees at once; it may change the last bits of its output."""
    dtype: str
    """Precision that the learner ran in, such as ``"float32"``."""
    device_type: str
    """Device that the learner ran on, such as ``"cuda"``."""
    plan_fingerprint: str
    """Fingerprint of the file plan."""
    learner_hash: str
    """Hash of the learner's weights."""
    preprocessing: Mapping[str, Any]
    """How an image becomes the learner's input: plain JSON."""
    attention_heads: int = 0
    """Heads H of the class attention; 0: the store has no such array."""
    probabilities: bool = False
    """Whether the store keeps soft part maps."""

    def __post_init__(self) -> None:
        """Refuse what no store can hold."""
        for name, value in (
            ("images", self.images),
            ("shard_size", self.shard_size),
            ("grid", min(self.grid)),
            ("image_size", min(self.image_size)),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise SettingError(f"{name} of a part store must be at least 1, not {value}")
        if not 1 <= self.parts <= UNLABELLED:
            raise SettingError(f"parts must be in [1, {UNLABELLED}], not {self.parts}")
        if self.background is not None and not 0 <= self.background < self.parts:
            raise SettingError(
                f"background must be None or in [0, {self.parts}), not {self.background}"
            )
        if self.attention_heads < 0:
            raise SettingError(f"attention_heads must not be negative, got {self.attention_heads}")
        if self.shard_size > _CHUNK and self.shard_size % _CHUNK:
            raise SettingError(
                f"shard_size above {_CHUNK} must be a multiple of it, not {self.shard_size}"
            )

    @property
    def shards(self) -> int:
        """Number of shards; the last one may be partial."""
        return -(-self.images // self.shard_size)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First index of a shard and one past its last.

        Raises:
            IndexError: There is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of a store with {self.shards} shards")
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.images)

    def to_record(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        # Through JSON, so that a fresh record and one read back are equal: tuples become lists.
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StoreIdentity":
        """The identity that `to_record` wrote.

        Raises:
            TypeError: A field is missing or unknown.
        """
        pairs = {name: tuple(record[name]) for name in ("grid", "image_size") if name in record}
        return cls(**{**record, **pairs})


class _Spec(NamedTuple):
    """One array of ``parts.zarr``."""

    dtype: str
    inner: tuple[int, ...]
    fill: float
    axes: tuple[str, ...]


def _specs(identity: StoreIdentity) -> dict[str, _Spec]:
    """The arrays of a store.  The fill of the float arrays is NaN, so a gap cannot pass as data."""
    specs = {"labels": _Spec("uint8", identity.grid, UNLABELLED, ("image", "row", "column"))}
    if identity.attention_heads:
        inner = (identity.attention_heads, *identity.grid)
        axes = ("image", "head", "row", "column")
        specs["class_attention"] = _Spec("float16", inner, np.nan, axes)
    if identity.probabilities:
        axes = ("image", "part", "row", "column")
        specs["probabilities"] = _Spec("float16", (identity.parts, *identity.grid), np.nan, axes)
    return specs


def _array_metadata(identity: StoreIdentity) -> dict[str, bytes]:
    """Content of the ``zarr.json`` files of ``parts.zarr``, by path in it."""
    held: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(held), zarr_format=3)
    rows = identity.shard_size
    for name, spec in _specs(identity).items():
        group.create_array(
            name,
            shape=(identity.images, *spec.inner),
            chunks=(min(rows, _CHUNK), *spec.inner),
            shards=(rows, *spec.inner),
            dtype=spec.dtype,
            fill_value=spec.fill,
            # The checksum is of each chunk; the sharding codec adds one (CRC-32C) of its index.
            compressors=ZstdCodec(level=3, checksum=True),
            dimension_names=spec.axes,
        )
    return {name: buffer.to_bytes() for name, buffer in held.items()}


class _Codec:
    """Encodes and decodes single shards of one stored array, in memory."""

    def __init__(self, path: Path, plan: Mapping[str, Any], identity: StoreIdentity, name: str):
        place = f"parts.zarr/{name}/zarr.json"
        self._identity, self._axes = identity, len(_specs(identity)[name].inner)
        self._held: dict[str, Buffer] = {}
        self._from_bytes = default_buffer_prototype().buffer.from_bytes
        metadata = read_checked(path / place, plan["objects"][place])
        self._held["zarr.json"] = self._from_bytes(metadata)
        array = zarr.open_array(MemoryStore(self._held), mode="r+")
        # A chunk that holds nothing but the fill value is written too: absence means damage.
        self._array = array.with_config({"write_empty_chunks": True})

    def key(self, shard: int) -> str:
        """Name of a shard's object inside the array's folder."""
        return f"c/{shard}" + "/0" * self._axes

    def encode(self, shard: int, values: NDArray[Any]) -> bytes:
        start, stop = self._identity.shard_range(shard)
        self._array[start:stop] = values
        return self._held.pop(self.key(shard)).to_bytes()

    def decode(self, shard: int, data: bytes) -> NDArray[Any]:
        start, stop = self._identity.shard_range(shard)
        self._held[self.key(shard)] = self._from_bytes(data)
        values = np.asarray(self._array[start:stop])
        del self._held[self.key(shard)]
        return values


def round_mantissa(values: NDArray[np.float16], kept: int = KEPT_BITS) -> NDArray[np.float16]:
    """Round float16 to fewer mantissa bits, half to even, so that zstd finds repeats.

    Ours: done before Zarr, not by its ``numcodecs.bitround``, which the Zarr v3 specification does
    not know; the stored numbers are the same and any Zarr reader opens them.

    Args:
        values: float16 of any shape.
        kept: Mantissa bits kept, 1 to 9 of 10.
    """
    dropped = 10 - kept
    bits = np.ascontiguousarray(values).view(np.uint16)
    half = np.uint16((1 << (dropped - 1)) - 1)
    rounded = bits + ((bits >> np.uint16(dropped)) & np.uint16(1)) + half
    return (rounded & np.uint16(0xFFFF ^ ((1 << dropped) - 1))).view(np.float16)


def _parquet(table: pa.Table) -> bytes:
    """A table as Parquet; equal tables give equal bytes, however they were chunked."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    names = None if columns is None else list(columns)
    return pq.read_table(pa.BufferReader(data), columns=names, page_checksum_verification=True)


def _meta_name(shard: int) -> str:
    return f"meta/part-{shard:05d}.parquet"


def _commit_path(path: Path, shard: int) -> Path:
    return path / "commits" / f"{shard:05d}.json"


def _object_names(identity: StoreIdentity, shard: int) -> list[str]:
    """The objects of a shard, relative to the store, in the order they are written."""
    arrays = _specs(identity).items()
    names = [f"parts.zarr/{name}/c/{shard}" + "/0" * len(spec.inner) for name, spec in arrays]
    return [*names, _meta_name(shard)]


def _read_plan(path: Path) -> tuple[dict[str, Any], StoreIdentity]:
    """The record ``plan.json`` and the identity in it."""
    if not (path / "plan.json").is_file():
        raise MissingError(
            f"{path} is no part store: there is no plan.json in it; name the folder that "
            "`semmae stage1 extract-parts --output` wrote"
        )
    plan = read_json(path / "plan.json")
    if plan.get("version") != VERSION:
        raise MismatchError(
            f"the part store {path} has format version {plan.get('version')}, this semmae reads "
            f"version {VERSION}; extract the parts anew into another --output"
        )
    return plan, StoreIdentity.from_record(plan["identity"])


def _differences(have: Any, want: Any, name: str = "") -> Iterator[str]:
    """Each field that differs between two records, as "name: have/want"."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted({*have, *want}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(have.get(key), want.get(key), inner)
    elif have != want:
        yield f"{name}: the store has {have!r}, this run wants {want!r}"


def _clear_leftovers(path: Path) -> None:
    """Remove an interrupted set-up, and refuse a folder that holds anything else."""
    foreign = {
        entry.name
        for entry in path.iterdir()
        if not entry.name.startswith(".") and entry.name not in {"plan", "parts.zarr", "runs"}
    }
    if (path / "plan").is_dir():
        entries = [entry.name for entry in (path / "plan").iterdir()]
        ours = (name.startswith((".", "part-")) for name in entries)
        foreign |= set() if all(ours) else {"plan"}
    if foreign:
        raise SettingError(
            f"{path} is not empty and is no part store (it holds {', '.join(sorted(foreign)[:5])}, "
            "but no plan.json); name an empty or new folder as --output"
        )
    shutil.rmtree(path / "plan", ignore_errors=True)
    shutil.rmtree(path / "parts.zarr", ignore_errors=True)


def create_store(
    path: Path, identity: StoreIdentity, plan: pa.Table, class_names: Sequence[str] = ()
) -> None:
    """Set up a store, or find that the same one is there already and can be gone on with.

    Args:
        path: Folder of the store; made if absent.
        identity: What the store is to hold.
        plan: One row an image in index order, ``identity.images`` rows.
        class_names: Name of each class; empty without classes.

    Raises:
        MismatchError: A store of another identity is there, or ``plan`` has another length.
        SettingError: The folder holds other things and is no part store.
        UserError: The system refused a write.
    """
    if plan.num_rows != identity.images:
        raise MismatchError(f"the plan has {plan.num_rows} rows for {identity.images} images")
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; name a folder as --output")
    want = {"identity": identity.to_record(), "class_names": list(class_names)}
    if (path / "plan.json").is_file():
        have, _ = _read_plan(path)
        different = [
            *_differences(have["identity"], want["identity"]),
            *_differences(have["class_names"], want["class_names"], "class_names"),
        ]
        if different:
            raise MismatchError(
                f"the part store {path} was begun with other settings ({'; '.join(different)}); "
                "use the same ones to go on with it, or name another --output"
            )
        return
    if path.exists():
        _clear_leftovers(path)
    objects = {f"parts.zarr/{name}": data for name, data in _array_metadata(identity).items()}
    for number, start in enumerate(range(0, plan.num_rows, _PLAN_ROWS)):
        objects[f"plan/part-{number:05d}.parquet"] = _parquet(plan.slice(start, _PLAN_ROWS))
    for name, data in objects.items():
        write_atomically(path / name, data)
    described = {name: describe(data) for name, data in objects.items()}
    write_json(path / "plan.json", {"version": VERSION, **want, "objects": described})


def _checked_meta(identity: StoreIdentity, shard: int, meta: pa.Table) -> pa.Table:
    """The meta rows of a shard in the stored schema, after checking that they are its rows."""
    start, stop = identity.shard_range(shard)
    if set(meta.column_names) != set(META_SCHEMA.names):
        odd = sorted(set(meta.column_names) ^ set(META_SCHEMA.names))
        raise MismatchError(f"meta rows of shard {shard}: columns missing or unknown: {odd}")
    table = meta.select(META_SCHEMA.names).cast(META_SCHEMA)
    if table["index"].to_pylist() != list(range(start, stop)):
        raise MismatchError(f"meta rows of shard {shard} must have the indices {start} to {stop}")
    odd = sorted(set(table["status"].to_pylist()) - {"ok", "bad"})
    if odd:
        raise MismatchError(f"status in shard {shard} must be 'ok' or 'bad', not {odd}")
    return table


def _checked_array(
    name: str, spec: _Spec, values: NDArray[Any] | None, ok: NDArray[np.bool_], limit: float
) -> NDArray[Any]:
    """One array of a shard as it is stored: rows of bad images hold the fill value."""
    shape = (len(ok), *spec.inner)
    if values is None or values.shape != shape or values.dtype != spec.dtype:
        came = "none" if values is None else f"{values.dtype} {values.shape}"
        raise MismatchError(f"{name} of this shard must be {spec.dtype} {shape}, came {came}")
    # Comparing this way round also finds NaN.
    wrong = ~(values < limit).reshape(len(ok), -1).all(axis=1) & ok
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise MismatchError(f"{name} of row {row} of this shard has a value not below {limit:g}")
    rounded = round_mantissa(values) if spec.dtype == "float16" else values
    keep = ok.reshape(-1, *(1,) * len(spec.inner))
    return np.where(keep, rounded, np.asarray(spec.fill, dtype=spec.dtype))


def write_shard(
    path: Path,
    shard: int,
    labels: NDArray[np.uint8],
    meta: pa.Table,
    class_attention: NDArray[np.float16] | None = None,
    probabilities: NDArray[np.float16] | None = None,
) -> dict[str, Any]:
    """Write one shard: its arrays, then its meta rows, and last the commit record.

    Writing the same content again, at any time and in any order, gives the same bytes.  Rows whose
    status is "bad" are stored as `UNLABELLED` (NaN in float arrays), whatever they hold here, so
    that what a batch was padded with leaves no trace.

    Args:
        path: Folder of the store.
        shard: Number of the shard.
        labels: (n, rows, columns) uint8, part ids below ``identity.parts``.
        meta: n rows with the columns of `META_SCHEMA`, indices of the shard in order.
        class_attention: (n, H, rows, columns) float16, where the store has it.
        probabilities: (n, P, rows, columns) float16, where the store has it.

    Returns:
        The commit record: ``shard, start, stop, ok, bad, objects``.

    Raises:
        MissingError: There is no store.
        MismatchError: An array or the meta rows do not fit the store.
        DamageError: The set-up of the store is damaged.
        UserError: The system refused a write.
    """
    plan, identity = _read_plan(path)
    start, stop = identity.shard_range(shard)
    table = _checked_meta(identity, shard, meta)
    ok = np.asarray(pc.equal(table["status"], "ok").to_numpy(), dtype=np.bool_)
    specs = _specs(identity)
    given = {"labels": labels, "class_attention": class_attention, "probabilities": probabilities}
    for name, values in given.items():
        if values is not None and name not in specs:
            raise MismatchError(f"the part store {path} was set up without {name}")
    objects = {}
    for (name, spec), place in zip(specs.items(), _object_names(identity, shard), strict=False):
        limit = identity.parts if name == "labels" else np.inf
        values = _checked_array(name, spec, given[name], ok, limit)
        objects[place] = _Codec(path, plan, identity, name).encode(shard, values)
    objects[_meta_name(shard)] = _parquet(table)
    for place, data in objects.items():
        write_atomically(path / place, data)
    commit = {
        "shard": shard,
        "start": start,
        "stop": stop,
        "ok": int(ok.sum()),
        "bad": int((~ok).sum()),
        "objects": {place: describe(data) for place, data in objects.items()},
    }
    write_json(_commit_path(path, shard), commit)
    return commit


def _read_commit(path: Path, identity: StoreIdentity, shard: int) -> dict[str, Any]:
    """A shard's commit record, after checking that it is this shard's."""
    place = _commit_path(path, shard)
    commit = read_json(place)
    wanted = (shard, *identity.shard_range(shard))
    if (commit.get("shard"), commit.get("start"), commit.get("stop")) != wanted:
        raise DamageError(f"the record {place} is not that of shard {shard}")
    if set(commit["objects"]) != set(_object_names(identity, shard)):
        raise DamageError(f"the record {place} does not name the objects of this store")
    return commit


def committed_shards(path: Path) -> set[int]:
    """The shards whose commit record stands and is sound; their objects are not looked at.

    Args:
        path: Folder of the store.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    _, identity = _read_plan(path)
    done = set()
    for shard in range(identity.shards):
        with contextlib.suppress(MissingError, DamageError):
            _read_commit(path, identity, shard)
            done.add(shard)
    return done


def damaged_shards(path: Path) -> dict[int, str]:
    """Check every object of every shard against its commit record; this reads the whole store.

    Args:
        path: Folder of the store.

    Returns:
        What is wrong, by shard; ``"is not committed"`` for one that was not written yet.

    Raises:
        MissingError: There is no store.
        DamageError: The store's ``plan.json`` is damaged.
    """
    _, identity = _read_plan(path)
    return {shard: wrong for shard, wrong, _ in _examine(path, identity) if wrong}


def _examine(path: Path, identity: StoreIdentity) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each shard with what is wrong with it ("" if nothing) and its commit record."""
    for shard in range(identity.shards):
        try:
            commit = _read_commit(path, identity, shard)
        except MissingError:
            yield shard, "is not committed", {}
        except DamageError as error:
            yield shard, str(error), {}
        else:
            checks = ((name, damage_of(path / name, o)) for name, o in commit["objects"].items())
            yield shard, "; ".join(f"{n} {wrong}" for n, wrong in checks if wrong), commit


def uncommit(path: Path, shards: Iterable[int]) -> None:
    """Take back the commit records of shards, so that the next run writes them anew.

    Args:
        path: Folder of the store; it counts as not complete afterwards.
        shards: Numbers of the shards; those without a record are passed over.

    Raises:
        UserError: The system refused to remove a record.
    """
    try:
        (path / "complete.json").unlink(missing_ok=True)
        for shard in shards:
            _commit_path(path, shard).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from error


def complete_store(path: Path) -> dict[str, Any]:
    """Verify the whole store and write ``complete.json``, without which it cannot be opened.

    Args:
        path: Folder of the store.

    Returns:
        The record: ``images, ok, bad``, ``plan`` (CRC-32 of plan.json) and ``commits`` (CRC-32 of
        each commit record, by shard).

    Raises:
        MissingError: There is no store.
        DamageError: Shards are not committed, or objects are not what was written; the message
            names them.  A ``complete.json`` of earlier is taken back then.
        UserError: The system refused the write.
    """
    plan, identity = _read_plan(path)
    wrong = {name: damage_of(path / name, o) for name, o in plan["objects"].items()}
    faults = [f"{name} {reason}" for name, reason in wrong.items() if reason]
    totals = {"ok": 0, "bad": 0}
    commits = {}
    for shard, reason, commit in _examine(path, identity):
        if reason:
            faults.append(f"shard {shard} {reason}")
            continue
        totals = {name: count + commit[name] for name, count in totals.items()}
        commits[f"{shard:05d}"] = file_crc32(_commit_path(path, shard))
    if faults:
        with contextlib.suppress(UserError):
            uncommit(path, ())
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise DamageError(
            f"the part store {path} is not complete: {'; '.join(faults[:8])}{more}; {_WAY_OUT}, "
            "after `semmae parts repair` if anything is damaged"
        )
    record = {
        "version": VERSION,
        "images": identity.images,
        **totals,
        "plan": file_crc32(path / "plan.json"),
        "commits": commits,
    }
    with contextlib.suppress(MissingError, DamageError):
        # A store that is complete already may lie on a read-only disk.
        if read_json(path / "complete.json") == record:
            return record
    write_json(path / "complete.json", record)
    return record


def _private_folder() -> Path:
    """A folder for temporary files that belongs to this user alone."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"semmae-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    # Anyone may make a folder of that name first in a shared /tmp.
    if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="semmae-"))


class PartStore:
    """A complete part store, for reading.  Use `open`."""

    def __init__(self, path: Path, complete: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = StoreIdentity.from_record(plan["identity"])
        self.class_names: tuple[str, ...] = tuple(plan["class_names"])
        self.fingerprint = f"{file_crc32(path / 'complete.json'):08x}"
        """CRC-32 of complete.json, which vouches for every byte of the store; 8 hex digits."""
        self._complete, self._plan = complete, plan

    @classmethod
    def open(cls, path: Path) -> "PartStore":
        """Open a store; its objects are checked when they are read.

        Args:
            path: Folder of the store.

        Raises:
            MissingError: There is no store.
            DamageError: The store is not complete, or its records are damaged.
            MismatchError: The store has another format version.
        """
        plan, _ = _read_plan(path)
        try:
            complete = read_json(path / "complete.json")
        except MissingError:
            raise DamageError(
                f"the part store {path} is not complete (it has no complete.json); {_WAY_OUT}"
            ) from None
        if file_crc32(path / "plan.json") != complete["plan"]:
            raise DamageError(f"plan.json and complete.json of {path} are of two stores")
        return cls(path, complete, plan)

    @cached_property
    def _objects(self) -> dict[str, dict[str, int]]:
        """What the commit records say of every object of the shards."""
        objects: dict[str, dict[str, int]] = {}
        for shard in range(self.identity.shards):
            place = _commit_path(self.path, shard)
            commit = _read_commit(self.path, self.identity, shard)
            if file_crc32(place) != self._complete["commits"][f"{shard:05d}"]:
                raise DamageError(f"{place} was written after the store was complete; {_WAY_OUT}")
            objects.update(commit["objects"])
        return objects

    def plan(self) -> pa.Table:
        """The file plan, one row an image in index order.

        Raises:
            DamageError: A file of it is not what was written.
        """
        objects = self._plan["objects"]
        names = sorted(name for name in objects if name.startswith("plan/"))
        parts = [_read_parquet(read_checked(self.path / n, objects[n])) for n in names]
        return pa.concat_tables(parts)

    def meta(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The meta rows, one an image in index order.

        Args:
            columns: Columns of `META_SCHEMA` wanted; None for all.

        Raises:
            SettingError: There is no such column.
            DamageError: A file of it is not what was written.
        """
        unknown = sorted(set(columns or ()) - set(META_SCHEMA.names))
        if unknown:
            raise SettingError(f"no column {unknown} in meta; there are {META_SCHEMA.names}")
        names = [_meta_name(shard) for shard in range(self.identity.shards)]
        read = (read_checked(self.path / name, self._objects[name]) for name in names)
        return pa.concat_tables([_read_parquet(data, columns) for data in read])

    def ok(self) -> NDArray[np.bool_]:
        """Which images could be read: (N,) bool.

        Raises:
            DamageError: A file of ``meta/`` is not what was written.
        """
        status = self.meta(["status"])["status"]
        return np.asarray(pc.equal(status, "ok").to_numpy(), dtype=np.bool_)

    def labels(self) -> NDArray[np.uint8]:
        """The part id of every patch, memory-mapped and read-only.

        They are decoded and checked once into ``cache/labels-<fingerprint>.npy``, or into a folder
        of this user under the system's temporary one where the store cannot be written to.

        Returns:
            (N, rows, columns) uint8: part ids below ``identity.parts``, and `UNLABELLED` on every
            patch of an image that `ok` says is bad.

        Raises:
            DamageError: A shard is not what was written.
            UserError: Neither cache could be written.
        """
        name = f"labels-{self.fingerprint}.npy"
        kept = self._cached_labels(self.path / "cache" / name)
        if kept is None:
            try:
                kept = self._cache_labels(self.path / "cache" / name)
            except DamageError:
                raise
            except UserError:
                place = _private_folder() / name
                kept = self._cached_labels(place)
                kept = self._cache_labels(place) if kept is None else kept
        return kept

    def _cached_labels(self, place: Path) -> NDArray[np.uint8] | None:
        """The labels of a cache file; None if it is absent or of no use."""
        shape = (self.identity.images, *self.identity.grid)
        try:
            labels: NDArray[np.uint8] = np.load(place, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        return labels if labels.shape == shape and labels.dtype == np.uint8 else None

    def _cache_labels(self, place: Path) -> NDArray[np.uint8]:
        identity = self.identity
        shape = (identity.images, *identity.grid)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # Plain writes: on a full disk they raise, where a writable memory map kills the process.
        with atomic_file(place) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            codec = _Codec(self.path, self._plan, identity, "labels")
            for shard in range(identity.shards):
                name = f"parts.zarr/labels/{codec.key(shard)}"
                data = read_checked(self.path / name, self._objects[name])
                file.write(codec.decode(shard, data).tobytes())
        labels = self._cached_labels(place)
        if labels is None:
            raise DamageError(f"the cache {place} cannot be read back; remove it and try again")
        return labels

    def class_attention(self) -> zarr.Array[Any]:
        """Attention of the class token by head, read from Zarr by slices.

        Returns:
            (N, H, rows, columns) float16; NaN for bad images.

        Raises:
            MissingError: The store was made without it.
            DamageError: A shard is missing or has another size than was written.
        """
        return self._float_array("class_attention")

    def probabilities(self) -> zarr.Array[Any]:
        """The soft part maps, read from Zarr by slices.

        Returns:
            (N, P, rows, columns) float16; NaN for bad images.

        Raises:
            MissingError: The store was made without them.
            DamageError: A shard is missing or has another size than was written.
        """
        return self._float_array("probabilities")

    def _float_array(self, name: str) -> zarr.Array[Any]:
        if name not in _specs(self.identity):
            raise MissingError(
                f"the part store {self.path} has no {name}; extract the parts anew with it into "
                "another --output"
            )
        folder = f"parts.zarr/{name}/"
        for place, known in self._objects.items():
            # Zarr would give the fill value for a shard that is gone.
            found = self.path / place
            if place.startswith(folder) and not (
                found.is_file() and found.stat().st_size == known["size"]
            ):
                raise DamageError(f"{found} is missing or cut; run `semmae parts repair`")
        metadata = f"{folder}zarr.json"
        read_checked(self.path / metadata, self._plan["objects"][metadata])
        return zarr.open_array(self.path / folder, mode="r")
