"""Indices of archives, kept for the next command.

For one, a tar's headers are read or all images of a Parquet file: behind a URL that is nearly all
of ImageNet's 140 GB, at each command.  They are kept in ``$XDG_CACHE_HOME/semmae/archives``
(``~/.cache`` where it is not set), which may be removed at any time: only time is at stake.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..storage.files import read_whole, write_atomically
from ..storage.part_records import decode_table, encode_table
from .archives import ArchiveIndex, Index
from .data_root import DataRoot

_LAYOUT = "semmae archive index 1"


def kept(index: Index, kind: str) -> Index:
    """An index function that goes through an archive once, for as long as that stays as it is.

    Args:
        index: Goes through it.
        kind: Of the archives, such as ``tar``.

    Returns:
        The same function, but for archives of a place, size and last change that it has seen.
    """

    def known_or_found(root: DataRoot, path: str) -> ArchiveIndex:
        place = _place_of(root, path, kind)
        if place is None:
            return index(root, path)
        with contextlib.suppress(OSError, UserError, pa.ArrowException, KeyError):
            return _index_of(decode_table(read_whole(place)))
        found = index(root, path)
        with contextlib.suppress(OSError, UserError):
            write_atomically(place, encode_table(_table_of(found)))
        return found

    return known_or_found


def _place_of(root: DataRoot, path: str, kind: str) -> Path | None:
    """The file that keeps an archive's index; None where nothing tells whether it has changed."""
    status = root.status(path)
    if status is None or not status.changed:
        return None
    words = (_LAYOUT, kind, root.place(path), str(status.size), status.changed)
    name = hashlib.sha256("\n".join(words).encode(errors="surrogateescape")).hexdigest()
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # this user has no home
        return None
    return caches / "semmae" / "archives" / f"{name}.parquet"


def _table_of(index: ArchiveIndex) -> pa.Table:
    columns = {"size": pa.array(index.sizes), "label": pa.array(index.labels)}
    if index.members is not None:
        columns["member"] = index.members
    if index.offsets is not None:
        columns["offset"] = pa.array(index.offsets)
    return pa.table(columns)


def _index_of(table: pa.Table) -> ArchiveIndex:
    def numbers(name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.asarray(table[name].to_numpy(), dtype=np.int64)

    in_tar = "member" in table.column_names
    return ArchiveIndex(
        numbers("size"),
        numbers("label"),
        table["member"].combine_chunks() if in_tar else None,
        numbers("offset") if in_tar else None,
    )
