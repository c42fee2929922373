"""`semmae parts verify --data`: whether images are still those that a store was made of.

A store knows the CRC-32 of every image that it was made of.  Extraction compares names and sizes
alone, which a listing gives; what was changed in place with equal size is found by reading it.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import DamageError, MissingError, UnreadableError
from ..pipeline.decoding import BadImage
from ..pipeline.plan import plan_of_rows
from ..pipeline.plan_matching import MATCHED, matches_of
from ..pipeline.progress import Progress
from ..pipeline.sources import ImageReader, list_images
from ..storage.files import read_checked
from ..storage.lookahead import done_ahead
from ..storage.part_records import decode_table, meta_name, plan_tables, read_commit, read_set_up
from ..storage.store_paths import StorePath

_READERS = 16
"""Threads that read images: waiting for them is most of the cost."""

_BLOCK = 512
"""Images that a thread reads in order, so that a row group of Parquet is read about once."""


class ChangedImage(NamedTuple):
    """An image that is not the one that a row of the store was made of."""

    key: str
    reason: str
    """A few words: ``is not there``, ``has another size``, ..."""

    def __str__(self) -> str:
        return f"{self.key} {self.reason}"


class _Block(NamedTuple):
    """Images to be read."""

    images: int
    """Of the store, those that need not be read too."""
    known: dict[str, int]
    """CRC-32 of each image to read by key, 0 of one that could not be read."""
    reader: ImageReader
    found: list[ChangedImage]
    """Those that a listing tells of."""


def changed_images(path: StorePath, data: str) -> Iterator[ChangedImage]:
    """Read the images of a store and compare them with its rows.

    Rows of shards that are not committed or damaged are passed over; so are images that the store
    does not know.

    Args:
        path: Folder of the store.
        data: Where its images are now: a folder, Parquet or tars, or a URL.

    Yields:
        Those that are missing or others, block by block in the order of the store.

    Raises:
        MissingError: There is no store, or no images.
        DamageError: The plan of the store, or a Parquet file or tar of the data, is damaged.
        UserError: The storage does not answer.
    """
    _, identity = read_set_up(path)
    with Progress("comparing images", identity.images, "image") as progress:
        for images, changed in done_ahead(_compared, _blocks(path, data), _READERS):
            yield from changed
            progress.update(images)


def _blocks(path: StorePath, data: str) -> Iterator[_Block]:
    record, identity = read_set_up(path)
    now = list_images(data)
    matches = matches_of(plan_tables(path, record), now.tables(MATCHED), identity.images)
    had = np.concatenate([table["bytes"].to_numpy() for table in plan_tables(path, record)])
    for shard in range(identity.shards):
        first, stop = identity.shard_range(shard)
        name = meta_name(shard)
        try:
            described = read_commit(path, identity, shard)["objects"][name]
            meta = decode_table(read_checked(path / name, described), ["key", "crc32"])
        except (MissingError, DamageError, UnreadableError):
            continue
        for start in range(first, stop, _BLOCK):
            here = slice(start, min(start + _BLOCK, stop))
            rows, sizes = matches.rows[here], matches.sizes[here]
            table = meta.slice(start - first, len(rows))
            keys = table["key"].to_pylist()
            same = sizes == had[here]
            found = [
                ChangedImage(
                    keys[place], "has another size" if rows[place] >= 0 else "is not there"
                )
                for place in np.flatnonzero(~same).tolist()
            ]
            # A tar that was packed anew may hold the same images in another order.
            there = now.take(np.sort(rows[same])) if same.any() else now.tables()[0].slice(0, 0)
            plan = plan_of_rows(now.root, there, now.class_names)
            known = dict(zip(keys, table["crc32"].to_pylist(), strict=True))
            yield _Block(len(rows), known, ImageReader(plan, in_memory_limit=0), found)


def _compared(block: _Block) -> tuple[int, list[ChangedImage]]:
    """How many images of the store a block stands for, and those that changed."""
    changed = list(block.found)
    for index, key in enumerate(block.reader.plan.table["key"].to_pylist()):
        crc32, unread = 0, ""
        try:
            crc32 = zlib.crc32(block.reader.read(index))
        except BadImage as bad:
            unread = f"cannot be read: {bad}"
        if crc32 != block.known[key]:
            other = "has the same size and other content"
            now_read = "can be read now, and could not be then"
            changed.append(ChangedImage(key, unread or (other if block.known[key] else now_read)))
    return block.images, changed
