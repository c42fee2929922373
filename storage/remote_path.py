"""A path behind a URL, in the words of pathlib: what a part store may lie at beside a folder.

Every request is made again while its failure may pass (`retries`).  On object storage (S3, Google
Cloud Storage, Azure) a file appears whole or not at all, as it does on a disk by a rename.
"""

import contextlib
import errno
import fnmatch
import os
import uuid
from collections.abc import Callable, Iterator
from functools import total_ordering
from typing import Any, BinaryIO, NamedTuple

from ..errors import UserError
from .connections import Connection
from .retries import Result, patiently

OBJECT_STORAGE = frozenset(
    ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory")
)
"""Protocols by which a file is put whole, and folders need not be made."""

BLOCK = 16 << 20
"""Bytes that take longer to come than a request takes to be answered."""

_PART_TRIES = 5
_LARGE = 50 << 20
"""Bytes from which on a file may go in parts; s3fs begins at twice as many."""


class RemoteStatus(NamedTuple):
    """What is known of a remote file without reading it."""

    st_size: int
    """Bytes."""


@total_ordering
class RemotePath:
    """A file or folder behind a URL.

    Nothing is asked of the storage before a method needs it.  Where nothing is there, reading and
    removing raise FileNotFoundError; whatever asks the storage may raise SettingError (no installed
    package reads such URLs) or UserError (the storage does not answer, or denies access).

    Args:
        url: The URL, without a slash at its end.
        connection: That of a path above; None for one of its own.
    """

    def __init__(self, url: str, connection: Connection | None = None) -> None:
        self._url = url
        self._connection = connection or Connection(url)

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __reduce__(self) -> tuple[type["RemotePath"], tuple[str]]:
        return RemotePath, (self._url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __lt__(self, other: "RemotePath") -> bool:
        return self._url < other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, inner: str) -> "RemotePath":
        return RemotePath(f"{self._url.rstrip('/')}/{inner}", self._connection)

    @property
    def name(self) -> str:
        """What comes after the last slash."""
        return self._url.rpartition("/")[2]

    def with_name(self, name: str) -> "RemotePath":
        """Another path beside this one."""
        return RemotePath(self._url.rpartition("/")[0] + "/" + name)

    def absolute(self) -> "RemotePath":
        """The path itself: a URL is not relative to anything."""
        return self

    # Looking.

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether a file is there."""
        found = self._info()
        return found is not None and found["type"] != "directory"

    def is_dir(self) -> bool:
        """Whether a folder is there; on object storage one that holds something."""
        found = self._info()
        return found is not None and found["type"] == "directory"

    def stat(self) -> RemoteStatus:
        """The size of a file."""
        found = self._ask(lambda system, place: system.info(place), "read")
        return RemoteStatus(found["size"] or 0)

    def iterdir(self) -> Iterator["RemotePath"]:
        """What a folder holds."""
        for entry in self._ask(lambda system, place: system.ls(place, detail=True), "listed"):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            # Object storage may hold an empty object that stands for the folder itself.
            if name and entry["name"].rstrip("/") != self._place:
                yield self / name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What a folder holds under names of a pattern without slashes; nothing without it."""
        try:
            yield from (p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, pattern))
        except FileNotFoundError:
            return

    def sizes_below(self) -> dict[str, int]:
        """Bytes of every file in a folder and in those in it, by path relative to it."""
        found = self._ask(lambda system, place: system.find(place, detail=True), "listed")
        above = f"{self._place}/"
        return {
            name.removeprefix(above): entry["size"] or 0
            for name, entry in found.items()
            if entry["type"] != "directory" and name.rstrip("/") != self._place
        }

    # Reading.

    def read_bytes(self) -> bytes:
        """A whole file."""
        return bytes(self._ask(lambda system, place: system.cat_file(place), "read"))

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes of a file, fewer than asked for where it ends before.

        Args:
            start: First byte.
            stop: One past the last byte.
        """
        if stop <= start:
            return b""
        return bytes(
            self._ask(lambda system, place: system.cat_file(place, start=start, end=stop), "read")
        )

    def blocks(self) -> Iterator[bytes]:
        """A whole file in pieces of `BLOCK` bytes, each read by a request of its own."""
        size = self.stat().st_size
        for start in range(0, size, BLOCK):
            yield self.read_range(start, min(start + BLOCK, size))

    # Writing.

    def write_bytes(self, data: bytes) -> None:
        """Put a whole file in its place; folders above it are made where the storage has such."""
        self._put(lambda system, place: system.pipe_file(place, data), len(data))

    def upload(self, file: BinaryIO) -> None:
        """Put a copy of an open file of this machine in its place, as `write_bytes` does."""

        def put(system: Any, place: str) -> None:
            file.seek(0)  # where what follows is a duplicate of it, they share the position
            system.put_file(f"/dev/fd/{file.fileno()}", place)

        self._put(put, os.fstat(file.fileno()).st_size)

    def end_uploads(self, is_own: Callable[[str], bool]) -> None:
        """Drop the parts of files in this folder whose upload was begun and not ended.

        Only S3 keeps them; elsewhere there are none.

        Args:
            is_own: Whether a file is meant, by its path relative to the folder.
        """
        if self._connection.protocol not in ("s3", "s3a"):
            return

        def drop(system: Any, place: str) -> None:
            bucket, folder, _ = system.split_path(place)
            above = f"{folder}/" if folder else ""
            after: dict[str, str] = {}
            while True:
                asked = {"Bucket": bucket, "Prefix": above, **after}
                found = system.call_s3("list_multipart_uploads", **asked)
                for upload in found.get("Uploads", []):
                    if is_own(upload["Key"].removeprefix(above)):
                        # Its writer, or another sweep, may have ended it meanwhile.
                        with contextlib.suppress(FileNotFoundError):
                            system.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                if not found.get("IsTruncated"):
                    return
                after = {
                    f"{name}Marker": found[f"Next{name}Marker"] for name in ("Key", "UploadId")
                }

        self._ask(drop, "swept")

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            self._ask(lambda system, place: system.rm_file(place), "removed")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove a folder and all that is in it, if it is there."""
        try:
            self._ask(lambda system, place: system.rm(place, recursive=True), "removed")
        except FileNotFoundError:
            return

    @property
    def _place(self) -> str:
        """The path as the file system of fsspec names it."""
        place: str = self._connection.system()._strip_protocol(self._url)
        return place.rstrip("/")

    def _info(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._ask(lambda system, place: system.info(place), "read")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found

    def _put(self, write: Callable[[Any, str], object], size: int) -> None:
        def whole(system: Any, place: str) -> None:
            if self._connection.protocol in OBJECT_STORAGE:
                write(system, place)
                return
            above, _, name = place.rpartition("/")
            system.makedirs(above, exist_ok=True)
            temporary = f"{above}/.{name[:100]}.{uuid.uuid4().hex}.tmp"
            write(system, temporary)
            system.mv(temporary, place)

        # A large file goes in parts, and each is to be tried again by itself.
        parts = Connection(self._url, _PART_TRIES) if size >= _LARGE else None
        try:
            self._ask(whole, "written", parts)
        except FileNotFoundError as error:
            raise UserError(
                f"cannot write {self._url}: there is no such bucket or server; make it, or name "
                "another one"
            ) from error

    def _ask(
        self,
        request: Callable[[Any, str], Result],
        doing: str,
        connection: Connection | None = None,
    ) -> Result:
        """What a request about this path gives."""
        system, place = (connection or self._connection).system(), self._place
        try:
            return patiently(lambda: request(system, place), self._url, doing)
        except FileNotFoundError as error:
            # Its own words differ from store to store.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._url) from error
        except PermissionError as error:
            raise UserError(
                f"{self._url} cannot be {doing}, access is denied: see to your credentials and "
                "to your rights to it"
            ) from error
