"""Atomic and checked files: what every other module of this room writes through.

A file is either the old one or the new one, never half of one: in a folder it is written beside its
place, synced and renamed; behind a URL it is put whole (`RemotePath`).  A JSON record carries its
own CRC-32, so an altered byte is found when it is read.  The price is two syncs a file, about a
millisecond on a local disk.
"""

import contextlib
import errno
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DamageError, MissingError, UnreadableError, UserError
from .remote_path import BLOCK, RemotePath
from .store_paths import StorePath

_BLOCK = 1 << 20

_ADVICE = {
    errno.ENOSPC: "free some space there or name another folder",
    errno.EDQUOT: "free some of your quota there or name another folder",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name a folder that you may write to, or change its permissions",
    errno.EPERM: "name a folder that you may write to, or change its permissions",
    errno.EISDIR: "move away the folder that lies in its place, and run again",
    errno.ENOTDIR: "a part of the path is a file: name another folder",
    errno.EEXIST: "a part of the path is a file: name another folder",
}


def _refusal(path: Path, error: OSError) -> UserError:
    """One sentence for a write that the system refused."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = _ADVICE.get(error.errno or 0, "check the disk and the folder")
    return UserError(f"cannot write {path}: {reason}; {advice}")


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before the work that would be lost.

    Args:
        folder: There, or to be made; nothing is left in it.

    Raises:
        UserError: The system refuses to write there.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=there):
            pass
    except OSError as error:
        raise _refusal(folder, error) from error


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _concerns(error: OSError, temporary: Path) -> bool:
    """Whether an error came from writing the temporary file, not from another file."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return named == temporary or named == temporary.parent or named in temporary.parents


@contextlib.contextmanager
def atomic_file(path: StorePath) -> Iterator[Path]:
    """Give a temporary file name that becomes ``path`` when the block ends well.

    The name is in the same folder, unique, and starts with a dot, so that readers of whole folders
    (``pandas.read_parquet``) pass over it.  The file is synced before it is renamed; it is removed
    when the block raises anything.  Parent folders are made.  What goes behind a URL is written to
    a file without a name in the system's temporary folder first, of which a kill leaves nothing.

    Args:
        path: Where the finished file goes; an existing file is replaced.

    Yields:
        The temporary path; the block must create a file there.

    Raises:
        UserError: The system refused the write (disk full, read-only, no permission).
    """
    if isinstance(path, RemotePath):
        with _unnamed_file(path) as file:
            yield Path(f"/dev/fd/{file.fileno()}")
            path.upload(file)
        return
    temporary = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        # Not every file system syncs folders; the rename is atomic all the same.
        with contextlib.suppress(OSError):
            _sync(path.parent, os.O_RDONLY)
    except UserError:
        raise
    except OSError as error:
        if not _concerns(error, temporary):
            raise
        raise _refusal(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _unnamed_file(path: RemotePath) -> Iterator[BinaryIO]:
    """A temporary file for what goes behind a URL."""
    temporary = None
    try:
        with tempfile.TemporaryFile() as file:
            temporary = Path(f"/dev/fd/{file.fileno()}")
            yield file
    except UserError:
        raise
    except OSError as error:
        if temporary is not None and not _concerns(error, temporary):
            raise
        raise UserError(
            f"{path} is put together in a temporary file first, which cannot be written to "
            f"({error.strerror or error}): free some space in {os.environ.get('TMPDIR', '/tmp')}, "
            "or name another folder in the environment variable TMPDIR"
        ) from error


def write_atomically(path: StorePath, data: bytes) -> None:
    """Write a whole file at once: a reader sees the old content or the new, nothing between.

    Args:
        path: The file; parent folders are made, an existing file is replaced.
        data: Its whole content.

    Raises:
        UserError: The system refused the write (disk full, read-only, no permission).
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    for last in (False, True):
        try:
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
            return
        except UserError as error:
            # Once the temporary file may go meanwhile, where another run completes the same store.
            if last or not isinstance(error.__cause__, FileNotFoundError):
                raise


NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is wrong with a file itself; any other refusal to read it may pass."""


def _unreadable(path: StorePath, error: OSError) -> UnreadableError:
    """One sentence for a read that the system refused."""
    return UnreadableError(
        f"{path} cannot be read now ({error.strerror or error}): see to the disk or mount that it "
        "lies on, and to your rights to it, and run again"
    )


def read_whole(path: StorePath) -> bytes:
    """The content of a file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: There is no such file.
        UnreadableError: The system refuses to read it.
    """
    try:
        return path.read_bytes()
    except (UserError, *NO_FILE):
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def file_crc32(path: StorePath) -> int:
    """CRC-32 of a file, read in blocks.

    Args:
        path: An existing file.

    Returns:
        The unsigned CRC-32 (zlib's), in [0, 2**32).

    Raises:
        OSError: The file cannot be read.
    """
    crc = 0
    for block in path.blocks() if isinstance(path, RemotePath) else _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


def _blocks(path: Path) -> Iterator[bytes]:
    """A file in pieces of 1 MiB."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def describe(data: bytes) -> dict[str, int]:
    """Size (bytes) and CRC-32 of a content: what a record keeps of an object it vouches for."""
    return {"size": len(data), "crc32": zlib.crc32(data)}


def damage_of(path: StorePath, description: Mapping[str, int]) -> str | None:
    """What is wrong with a stored object.

    Args:
        path: The object.
        description: Its ``size`` and ``crc32`` as `describe` gave them when it was written.

    Returns:
        None if the object is what was written, else a few words ("is missing", ...).

    Raises:
        UnreadableError: The system refuses to read it, so that nothing is known of it.
    """
    wanted = description["size"]
    try:
        if isinstance(path, RemotePath) and wanted <= BLOCK:
            found = describe(path.read_bytes())  # one request, where the size would be another
        else:
            size = path.stat().st_size
            found = {"size": size, "crc32": file_crc32(path) if size == wanted else 0}
        if found["size"] != wanted:
            if isinstance(path, Path) and path.is_dir():
                return "is a folder"
            return f"has {found['size']} bytes in place of {wanted}"
        return None if found["crc32"] == description["crc32"] else "has a wrong checksum"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except IsADirectoryError:
        return "is a folder"
    except UserError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def read_checked(path: StorePath, description: Mapping[str, int]) -> bytes:
    """The content of a stored object, after checking it.

    Args:
        path: The object.
        description: Its ``size`` and ``crc32`` as `describe` gave them when it was written.

    Raises:
        DamageError: The object is missing, or is not what was written.
        UnreadableError: The system refuses to read it.
    """
    with contextlib.suppress(*NO_FILE):
        data = read_whole(path)
        if describe(data) == dict(description):
            return data
    raise DamageError(f"{path} {damage_of(path, description) or 'changed while it was read'}")


def _canonical(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def encode_json(record: Mapping[str, Any]) -> bytes:
    """A record as `write_json` writes it: JSON with its own CRC-32 in the field ``crc32``.

    The same record gives the same bytes: keys are sorted and numbers are written one way.

    Args:
        record: Plain JSON values; keys that are no strings become strings, tuples become lists.

    Raises:
        ValueError: The record has a key ``crc32`` of its own, or holds NaN or an infinity.
        TypeError: The record holds something that JSON has no word for.
    """
    if "crc32" in record:
        raise ValueError("the record has a key 'crc32', which is the checksum's")
    # A round trip first: keys are sorted as the strings they become, not as what they were.
    return _sealed(json.loads(json.dumps(record, allow_nan=False)))


def _sealed(record: Mapping[str, Any]) -> bytes:
    """The bytes of a record of JSON's own types with its checksum."""
    sealed = {**record, "crc32": zlib.crc32(_canonical(record))}
    return json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def record_crc32(record: Mapping[str, Any]) -> int:
    """CRC-32 of the file that `write_json` writes of a record, and `read_json` read it from."""
    return zlib.crc32(encode_json(record))


def write_json(path: StorePath, record: Mapping[str, Any]) -> None:
    """Write a record atomically, as `encode_json` gives it.

    Args:
        path: The file; parent folders are made, an existing file is replaced.
        record: Plain JSON values.

    Raises:
        ValueError: The record has a key ``crc32`` of its own, or holds NaN or an infinity.
        TypeError: The record holds something that JSON has no word for.
        UserError: The system refused the write.
    """
    write_atomically(path, encode_json(record))


def read_json(path: StorePath) -> dict[str, Any]:
    """Read a record that `write_json` wrote, and check it to the byte.

    Args:
        path: The file.

    Returns:
        The record without its ``crc32``.

    Raises:
        MissingError: There is no such file.
        DamageError: The file is no JSON record, has no checksum, or differs from what was written
            in any byte.
        UnreadableError: The system refuses to read it.
    """
    try:
        data = read_whole(path)
    except FileNotFoundError:
        raise MissingError(f"there is no record {path}") from None
    except (NotADirectoryError, IsADirectoryError) as error:
        raise DamageError(f"the record {path} cannot be read: {error.strerror}") from error
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"the record {path} is not JSON; restore it or make it anew") from error
    if not isinstance(record, dict) or "crc32" not in record:
        raise DamageError(f"the record {path} has no checksum 'crc32'; make it anew")
    del record["crc32"]
    try:
        intact = _sealed(record) == data
    except ValueError:
        intact = False
    if not intact:
        raise DamageError(
            f"the record {path} is not what was written: its content does not match its checksum; "
            "restore it or make it anew"
        )
    return record
