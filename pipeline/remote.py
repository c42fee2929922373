"""Data behind a URL, such as ``s3://bucket/folder`` or ``gs://bucket/folder``, through fsspec."""

import errno
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..errors import MissingError, SettingError
from ..storage.connections import Connection, is_url, whole_place
from .data_root import DataRoot, FolderListing, LocalRoot, Status, ending_of

# A request costs as much time as some megabytes, so little is gained by skipping less.
_READ_AHEAD = 4 << 20

_CHANGED = ("ETag", "etag", "LastModified", "updated", "mtime")
"""What file systems of fsspec call the mark or the time of a file's last change."""


def locate(data: str | Path) -> tuple[DataRoot, str | None]:
    """The root of a data set, and the one file that it is if it is no folder.

    Args:
        data: A local folder or file, or the URL of one.

    Raises:
        MissingError: There is nothing, or it may not be read.
        SettingError: No installed package reads such URLs.
        UserError: The storage does not answer.
    """
    whole = whole_place(data)
    root = open_root(whole)
    status = root.status("")
    if status is None:
        raise MissingError(
            f"{whole} does not exist: give a folder of images, of Parquet files or of tars"
        )
    if status.kind == "folder":
        return root, None
    above, _, name = whole.rpartition("/")
    return open_root(above + "/" if above.endswith(":/") or not above else above), name


def open_root(root: str) -> DataRoot:
    """The root of a plan, for reading.

    Args:
        root: An absolute folder or a URL, as `Plan.root` holds it.

    Raises:
        SettingError: No installed package reads such URLs.
    """
    return RemoteRoot(root) if is_url(root) else LocalRoot(root)


class RemoteRoot(DataRoot):
    """A folder behind a URL.

    Args:
        root: The URL.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, _READ_AHEAD, _READ_AHEAD)
        self._connection = Connection(root)
        self._connection.system()

    def _named(self, path: str) -> tuple[Any, str]:
        """This process's file system, and a path as it names it."""
        system = self._connection.system()
        base: str = system._strip_protocol(self.root)
        return system, f"{base.rstrip('/')}/{path}" if path else base

    def _scan(self, folder: str, endings: Collection[str], sizes: bool) -> FolderListing:
        system, place = self._named(folder)
        prefix = f"{folder}/" if folder else ""
        files, lengths, folders = [], [], []
        for entry in system.ls(place, detail=True):
            whole = entry["name"].rstrip("/")
            name = whole.rpartition("/")[2]
            # Object stores may hold an empty object that stands for the folder itself.
            if not name or name[0] == "." or whole == place.rstrip("/"):
                continue
            if entry["type"] == "directory":
                folders.append(name)
            elif ending_of(name) in endings:
                if entry["size"] is None:
                    raise SettingError(f"{self.root} does not tell the sizes of its files")
                files.append(prefix + name)
                lengths.append(entry["size"])  # they come with the names
        return FolderListing(
            pa.array(files, pa.string()), np.array(lengths, dtype=np.int64), sorted(folders), None
        )

    def _read(self, path: str, start: int, stop: int | None) -> bytes:
        system, place = self._named(path)
        if stop is not None and stop <= start:
            return b""
        try:
            whole = start == 0 and stop is None
            limits = {} if whole else {"start": start, "end": stop}
            data = system.cat_file(place, **limits)
        except FileNotFoundError as error:
            # Its own words differ from store to store; a part store keeps these.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place) from error
        return bytes(data)

    def _status(self, path: str) -> Status:
        system, place = self._named(path)
        found = system.info(place)
        changed = next((str(found[word]) for word in _CHANGED if found.get(word)), "")
        kind: Literal["file", "folder"] = "folder" if found["type"] == "directory" else "file"
        return Status(kind, found["size"] or 0, changed)

    def _is_lost_alone(self, path: str) -> bool:
        return False  # no disk of this machine

    def _lost_above(self, path: str) -> str | None:
        # Object storage has no folders: what is in them makes them.
        try:
            return None if self.status("") is not None else self.root
        except MissingError:
            return self.root
