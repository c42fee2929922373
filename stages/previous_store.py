"""Rows of an earlier part store that a new one takes over: images that stayed the same.

Legend: n images of a shard.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import DamageError, MismatchError, MissingError
from ..pipeline.plan import Plan
from ..pipeline.plan_matching import MATCHED, matches_of
from ..storage.files import atomic_file, read_json, record_crc32
from ..storage.lookahead import each_in
from ..storage.part_identity import StoreIdentity
from ..storage.part_records import commit_name, read_commit, read_set_up
from ..storage.part_store import PartStore
from ..storage.store_paths import StorePath, read_range

_MAY_DIFFER = (
    "images",
    "shard_size",
    "batch_size",
    "device_type",
    "plan_fingerprint",
    # The cache is made anew of every image.
    "image_cache",
    "image_cache_side",
    "image_cache_recipe",
)


_ENDED_THEIR_PROCESS = "fatal", "hanging"
"""Error codes of images whose decoding ended or hung the process, as `shard_images` gives them."""

_ROW = np.dtype("<i8")
"""Of the file that says which row of the earlier store each image is, -1 for none."""


class PreviousStore(PartStore):
    """A store to take rows over from; of one that is not complete, those of its committed shards.

    What is asked of it must lie in its `shards`.
    """

    def _objects_of(self, shard: int) -> dict[str, dict[str, int]]:
        with _telling_damage(self, shard):
            return super()._objects_of(shard)

    @classmethod
    def open(cls, path: StorePath) -> PartStore:
        """Open a store, complete or not; its objects are checked when they are read.

        The fingerprint of one that is not complete is made of its plan and of the commit records
        that stand, so it is another one as soon as a shard is added.

        Args:
            path: Folder of the store.

        Raises:
            MissingError: There is no store, or not one shard of it is committed.
            DamageError: Its records are damaged.
            MismatchError: The store has another format version.
            UnreadableError: The system refuses to read a record.
        """
        with contextlib.suppress(MissingError):
            try:
                read_json(path / "complete.json")
            except DamageError as error:
                raise DamageError(
                    f"{error}: mend the earlier store by `semmae parts repair {path}`, or remove "
                    "that file, which has its shards taken one by one"
                ) from error
            store = super().open(path)
            _ = store._objects  # so that a damaged record is told now, and as its own shard's
            return store
        plan, identity = read_set_up(path)
        standing = {"plan": record_crc32(plan)}

        def commit_of(shard: int) -> int | None:
            # A shard without a sound record is not there: its images are encoded anew.
            with contextlib.suppress(MissingError, DamageError):
                commit = read_commit(path, identity, shard)
                return record_crc32(commit) if commit["plan"] == standing["plan"] else None
            return None

        shards = range(identity.shards)
        found = zip(shards, each_in(path, commit_of, shards), strict=True)
        commits = {f"{shard:05d}": crc32 for shard, crc32 in found if crc32 is not None}
        if not commits:
            raise MissingError(
                f"--update is {path}, of which not one shard is done: leave it out, or go on with "
                "that store"
            )
        return cls(path, {**standing, "commits": commits}, plan)


def refuse_other_parts(old: PartStore, identity: StoreIdentity) -> None:
    """Refuse to take over the parts of another learner, grid or precision.

    Args:
        old: The earlier store.
        identity: Of the new one.

    Raises:
        MismatchError: They differ in more than their images.
    """
    free = {name: getattr(identity, name) for name in (*_MAY_DIFFER, "updated_from")}
    have = dataclasses.replace(old.identity, **free).to_record()
    want = identity.to_record()
    different = [
        f"{name}: {have[name]!r} there, {want[name]!r} here"
        for name in want
        if have[name] != want[name]
    ]
    if different:
        raise MismatchError(
            f"--update is {old.path}, but its parts are others ({'; '.join(different)}): use the "
            "settings it was made with, or extract all parts anew without --update"
        )


def previous_rows(old: PartStore, plan: Plan) -> NDArray[np.int64]:
    """Which row of an earlier store has the key and the size of each image, -1 for none.

    Args:
        old: The earlier store.
        plan: The images of the new one.

    Returns:
        (N,) for the N images of ``plan``.
    """
    rows, sizes = matches_of(plan.tables(MATCHED), old.plan_tables(), len(plan))
    rows[sizes != plan.sizes] = -1
    if len(old.shards) < old.identity.shards:
        rows[~np.isin(rows // old.identity.shard_size, old.shards)] = -1
    return rows


def keep_previous(output: StorePath, fingerprint: str, rows: NDArray[np.int64]) -> None:
    """Keep what `previous_rows` found where the workers look for it.

    Args:
        output: Folder of the new store; its ``cache/`` is written to.
        fingerprint: Of the earlier store.
        rows: Of the images of the new one.
    """
    with atomic_file(_place(output, fingerprint)) as temporary, temporary.open("wb") as file:
        rows.astype(_ROW).tofile(file)


def _place(output: StorePath, fingerprint: str) -> StorePath:
    return output / "cache" / f"previous-{fingerprint}.int64"


class PreviousRows:
    """What an earlier store holds of the images of one shard.

    Args:
        old: The earlier store.
        output: Folder of the new store, after `keep_previous`.
        start: First row of the shard.
        stop: One past its last row.

    Raises:
        MismatchError: The earlier store is not what it was then.
        DamageError: Meta rows of it are not what was written.
    """

    def __init__(self, old: PartStore, output: StorePath, start: int, stop: int) -> None:
        size = _ROW.itemsize
        try:
            kept = read_range(_place(output, old.fingerprint), start * size, stop * size)
        except FileNotFoundError as error:
            raise MismatchError(
                f"--update is {old.path}, which has changed or grown since this run began: see to "
                "it that nothing writes to it, and name another --output"
            ) from error
        self._old, self._rows = old, np.frombuffer(kept, dtype=_ROW).astype(np.int64)
        there = self._rows[self._rows >= 0]
        self._meta: dict[int, dict[str, Any]] = {}
        # Shard by shard: between two of them may be one that the earlier store lacks.
        for shard in np.unique(there // old.identity.shard_size).tolist():
            rows = there[there // old.identity.shard_size == shard]
            first, last = int(rows.min()), int(rows.max())
            with _telling_damage(old, shard):
                found = old.meta(start=first, stop=last + 1).take(pa.array(rows - first))
            self._meta |= zip(rows.tolist(), found.to_pylist(), strict=True)
        self._shards: dict[tuple[str, int], NDArray[Any]] = {}

    def crc32(self, place: int) -> int | None:
        """CRC-32 of the encoded image that had this key and size; None if there was none.

        Nor is one known whose decoding ended or hung its process: that may have been the machine.
        """
        row = int(self._rows[place])
        if row < 0 or self._meta[row]["error_code"] in _ENDED_THEIR_PROCESS:
            return None
        return int(self._meta[row]["crc32"])

    def meta_row(self, place: int, row: dict[str, Any]) -> dict[str, Any]:
        """The meta row of an image with what the earlier store says; index and label stay."""
        known = self._meta[int(self._rows[place])]
        return {**known, "index": row["index"], "label": row["label"]}

    def array(self, name: str, places: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of one of its arrays: ``labels``, ``class_attention`` or ``probabilities``.

        Raises:
            DamageError: A shard of the earlier store is not what was written.
        """
        size = self._old.identity.shard_size
        rows = self._rows[places]
        return np.stack([self._shard(name, row // size)[row % size] for row in rows.tolist()])

    def _shard(self, name: str, shard: int) -> NDArray[Any]:
        # Not the labels that readers keep decoded: what is taken over must be checked.
        if (name, shard) not in self._shards:
            with _telling_damage(self._old, shard):
                self._shards[name, shard] = self._old.shard(name, shard)
        return self._shards[name, shard]


@contextlib.contextmanager
def _telling_damage(old: PartStore, shard: int) -> Iterator[None]:
    """Says what to do where a shard of the earlier store is damaged, or its record is gone."""
    try:
        yield
    except (DamageError, MissingError) as error:
        raise DamageError(
            f"{error}: mend the earlier store by `semmae parts repair {old.path}`; or, where its "
            f"images are no longer those of then, remove complete.json and {commit_name(shard)} "
            "there, which has that shard's images encoded anew, and name another --output"
        ) from error
