"""Reading a part store: which part each patch of each image belongs to.

Nothing unchecked reaches a caller: what is read is compared with its commit record, which
``complete.json`` vouches for.  Layout: `part_records`; writing: `part_writer`.

Legend: N images, H attention heads, P parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray

from ..errors import DamageError, MissingError, SettingError
from .files import read_checked, read_json, record_crc32
from .image_cache import ImageCache
from .lookahead import each_in
from .mapped_arrays import mapped_array
from .part_identity import META_SCHEMA, StoreIdentity
from .part_records import (
    WAY_OUT,
    commit_path,
    decode_table,
    meta_name,
    plan_table,
    plan_tables,
    read_commit,
    read_set_up,
)
from .part_shards import ArraySpec, ShardCodec, array_specs
from .remote_arrays import RemoteArrayStore
from .remote_path import RemotePath
from .store_paths import StorePath, sizes_below


class PartStore:
    """A complete part store, for reading.  Use `open`."""

    def __init__(
        self, path: StorePath, complete: Mapping[str, Any], plan: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.identity = StoreIdentity.from_record(plan["identity"])
        self.class_names: tuple[str, ...] = tuple(plan["class_names"])
        self.fingerprint = f"{record_crc32(complete):08x}"
        """CRC-32 of complete.json, which vouches for every byte of the store; 8 hex digits."""
        self._complete, self._plan = complete, plan

    @classmethod
    def open(cls, path: StorePath) -> "PartStore":
        """Open a store; its objects are checked when they are read.

        Args:
            path: Folder of the store.

        Raises:
            MissingError: There is no store.
            DamageError: The store is not complete, or its records are damaged.
            MismatchError: The store has another format version.
        """
        plan, _ = read_set_up(path)
        try:
            complete = read_json(path / "complete.json")
        except MissingError:
            raise DamageError(
                f"the part store {path} is not complete (it has no complete.json); {WAY_OUT}"
            ) from None
        if record_crc32(plan) != complete["plan"]:
            raise DamageError(f"plan.json and complete.json of {path} are of two stores")
        return cls(path, complete, plan)

    @property
    def shards(self) -> list[int]:
        """The shards that can be read: all, as the store is complete."""
        return [int(shard) for shard in self._complete["commits"]]

    @cached_property
    def _objects(self) -> dict[str, dict[str, int]]:
        """What the commit records say of every object of the shards."""
        objects: dict[str, dict[str, int]] = {}
        for found in each_in(self.path, self._objects_of, self.shards):
            objects.update(found)
        return objects

    def _objects_of(self, shard: int) -> dict[str, dict[str, int]]:
        place = commit_path(self.path, shard)
        commit = read_commit(self.path, self.identity, shard)
        if record_crc32(commit) != self._complete["commits"][f"{shard:05d}"]:
            raise DamageError(f"{place} was written after the store was complete; {WAY_OUT}")
        objects: dict[str, dict[str, int]] = commit["objects"]
        return objects

    def _read(self, names: Sequence[str]) -> Iterator[bytes]:
        """The content of objects of shards, each after checking it."""
        objects = self._objects  # here, not in each of several threads
        return each_in(self.path, lambda name: read_checked(self.path / name, objects[name]), names)

    def plan(self) -> pa.Table:
        """The file plan, one row an image in index order.

        Raises:
            DamageError: A file of it is not what was written.
        """
        return plan_table(self.path, self._plan)

    def plan_tables(self) -> Iterator[pa.Table]:
        """The file plan as tables in index order, in the memory of one of its files.

        Raises:
            DamageError: A file of it is not what was written.
        """
        return plan_tables(self.path, self._plan)

    def meta(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """The meta rows, one an image in index order.

        Args:
            columns: Columns of `META_SCHEMA` wanted; None for all.
            start: First row wanted.
            stop: One past the last row wanted, above ``start``; None for all.

        Raises:
            SettingError: There is no such column.
            DamageError: A file of it is not what was written.
        """
        unknown = sorted(set(columns or ()) - set(META_SCHEMA.names))
        if unknown:
            raise SettingError(f"no column {unknown} in meta; there are {META_SCHEMA.names}")
        rows = self.identity.shard_size
        stop = self.identity.images if stop is None else stop
        first = start // rows
        names = [meta_name(shard) for shard in range(first, -(-stop // rows))]
        found = pa.concat_tables([decode_table(data, columns) for data in self._read(names)])
        return found.slice(start - first * rows, stop - start)

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
        of this user under the system's temporary one where the store lies behind a URL or cannot be
        written to.

        Returns:
            (N, rows, columns) uint8: part ids below ``identity.parts``, and `UNLABELLED` on every
            patch of an image that `ok` says is bad.

        Raises:
            DamageError: A shard is not what was written.
            UserError: Neither cache could be written.
        """
        return self._mapped("labels", "labels", "uint8", np.asarray)

    def mean_attention(self) -> NDArray[np.float16]:
        """Attention of the class token, its heads averaged, memory-mapped and read-only.

        Kept as `labels` are, in ``cache/attention-<fingerprint>.npy``.

        Returns:
            (N, rows, columns) float16; NaN for bad images.

        Raises:
            MissingError: The store was made without it.
            DamageError: A shard is not what was written.
            UserError: Neither cache could be written.
        """
        return self._mapped("attention", "class_attention", "float16", _over_heads)

    def _mapped(
        self, name: str, array: str, dtype: str, made: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> NDArray[Any]:
        """What is made of each shard of an array, from a cache file."""
        spec = self._spec(array)

        def blocks() -> Iterator[NDArray[Any]]:
            codec = ShardCodec(self.path, self._plan, self.identity, array)
            shards = range(self.identity.shards)
            names = [f"parts.zarr/{array}/{spec.key(shard)}" for shard in shards]
            for shard, data in enumerate(self._read(names)):
                yield made(codec.decode(shard, data))

        place = self.path / "cache" / f"{name}-{self.fingerprint}.npy"
        return mapped_array(place, (self.identity.images, *self.identity.grid), dtype, blocks)

    def _spec(self, array: str) -> ArraySpec:
        """How an array is stored.

        Raises:
            MissingError: The store was made without it.
        """
        specs = array_specs(self.identity)
        if array not in specs:
            raise MissingError(
                f"the part store {self.path} has no {array}; extract the parts anew with "
                f"--{array.replace('_', '-')} into another --output"
            )
        return specs[array]

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

    def shard(self, name: str, shard: int) -> NDArray[Any]:
        """One shard of an array, read and checked anew, by no cache.

        Args:
            name: ``labels``, ``class_attention`` or ``probabilities``, where the store has it.
            shard: Number of the shard.

        Returns:
            (n, ...) as the array has it.

        Raises:
            DamageError: The shard is not what was written.
        """
        place = f"parts.zarr/{name}/{array_specs(self.identity)[name].key(shard)}"
        codec = ShardCodec(self.path, self._plan, self.identity, name)
        return codec.decode(shard, read_checked(self.path / place, self._objects[place]))

    def image_cache(self) -> ImageCache:
        """The images that the store keeps, read from files by index.

        Raises:
            MissingError: The store was made without them.
            DamageError: A commit record is not what was written.
        """
        if not self.identity.image_cache:
            raise MissingError(
                f"the part store {self.path} keeps no images; extract or import the parts "
                "anew with --cache-images 256 into another --output"
            )
        return ImageCache(self.path, self.identity, self._objects)

    def _float_array(self, name: str) -> zarr.Array[Any]:
        self._spec(name)
        above = f"parts.zarr/{name}/"
        wanted = {
            place.removeprefix(above): known["size"]
            for place, known in self._objects.items()
            if place.startswith(above)
        }
        folder = self.path / "parts.zarr" / name
        found = sizes_below(folder)
        for inner, size in wanted.items():
            # Zarr would give the fill value for a shard that is gone.
            if found.get(inner) != size:
                raise DamageError(f"{folder / inner} is missing or cut; {WAY_OUT}")
        described = self._plan["objects"][f"{above}zarr.json"]
        metadata = read_checked(folder / "zarr.json", described)
        if isinstance(folder, RemotePath):
            return zarr.open_array(RemoteArrayStore(folder, metadata, wanted), mode="r")
        return zarr.open_array(folder, mode="r")


def _over_heads(attention: NDArray[np.float16]) -> NDArray[np.float16]:
    """Attention (n, H, rows, columns) averaged over its heads."""
    # Exact in float64, so that every machine has the same bits whatever the order of the sum.
    return np.asarray(attention.mean(axis=1, dtype=np.float64), dtype=np.float16)
