"""The folder that a data set lies in: listed folder by folder, read by ranges of bytes.

What lies on this machine and what a URL names differ in `DataRoot.scan`, ``_read`` and ``_status``
alone; patience with failures, and telling a bad image from storage that is gone, are the same.
"""

import errno
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import MissingError, SettingError, UserError
from ..storage.retries import LOST_NUMBERS, is_own_fault, patiently

_OTHERS = 8
"""Files that are tried where one cannot be read, to see whether it is that one alone."""

_LOOKED_AT = 10_000
"""Files that these are looked for among, in a folder and in all."""

_FEW = 4096
"""Bytes that are read of each."""

_MOST_LOST = 8
"""Files that a disk may have lost, and one more a thousand that were read; beyond, it fails."""


class FolderListing(NamedTuple):
    """What one folder holds; names that start with a dot do not count."""

    files: pa.Array
    """Paths relative to the root of the files with the endings asked for; strings (n,).  Those of
    this machine are in order."""
    sizes: NDArray[np.int64]
    """Their bytes, (n,); -1 where they were not asked for and are not told with the names."""
    folders: list[str]
    """Names of the sub-folders."""
    identity: tuple[int, int] | None
    """Device and inode of the folder, by which links that go round are found; None on a URL."""


class Status(NamedTuple):
    """What a path is."""

    kind: Literal["file", "folder"]
    size: int
    changed: str = ""
    """What the storage says of its last change, a time or an ETag; "" where it says nothing."""


class DataRoot(ABC):
    """A folder that paths of a plan are relative to.

    Args:
        root: The absolute folder, or the URL.
        read_ahead: Bytes that are read at once where a file is read through.
        skip_ahead: Bytes that are read at once where most of a file is skipped.
    """

    def __init__(self, root: str, read_ahead: int, skip_ahead: int) -> None:
        self.root = root
        self.read_ahead, self.skip_ahead = read_ahead, skip_ahead
        self._lost: set[str] = set()
        self._asked_for = 0

    def place(self, path: str) -> str:
        """The whole name of a path, for messages."""
        between = "" if self.root.endswith("/") else "/"
        return f"{self.root}{between}{path}" if path else self.root

    def scan(self, folder: str, endings: Collection[str], sizes: bool = True) -> FolderListing:
        """List one folder.

        Args:
            folder: Path relative to the root, "" for the root itself.
            endings: Endings, such as ``.jpg``, of the files that count, whatever their case; a
                link to nowhere counts, with size 0.
            sizes: Whether each file is asked for its size where names alone are cheaper.

        Raises:
            MissingError: The folder cannot be listed.
            SettingError: It holds a name that is not UTF-8.
            UserError: The storage does not answer.
        """
        place = self.place(folder)
        try:
            return patiently(partial(self._scan, folder, endings, sizes), place)
        except UnicodeEncodeError as error:
            raise SettingError(
                f"{place} holds a file whose name is not UTF-8: rename it"
            ) from error
        except UserError:
            raise
        except OSError as error:
            denied = isinstance(error, PermissionError)
            reason = error.strerror or ("access denied" if denied else "no such folder")
            raise MissingError(
                f"the folder {place} cannot be listed ({reason}): make it readable"
            ) from error

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a file.

        Args:
            path: The file, relative to the root.
            start: First byte.
            stop: One past the last byte; None for all that follow.

        Returns:
            The bytes, fewer than asked for where the file ends before.

        Raises:
            OSError: The file itself is absent, forbidden, or a folder.
            MissingError: Its whole folder is gone or empty, or forbidden; behind a URL, the root.
            UserError: The storage does not answer.
        """
        return self._patiently_read(path, start, stop, lambda: False)

    def read_one_of_many(self, path: str) -> bytes:
        """A whole file, of which there are others: one that its disk has lost is told from a mount.

        It is waited for once: read again, such a file fails at once.

        Raises:
            OSError: The file itself is absent, forbidden, a folder, or lost while others near it
                can be read.
            MissingError: Its whole folder is gone or empty, or forbidden; behind a URL, the root.
            UserError: The storage does not answer, or has lost more than a few files.
        """
        if path in self._lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        self._asked_for += 1
        return self._patiently_read(path, 0, None, partial(self._is_one_of_few, path))

    def _is_one_of_few(self, path: str) -> bool:
        """Whether a file is lost alone; raises if too many are by now."""
        if not self._is_lost_alone(path):
            return False
        if len(self._lost) < _MOST_LOST + self._asked_for // 1000:
            return True
        lost = [*sorted(self._lost)[:3], path]
        raise UserError(
            f"the disk of {self.root} has lost {len(self._lost) + 1} images ({', '.join(lost)}), "
            "too many to go on without them: copy what can be read to another disk, or move those "
            "that cannot be read away, and run the command again"
        )

    def _patiently_read(
        self, path: str, start: int, stop: int | None, alone: Callable[[], bool]
    ) -> bytes:
        try:
            return patiently(
                partial(self._read, path, start, stop), self.place(path), "read", alone
            )
        except UserError:
            raise
        except OSError as error:
            self._require_folder(path, error)
            if error.errno in LOST_NUMBERS:
                self._lost.add(path)
            raise

    def status(self, path: str) -> Status | None:
        """What a path is; None if it is not there.

        Raises:
            MissingError: It may not be looked at.
            UserError: The storage does not answer.
        """
        try:
            return patiently(partial(self._status, path), self.place(path))
        except PermissionError as error:
            raise MissingError(
                f"access to {self.place(path)} is denied: give this user the right to read it"
            ) from error
        except UserError:
            raise
        except OSError:
            return None

    def open(self, path: str, read_ahead: int | None = None) -> BinaryIO:
        """A file to read and seek in; every read of it is a ranged one that is tried again.

        Args:
            path: The file, relative to the root.
            read_ahead: Bytes that are read at once; the root's by default.

        Raises:
            FileNotFoundError: There is no such file.
            UserError: The storage does not answer.
        """
        status = self.status(path)
        if status is None or status.kind == "folder":
            raise FileNotFoundError(f"{self.place(path)} is no file")
        ranges = _RangedFile(self, path, status.size)
        return cast(BinaryIO, io.BufferedReader(ranges, read_ahead or self.read_ahead))

    def _require_folder(self, path: str, error: OSError) -> None:
        """Raise `MissingError` if not a file but its whole folder is gone: a mount is lost."""
        lost = self._lost_above(path)
        if lost is not None:
            raise MissingError(
                f"{lost} is gone or empty, though its images were listed: mount it again, or "
                "see to the rights to read it, and run the command again"
            ) from error

    @abstractmethod
    def _scan(self, folder: str, endings: Collection[str], sizes: bool) -> FolderListing: ...

    @abstractmethod
    def _read(self, path: str, start: int, stop: int | None) -> bytes: ...

    @abstractmethod
    def _status(self, path: str) -> Status: ...

    @abstractmethod
    def _lost_above(self, path: str) -> str | None:
        """The folder of a file, or the root, where nothing is left of it."""

    @abstractmethod
    def _is_lost_alone(self, path: str) -> bool:
        """Whether a file cannot be read by itself: another one of its disk can, and it cannot."""


class LocalRoot(DataRoot):
    """A folder of this machine, or of a file system mounted on it.

    Args:
        root: The absolute folder.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, read_ahead=1 << 20, skip_ahead=1 << 15)

    def _scan(self, folder: str, endings: Collection[str], sizes: bool) -> FolderListing:
        place = Path(self.root, folder)
        status = place.stat()
        prefix = f"{folder}/" if folder else ""
        files, lengths, folders = [], [], []
        with os.scandir(place) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if entry.is_dir():
                    folders.append(name)
                elif ending_of(name) in endings and (entry.is_file() or entry.is_symlink()):
                    files.append(prefix + name)
                    lengths.append(_size(entry) if sizes else -1)
        try:
            paths = pa.array(files, pa.string())
        except UnicodeEncodeError as error:
            raise SettingError(
                f"{place} holds a file whose name is not UTF-8: rename it"
            ) from error
        order = pc.sort_indices(paths)  # so that a plan need not be sorted
        return FolderListing(
            paths.take(order),
            np.array(lengths, dtype=np.int64)[order],
            sorted(folders),
            (status.st_dev, status.st_ino),
        )

    def _read(self, path: str, start: int, stop: int | None) -> bytes:
        with Path(self.root, path).open("rb", buffering=0) as file:
            if start:
                file.seek(start)
            if stop is None:
                return file.read()
            pieces, left = [], stop - start
            # The system may give less than was asked for: 2 GiB at once at most on Linux.
            while left > 0 and (piece := file.read(left)):
                pieces.append(piece)
                left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _status(self, path: str) -> Status:
        found = Path(self.root, path).stat()
        kind: Literal["file", "folder"] = "folder" if stat.S_ISDIR(found.st_mode) else "file"
        return Status(kind, found.st_size, str(found.st_mtime_ns))

    def _lost_above(self, path: str) -> str | None:
        # A folder inside the root may be a mount of its own, or a link to one.
        folder = Path(self.root, path).parent
        try:
            with os.scandir(folder) as entries:
                return None if any(True for _ in entries) else str(folder)
        except OSError:
            return str(folder)

    def _is_lost_alone(self, path: str) -> bool:
        try:
            near = islice(self._near(path), _OTHERS)
            if not any(self._comes_from_disk(other) for other in near):
                return False
        except OSError:
            return False
        try:
            self._read(path, 0, None)
        except OSError as error:
            return error.errno in LOST_NUMBERS
        return False  # whatever it was has passed

    def _near(self, path: str) -> Iterator[str]:
        """Other files of the file system that a file lies on, those of its folder first.

        Not of all files that there are: a link may lead to a disk of its own.
        """
        own, root = Path(self.root, path), Path(self.root)
        device = own.stat().st_dev  # where it is a link, that of what it leads to
        for top in (own.parent, root):
            files = (
                Path(folder, name)
                for folder, _, names in os.walk(top)
                for name in names
                if name[0] != "."
            )
            for other in islice(files, _LOOKED_AT):
                if other != own and other.is_file() and other.stat().st_dev == device:
                    yield str(other)

    def _comes_from_disk(self, path: str) -> bool:
        """Whether the first bytes of a file can be read now, not from the system's memory."""
        try:
            if hasattr(os, "posix_fadvise"):
                with Path(path).open("rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return bool(self._read(path, 0, _FEW))
        except OSError:
            return False


def ending_of(name: str) -> str:
    """What a file name ends with from its last dot on, in small letters; ``.jpg``."""
    return name[name.rfind(".") :].lower() if "." in name else ""


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        if is_own_fault(error):
            return 0
        raise


class _RangedFile(io.RawIOBase):
    """A file of a root, as ``io.BufferedReader`` takes it; nothing stays open between reads."""

    def __init__(self, root: DataRoot, path: str, size: int) -> None:
        super().__init__()
        self._root, self._path, self._size = root, path, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        data = self._root.read(self._path, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
