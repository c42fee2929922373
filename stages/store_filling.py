"""What every command that fills a part store shares: reading images, meta rows, the run itself."""

import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from .. import __version__
from ..errors import SettingError
from ..pipeline.crops import squash
from ..pipeline.decoding import BadImage, decode_image
from ..pipeline.options import plain_options
from ..pipeline.plan import Plan
from ..pipeline.progress import Progress
from ..pipeline.sources import ImageReader
from ..storage.files import write_json
from ..storage.image_cache import CachedImage
from ..storage.part_identity import META_SCHEMA, StoreIdentity
from ..storage.part_writer import (
    committed_shards,
    complete_store,
    create_store,
    damaged_shards,
    uncommit,
    write_shard,
)


class FillOptions(Protocol):
    """What the options of a command that fills a store have."""

    @property
    def data(self) -> str:
        """Images: a folder, or Parquet."""

    @property
    def output(self) -> Path:
        """Folder of the part store."""


class LoadedImage(NamedTuple):
    """One image as it was read: its size and pixels, or why there are none."""

    pixels: NDArray[np.uint8] | None
    height: int | None
    width: int | None
    crc32: int
    bad: BadImage | None
    kept: CachedImage | None = None


def load_image(
    reader: ImageReader,
    index: int,
    image_size: tuple[int, int] | None = None,
    keep: Callable[[bytes, NDArray[np.uint8]], CachedImage] | None = None,
) -> LoadedImage:
    """Read, check and decode one image.

    Args:
        reader: Of the images.
        index: Position in the plan.
        image_size: (H, W) that the pixels are squashed to; None keeps no pixels, only what is
            known of them.
        keep: Makes what the store's image cache keeps of an image, from its encoded bytes and
            decoded pixels; None without a cache.

    Returns:
        ``pixels`` uint8 (H, W, 3) or None, height and width of the whole image, CRC-32 of its
        encoded bytes (0 if they cannot be read), for a bad image why it is, and what ``keep`` made.
    """
    checksum = 0
    try:
        data = reader.read(index)
        checksum = zlib.crc32(data)
        image = decode_image(data)
    except BadImage as bad:
        return LoadedImage(None, None, None, checksum, bad)
    pixels = None if image_size is None else squash(image, image_size)
    kept = None if keep is None else keep(data, image)
    return LoadedImage(pixels, image.shape[0], image.shape[1], checksum, None, kept)


def meta_rows(
    plan: Plan,
    first: int,
    loaded: list[LoadedImage],
    labels: NDArray[np.uint8],
    confidence: NDArray[np.floating],
    parts: int,
) -> list[dict[str, Any]]:
    """Rows of `META_SCHEMA` of consecutive images.

    Args:
        plan: Of the store.
        first: Position of the first of the images in it.
        loaded: The n images.
        labels: (n, rows, columns) uint8, part ids below ``parts``; those of bad images are ignored.
        confidence: (n,), mean over the patches of an image.
        parts: Number of part ids.
    """
    keys, classes, rows = plan.keys, plan.labels, []
    for place, image in enumerate(loaded):
        index, bad = first + place, image.bad
        flat = labels[place].ravel()
        areas = np.bincount(flat, minlength=parts) / flat.size
        rows.append(
            {
                "index": index,
                "key": keys[index],
                "label": int(classes[index]),
                "width": image.width,
                "height": image.height,
                "crc32": image.crc32,
                "status": "ok" if bad is None else "bad",
                "error_code": bad and bad.code,
                "error_kind": bad and bad.kind,
                "error": bad and bad.message,
                "confidence": float(confidence[place]) if bad is None else None,
                "part_areas": areas.tolist() if bad is None else None,
            }
        )
    return rows


def commit_shard(
    output: Path,
    shard: int,
    rows: list[dict[str, Any]],
    image_cache: Mapping[str, int] | None = None,
    **arrays: NDArray[Any],
) -> dict[str, Any]:
    """Write one shard of the store: what it takes as `write_shard` does.

    Returns:
        ``shard``, and counts ``ok`` and ``bad``.
    """
    meta = pa.Table.from_pylist(rows, META_SCHEMA)
    commit = write_shard(output, shard, meta=meta, image_cache=image_cache, **arrays)
    return {name: commit[name] for name in ("shard", "ok", "bad")}


def fill_store(
    command: str,
    doing: str,
    options: FillOptions,
    identity: StoreIdentity,
    plan: Plan,
    work: Callable[[list[int]], Iterable[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Fill and complete a store, or go on where an earlier call was interrupted.

    Args:
        command: Name of the command, for the record of the run.
        doing: The same as an activity, for the progress shown.
        options: Settings of the command.
        identity: What the store is to hold.
        plan: Its images.
        work: Commits the shards it is given, in any order, and gives for each a record with the
            counts ``ok`` and ``bad``; not called if none is left to do.

    Returns:
        The record ``complete.json``: ``images``, ``ok``, ``bad`` and checksums.

    Raises:
        MismatchError: The output holds a store of another identity.
        SettingError: Not one image can be read, or the output holds other things.
        DamageError: A finished shard was damaged meanwhile.
    """
    create_store(options.output, identity, plan.table, plan.class_names)
    if not (options.output / "complete.json").exists():
        # What an interrupted run left may have been altered since; what is damaged is done again.
        uncommit(options.output, damaged_shards(options.output))
    done = committed_shards(options.output)
    todo = [shard for shard in range(identity.shards) if shard not in done]
    started = datetime.now(UTC)
    finished = sum(stop - start for start, stop in map(identity.shard_range, done))
    bad = 0
    if todo:
        with Progress(doing, identity.images, "image", finished) as progress:
            for record in work(todo):
                bad += record["bad"]
                progress.update(record["ok"] + record["bad"], bad=bad)
    complete = complete_store(options.output)
    _record_run(command, options, started, len(todo), complete)
    if not complete["ok"]:
        raise SettingError(
            f"not one of the {complete['images']} images in {options.data} could be read: "
            f"the error columns of {options.output / 'meta'} say why"
        )
    return complete


def _record_run(
    command: str, options: FillOptions, started: datetime, shards: int, complete: dict[str, Any]
) -> None:
    """Keep what differs from run to run apart from the store itself."""
    write_json(
        options.output / "runs" / f"{started:%Y%m%dT%H%M%S.%f}Z.json",
        {
            "command": command,
            "options": plain_options(options),
            "started": started.isoformat(),
            "finished": datetime.now(UTC).isoformat(),
            "shards": shards,
            "ok": complete["ok"],
            "bad": complete["bad"],
            "versions": {"semmae": __version__, "torch": torch.__version__},
        },
    )
    if complete["bad"]:
        print(
            f"{complete['bad']} of {complete['images']} images could not be used: status and "
            f"error in {options.output / 'meta'} name them",
            file=sys.stderr,
        )
