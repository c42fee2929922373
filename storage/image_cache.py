"""The image cache of a part store: one file a shard, written as a stream, read through memory maps
or, behind a URL, by ranges.

    payloads    one after another in the order of the images; a bad image has none
    footer      one `_ENTRY` an image: offset, length, height, width, CRC-32 of the payload
    trailer     `_TRAILER`: magic, version of this format, images, CRC-32 of the footer

A payload is the bytes of a JPEG, or raw uint8 (h, w, 3), by the store's identity.  The bytes of a
file are a function of its payloads alone, and the commit record vouches for them as for those of
every object.  All numbers are little-endian.
"""

import contextlib
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DamageError, MismatchError, MissingError, UserError
from .files import atomic_file, damage_of
from .part_identity import StoreIdentity
from .part_records import WAY_OUT, image_cache_name
from .remote_path import RemotePath
from .store_paths import StorePath

_ENTRY = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("height", "<u4"), ("width", "<u4"), ("crc32", "<u4")]
)
_TRAILER = struct.Struct("<8sIII")
_MAGIC, _VERSION = b"semmaeIC", 1

_OPEN_FILES = 512
"""Shards that a process keeps mapped: each map holds a file, and 1024 is a usual limit of them."""


class CachedImage(NamedTuple):
    """One image as a cache keeps it."""

    payload: bytes | NDArray[np.uint8]
    """Bytes of a JPEG, or uint8 (height, width, 3), contiguous."""
    height: int
    width: int


class ImageCacheWriter:
    """Takes the images of a shard one after another.  Use `write_image_cache`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._size = self._crc32 = 0

    def extend(self, images: Iterable[CachedImage | None]) -> None:
        """Write the next images of the shard; None stands for a bad one."""
        for image in images:
            if image is None:
                self._entries.append((self._size, 0, 0, 0, 0))
                continue
            data = memoryview(image.payload)
            place = self._size, data.nbytes, image.height, image.width
            self._entries.append((*place, zlib.crc32(data)))
            self._write(data)

    def finish(self, images: int) -> None:
        """Write footer and trailer.

        Args:
            images: How many the shard has.

        Raises:
            MismatchError: Another number of them was written.
        """
        if len(self._entries) != images:
            raise MismatchError(
                f"an image cache of {images} images was given {len(self._entries)} of them"
            )
        footer = np.array(self._entries, dtype=_ENTRY).tobytes()
        self._write(footer)
        self._write(_TRAILER.pack(_MAGIC, _VERSION, images, zlib.crc32(footer)))

    @property
    def description(self) -> dict[str, int]:
        """Size (bytes) and CRC-32 of the file so far, as `files.describe` gives them."""
        return {"size": self._size, "crc32": self._crc32}

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._size += memoryview(data).nbytes
        self._crc32 = zlib.crc32(data, self._crc32)


@contextlib.contextmanager
def write_image_cache(
    path: StorePath, identity: StoreIdentity, shard: int
) -> Iterator[ImageCacheWriter | None]:
    """Write the cached images of a shard as they come; its file stands when the block ends well.

    Args:
        path: Folder of the store.
        identity: Its identity.
        shard: Number of the shard.

    Yields:
        The writer, which must be given every image of the shard; its ``description`` is then what
        `write_shard` takes.  None for a store without a cache.

    Raises:
        MismatchError: The block gave too few images or too many.
        UserError: The system refused the write.
    """
    if not identity.image_cache:
        yield None
        return
    start, stop = identity.shard_range(shard)
    place = path / image_cache_name(identity, shard)
    written = None
    try:
        with atomic_file(place) as temporary, temporary.open("wb") as file:
            writer = ImageCacheWriter(file)
            yield writer
            writer.finish(stop - start)
            written = writer.description
    except UserError as error:
        # A run that completed the same store meanwhile swept the temporary file of what stands.
        swept = isinstance(error.__cause__, FileNotFoundError)
        if not swept or written is None or damage_of(place, written):
            raise


class ImageCache:
    """The images that a complete part store keeps, by index.  Use `PartStore.image_cache`.

    Files are mapped when they are first read, in each process for itself where it is not forked;
    behind a URL an image is a request.
    An image is compared with its CRC-32 before it is handed out: a JPEG at every read (1.5 % of
    decoding and cropping it), a raw image at the first read since the cache was opened, by
    whichever forked process (at every read it would be a third of the cost of a crop).

    Args:
        path: Folder of the store.
        identity: Its identity.
        objects: What its commit records say of every object.
    """

    def __init__(
        self, path: StorePath, identity: StoreIdentity, objects: Mapping[str, Mapping[str, int]]
    ) -> None:
        self.path, self.identity = path, identity
        names = [image_cache_name(identity, shard) for shard in range(identity.shards)]
        self._sizes = {name: objects[name]["size"] for name in names}
        self._footers: dict[int, NDArray[Any]] = {}
        self._maps: dict[int, NDArray[np.uint8]] = {}
        # Shared with forked workers, so that one of them checks an image, not each.
        self._checked = np.frombuffer(mmap.mmap(-1, identity.images), dtype=np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        objects = {name: {"size": size} for name, size in self._sizes.items()}
        return ImageCache, (self.path, self.identity, objects)

    def warm(self) -> None:
        """Read every footer, 24 bytes an image, so that forked workers share them.

        Raises:
            DamageError: A file is missing or cut, or its footer is not what was written.
        """
        for shard in range(self.identity.shards):
            self._footer(shard)

    def read(self, index: int) -> NDArray[np.uint8]:
        """One image, as a read-only view of the file.

        Args:
            index: Of the image in the store.

        Returns:
            uint8 (n,), the bytes of a JPEG, or uint8 (height, width, 3), RGB, by the format.

        Raises:
            IndexError: There is no such image.
            MissingError: The image is one of the store's bad ones, of which nothing is kept.
            DamageError: A file is missing or cut, or the image is not what was written.
        """
        if not 0 <= index < self.identity.images:
            raise IndexError(f"image {index} of a cache of {self.identity.images}")
        shard, row = divmod(index, self.identity.shard_size)
        offset, length, height, width, crc32 = self._footer(shard)[row].tolist()
        if length == 0:
            raise MissingError(f"image {index} of {self.path} was bad: its cache holds nothing")
        data = self._bytes(shard, offset, offset + length)
        raw = self.identity.image_cache == "raw"
        if not (raw and self._checked[index]):
            if zlib.crc32(data) != crc32:
                raise self.damage(index, "is not what was written")
            self._checked[index] = 1
        return data.reshape(height, width, 3) if raw else data

    def damage(self, index: int, wrong: str) -> DamageError:
        """The error that says what is wrong with an image, and the way out.

        Args:
            index: Of the image.
            wrong: A few words, such as "cannot be decoded".
        """
        place = self.path / image_cache_name(self.identity, index // self.identity.shard_size)
        return DamageError(f"image {index} in the image cache {place} {wrong}; {WAY_OUT}")

    def _footer(self, shard: int) -> NDArray[Any]:
        """The entries of a shard, checked."""
        if shard not in self._footers:
            start, stop = self.identity.shard_range(shard)
            size = self._sizes[image_cache_name(self.identity, shard)]
            begin = size - _TRAILER.size - (stop - start) * _ENTRY.itemsize
            data = self._bytes(shard, max(begin, 0), size).tobytes()
            footer = data[: -_TRAILER.size]
            trailer = _TRAILER.pack(_MAGIC, _VERSION, stop - start, zlib.crc32(footer))
            if begin < 0 or len(data) != size - begin or data[-_TRAILER.size :] != trailer:
                raise self.damage(start, "cannot be found: the file's footer is damaged")
            self._footers[shard] = np.frombuffer(footer, dtype=_ENTRY)
        return self._footers[shard]

    def _bytes(self, shard: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of the file of a shard, uint8 (stop - start,)."""
        if not isinstance(self.path, RemotePath):
            return self._map(shard)[start:stop]
        try:
            data = (self.path / image_cache_name(self.identity, shard)).read_range(start, stop)
        except FileNotFoundError:
            data = b""
        if len(data) != stop - start:
            raise self._cut(shard)
        return np.frombuffer(data, dtype=np.uint8)

    def _map(self, shard: int) -> NDArray[np.uint8]:
        """The file of a shard in a folder, uint8 (bytes,)."""
        if shard not in self._maps:
            name = image_cache_name(self.identity, shard)
            try:
                with Path(str(self.path), name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # ValueError: the file is empty
                mapped = None
            if mapped is None or len(mapped) != self._sizes[name]:
                raise self._cut(shard)
            if len(self._maps) >= _OPEN_FILES:
                self._maps.pop(next(iter(self._maps)), None)
            self._maps[shard] = np.frombuffer(mapped, dtype=np.uint8)
        return self._maps[shard]

    def _cut(self, shard: int) -> DamageError:
        place = self.path / image_cache_name(self.identity, shard)
        return DamageError(f"the image cache {place} is missing or cut; {WAY_OUT}")
