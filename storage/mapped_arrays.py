"""Arrays made of a store's shards once, kept in ``.npy`` files, and mapped into memory.

A file ends with the CRC-32 of all before, which readers of ``.npy`` files pass over.
"""

import contextlib
import io
import itertools
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DamageError, UnreadableError, UserError
from .files import atomic_file, file_crc32
from .store_paths import StorePath

CHECKED_BYTES = 1 << 30
"""Files up to this size, ImageNet's among them, are compared with their CRC-32 before they are
mapped, in a fraction of a second; larger ones would be read whole for it at each start."""

_RESIDUE = 0x2144DF1C
"""CRC-32 of any bytes that end with the CRC-32 of those before, lowest byte first."""

Blocks = Callable[[], Iterable[NDArray[Any]]]


def mapped_array(
    place: StorePath, shape: tuple[int, ...], dtype: str, blocks: Blocks
) -> NDArray[Any]:
    """An array that is made once and memory-mapped read-only; made anew where its file was altered.

    Args:
        place: File that keeps it.  Where that is behind a URL or cannot be written, a file of its
            name is kept in a folder of this user under the system's temporary one.
        shape: Its shape.
        dtype: Its dtype.
        blocks: Makes it, as blocks along the first axis in order; called if no file has it.

    Raises:
        UserError: Neither file could be written.
        DamageError: The file cannot be read back.  What making it raises passes through.
    """
    if isinstance(place, Path):
        try:
            return _kept_or_made(place, shape, dtype, blocks)
        except (DamageError, UnreadableError):
            raise
        except UserError:
            pass
    return _kept_or_made(_private_folder() / place.name, shape, dtype, blocks)


def _kept_or_made(place: Path, shape: tuple[int, ...], dtype: str, blocks: Blocks) -> NDArray[Any]:
    kept = _kept(place, shape, dtype)
    return _made(place, shape, dtype, blocks) if kept is None else kept


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


def _kept(place: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any] | None:
    """The array of a file; None if it is absent, altered or of no use."""
    try:
        if place.stat().st_size <= CHECKED_BYTES and file_crc32(place) != _RESIDUE:
            return None
        values: NDArray[Any] = np.load(place, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == shape and values.dtype == dtype else None


def _made(place: Path, shape: tuple[int, ...], dtype: str, blocks: Blocks) -> NDArray[Any]:
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, described)
    # Plain writes: on a full disk they raise, where a writable memory map kills the process.
    with atomic_file(place) as temporary, temporary.open("wb") as file:
        crc32 = 0
        for data in itertools.chain((header.getvalue(),), (block.tobytes() for block in blocks())):
            crc32 = zlib.crc32(data, crc32)
            file.write(data)
        file.write(crc32.to_bytes(4, "little"))
    values = _kept(place, shape, dtype)
    if values is None:
        raise DamageError(f"the cache {place} cannot be read back; remove it and try again")
    return values
