"""Writing a part store: set it up, write its shards in any order.

One writer a shard; a shard is done when its commit record stands, never because an array can be
read: Zarr gives the fill value for a shard that is missing.  A shard's bytes are a function of its
content alone, so writers that overlap (a rerun beside workers that outlived a killed driver) leave
the same store.  Checking and completing: `part_check`; layout: `part_records`.

Legend: n images of a shard, H attention heads, P parts.
"""

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import DamageError, MismatchError, MissingError, SettingError, UserError
from .files import (
    damage_of,
    describe,
    encode_json,
    read_json,
    record_crc32,
    write_atomically,
    write_json,
)
from .part_identity import VERSION, StoreIdentity
from .part_records import (
    commit_path,
    encode_table,
    image_cache_name,
    meta_name,
    object_names,
    plan_tables,
    read_set_up,
    same_store,
)
from .part_shards import ShardCodec, array_metadata, array_specs, checked_array, checked_meta
from .plan_changes import plan_changes
from .store_paths import StorePath, remove_tree, sizes_below
from .table_streams import PLAN_FILE_ROWS, in_lengths


def _differences(have: Any, want: Any, name: str = "") -> Iterator[str]:
    """Each field that differs between two records, as "name: have/want"."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted({*have, *want}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(have.get(key), want.get(key), inner)
    elif have != want:
        yield f"{name}: the store has {have!r}, this run wants {want!r}"


def _clear_leftovers(path: StorePath) -> None:
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
    # A set-up writes no more there; shards come after it.
    there = {f"parts.zarr/{name}" for name in sizes_below(path / "parts.zarr")}
    foreign |= {
        name for name in there if not name.rpartition("/")[2].startswith(("zarr.json", "."))
    }
    if foreign:
        raise SettingError(
            f"{path} is not empty and is no part store (it holds {', '.join(sorted(foreign)[:5])}, "
            "but no plan.json); name an empty or new folder as --output"
        )
    remove_tree(path / "plan")
    remove_tree(path / "parts.zarr")


def create_store(
    path: StorePath,
    identity: StoreIdentity,
    plan: pa.Table | Iterable[pa.Table],
    class_names: Sequence[str] = (),
) -> bool:
    """Set up a store, or find that the same one is there already and can be gone on with.

    Of a store that is there, what was damaged of its set-up is written again.

    Args:
        path: Folder of the store; made if absent.
        identity: What the store is to hold.
        plan: One row an image in index order, ``identity.images`` rows: a table, or tables that
            can be gone through more than once.
        class_names: Name of each class; empty without classes.

    Returns:
        Whether the store was there already.

    Raises:
        MismatchError: A store of another identity is there, or ``plan`` has another length.
        SettingError: The folder holds other things and is no part store.
        DamageError: The record ``plan.json`` is damaged, and nothing vouches that it was this one.
        UnreadableError: The system refuses to read what is there.
        UserError: The system refused a write.
    """
    tables = [plan] if isinstance(plan, pa.Table) else plan
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; name a folder as --output")
    begun = (path / "plan.json").is_file() or any(_vouchers(path))
    have = None
    if begun:
        with contextlib.suppress(DamageError, MissingError):
            have = same_set_up(path, identity, tables, class_names)
        if have and not any(damage_of(path / n, o) for n, o in have["objects"].items()):
            return True
    elif path.exists():
        _clear_leftovers(path)

    def sealed(described: Mapping[str, Any]) -> bytes:
        record = {"version": VERSION, **_wanted(identity, class_names)}
        return encode_json({**record, "plan_rows": PLAN_FILE_ROWS, "objects": described})

    if begun and not have:
        objects = _set_up_objects(identity, tables)
        _refuse_unless_vouched(path, zlib.crc32(sealed({n: describe(d) for n, d in objects})))
    described = {}
    for name, data in _set_up_objects(identity, tables):
        described[name] = describe(data)
        wanted = have["objects"][name] if have else described[name]
        wrong = damage_of(path / name, wanted)
        if wrong and wanted != described[name]:
            raise DamageError(
                f"{path / name} {wrong}, and this version of pyarrow or zarr cannot write it as it "
                "was; name another --output"
            )
        if wrong:
            write_atomically(path / name, data)
    if not have:
        write_atomically(path / "plan.json", sealed(described))
    return begun


def _set_up_objects(
    identity: StoreIdentity, tables: Iterable[pa.Table]
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the arrays' metadata and of the files of the plan, one after another."""
    for name, data in array_metadata(identity).items():
        yield f"parts.zarr/{name}", data
    rows = 0
    for number, table in enumerate(in_lengths(tables, PLAN_FILE_ROWS)):
        rows += table.num_rows
        yield f"plan/part-{number:05d}.parquet", encode_table(table)
    if rows != identity.images:
        raise MismatchError(f"the plan has {rows} rows for {identity.images} images")


def same_set_up(
    path: StorePath, identity: StoreIdentity, plan: Iterable[pa.Table], class_names: Sequence[str]
) -> dict[str, Any]:
    """The record ``plan.json`` of a store that was begun as it is wanted now.

    Args:
        path: Folder of the store.
        identity: What the store is to hold.
        plan: One row an image in index order, as tables.
        class_names: Name of each class.

    Raises:
        MissingError: There is no store.
        MismatchError: It is of another identity; the message says what differs.
        DamageError: The record is damaged.
    """
    have, _ = read_set_up(path)
    want = _wanted(identity, class_names)
    different = [
        *_differences(have["identity"], want["identity"]),
        *_differences(have["class_names"], want["class_names"], "class_names"),
    ]
    if not different:
        return have
    # What a digest stands for is told by the images themselves.
    different = [told for told in different if not told.startswith("plan_fingerprint")]
    way_out = "use the same ones to go on with it, or name another --output"
    if len({"", have["identity"]["updated_from"], want["identity"]["updated_from"]}) == 3:
        different.append("the store that --update names is another one, or has changed or grown")
    if have["identity"]["plan_fingerprint"] != want["identity"]["plan_fingerprint"]:
        different.append(f"images: {plan_changes(plan_tables(path, have), plan)}")
        way_out += (
            f", where `semmae stage1 extract-parts --update {path}` takes over what stayed the same"
        )
    raise MismatchError(
        f"the part store {path} was begun with other settings ({'; '.join(different)}); {way_out}"
    )


def _wanted(identity: StoreIdentity, class_names: Sequence[str]) -> dict[str, Any]:
    return {"identity": identity.to_record(), "class_names": list(class_names)}


def _refuse_unless_vouched(path: StorePath, crc32: int) -> None:
    """Refuse a damaged ``plan.json`` unless another record says that it had this CRC-32."""
    if crc32 in _vouchers(path):
        return
    raise DamageError(
        f"{path / 'plan.json'} is damaged, and no record vouches that it was that of this run; "
        "name another --output"
    )


def _vouchers(path: StorePath) -> Iterator[int]:
    """The CRC-32 of ``plan.json`` by each sound record that has it."""
    commits: list[StorePath] = sorted((path / "commits").glob("*.json"), key=str)
    for place in (path / "complete.json", *commits):
        with contextlib.suppress(DamageError, MissingError):
            if "plan" in (record := read_json(place)):
                yield record["plan"]


def write_shard(
    path: StorePath,
    shard: int,
    labels: NDArray[np.uint8],
    meta: pa.Table,
    class_attention: NDArray[np.float16] | None = None,
    probabilities: NDArray[np.float16] | None = None,
    *,
    image_cache: Mapping[str, int] | None = None,
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
        image_cache: Size and CRC-32 of the shard's cached images, which `write_image_cache` wrote
            already, where the store keeps them.

    Returns:
        The commit record: ``shard, start, stop, ok, bad``, ``plan`` (CRC-32 of plan.json) and
        ``objects``.

    Raises:
        MissingError: There is no store, or no more.
        MismatchError: An array or the meta rows do not fit the store.
        DamageError: The set-up of the store is damaged.
        UserError: The system refused a write.
    """
    plan, identity = same_store(path)
    start, stop = identity.shard_range(shard)
    table = checked_meta(identity, shard, meta)
    ok = np.asarray(pc.equal(table["status"], "ok").to_numpy(), dtype=np.bool_)
    specs = array_specs(identity)
    given = {"labels": labels, "class_attention": class_attention, "probabilities": probabilities}
    for name, values in given.items():
        if values is not None and name not in specs:
            raise MismatchError(f"the part store {path} was set up without {name}")
    if (image_cache is not None) != bool(identity.image_cache):
        raise MismatchError(
            f"the part store {path} was set up {'with' if identity.image_cache else 'without'} an "
            f"image cache, but shard {shard} came {'without' if identity.image_cache else 'with'}"
        )
    objects = {}
    for (name, spec), place in zip(specs.items(), object_names(identity, shard), strict=False):
        limit = identity.parts if name == "labels" else np.inf
        values = checked_array(name, spec, given[name], ok, limit)
        objects[place] = ShardCodec(path, plan, identity, name).encode(shard, values)
    objects[meta_name(shard)] = encode_table(table)
    for place, data in objects.items():
        write_atomically(path / place, data)
    described = {place: describe(data) for place, data in objects.items()}
    if image_cache is not None:
        described[image_cache_name(identity, shard)] = dict(image_cache)
    commit = {
        "shard": shard,
        "start": start,
        "stop": stop,
        "ok": int(ok.sum()),
        "bad": int((~ok).sum()),
        "plan": record_crc32(plan),
        "objects": described,
    }
    write_json(commit_path(path, shard), commit)
    return commit


def uncommit(path: StorePath, shards: Iterable[int]) -> None:
    """Take back the commit records of shards, so that the next run writes them anew.

    Args:
        path: Folder of the store; it counts as not complete afterwards.
        shards: Numbers of the shards; those without a record are passed over.

    Raises:
        MissingError: The store is gone; nothing is removed then.
        UserError: The system refused to remove a record.
    """
    same_store(path)
    try:
        (path / "complete.json").unlink(missing_ok=True)
        for shard in shards:
            commit_path(path, shard).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}") from error
