"""Data behind a URL, such as ``s3://bucket/folder`` or ``gs://bucket/folder``, through fsspec."""

import errno
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import numpy as np
import pyarrow as pa

from ..errors import MissingError, SettingError
from .data_root import DataRoot, FolderListing, LocalRoot, Status, ending_of

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)

_EXTRA_OF = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

CONNECT_SECONDS = 10
READ_SECONDS = 20
"""Silence after which a request counts as failed."""

CONNECTIONS = 32

# A request costs as much time as some megabytes, so little is gained by skipping less.
_READ_AHEAD = 4 << 20


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


def whole_place(data: str | Path) -> str:
    """A URL without a slash at its end, or the absolute path of what lies on this machine.

    Args:
        data: A URL, or a path that may begin with ``~``; ``file://`` is a path.
    """
    text = str(data)
    found = _URL.fullmatch(text)
    if found is None or found[1].lower() in ("file", "local"):
        path = text if found is None else url2pathname(urlsplit(text).path)
        return str(Path(path).expanduser().absolute())
    return text.rstrip("/") if found[2].strip("/") else text


def open_root(root: str) -> DataRoot:
    """The root of a plan, for reading.

    Args:
        root: An absolute folder or a URL, as `Plan.root` holds it.

    Raises:
        SettingError: No installed package reads such URLs.
    """
    return RemoteRoot(root) if _URL.fullmatch(root) else LocalRoot(root)


class RemoteRoot(DataRoot):
    """A folder behind a URL.

    Each process has its own connections: those of fsspec do not outlive a fork.

    Args:
        root: The URL.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, _READ_AHEAD, _READ_AHEAD)
        self._system_of: dict[int, tuple[Any, str]] = {}
        self._system()

    def _system(self) -> tuple[Any, str]:
        """This process's file system, and the root as it names it."""
        here = os.getpid()
        if here not in self._system_of:
            self._system_of[here] = _connected(self.root)
        return self._system_of[here]

    def _named(self, path: str) -> tuple[Any, str]:
        system, base = self._system()
        return system, f"{base.rstrip('/')}/{path}" if path else base

    def _scan(self, folder: str, endings: Collection[str]) -> FolderListing:
        system, place = self._named(folder)
        prefix = f"{folder}/" if folder else ""
        files, sizes, folders = [], [], []
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
                sizes.append(entry["size"])
        return FolderListing(
            pa.array(files, pa.string()), np.array(sizes, dtype=np.int64), sorted(folders), None
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
        return Status("folder" if found["type"] == "directory" else "file", found["size"] or 0)

    def _holds_something(self) -> bool:
        try:
            return self.status("") is not None
        except MissingError:
            return False


def _connected(url: str) -> tuple[Any, str]:
    """A file system of fsspec for a URL, and the URL as it names it."""
    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["max_concurrency"] = 1  # else each read first asks for the size
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # `patiently` tries again
        }
    try:
        system = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = _EXTRA_OF.get(protocol)
        remedy = f"pip install 'semmae[{extra}]'" if extra else str(error)
        raise SettingError(f"{url} needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise SettingError(
            f"{url} is a kind of URL that nothing here reads ({error}): expected a local folder, "
            "s3:// or gs://"
        ) from error
    if protocol in ("s3", "s3a"):
        system.retries = 1
    return system, system._strip_protocol(url)
