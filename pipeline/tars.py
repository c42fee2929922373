"""WebDataset tars: indexed once by their headers, each image read by its range of bytes.

Members whose paths agree up to the first dot of the last component are one sample; they lie one
after another.  A sample's image is its member with an image's ending (``a.jpg`` before
``a.mask.png``); its class is the integer in its ``.cls`` member, or under ``label`` in its
``.json`` one.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import DamageError, MissingError, SettingError, UserError, first_line
from .archives import ArchiveIndex, require_classes
from .data_root import DataRoot, ending_of
from .image_folders import IMAGE_EXTENSIONS

#: Endings of tars, and of those that cannot be read by ranges.
TAR_ENDINGS = frozenset((".tar",))
COMPRESSED_ENDINGS = frozenset((".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst"))

_BLOCK = tarfile.BLOCKSIZE


class _Member(NamedTuple):
    """A file in a tar."""

    name: str
    size: int
    offset: int

    @property
    def sample(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def ending(self) -> str:
        """All from the first dot of the last component on, in small letters."""
        _, dot, ending = self.name.rpartition("/")[2].partition(".")
        return dot + ending.lower()


def is_compressed_tar(path: str) -> bool:
    """Whether a name is that of a compressed tar, such as ``a.tar.gz`` or ``a.tgz``."""
    ending = ending_of(path)
    within = path[: -len(ending)].lower() if ending else ""
    return ending in COMPRESSED_ENDINGS and (ending.startswith(".t") or within.endswith(".tar"))


def refuse_compressed(place: str) -> None:
    """Refuse a compressed tar.

    Raises:
        SettingError: Always; it says what to do.
    """
    raise SettingError(
        f"{place} is a compressed tar, in which no image can be read alone: unpack it to a plain "
        ".tar (images are compressed as they are)"
    )


def index_of_tar(root: DataRoot, path: str) -> ArchiveIndex:
    """The images of a tar, found by reading its headers and labels alone.

    Args:
        root: Folder that the path is relative to.
        path: The tar.

    Raises:
        MissingError: It cannot be opened.
        SettingError: A label is no integer, or an image is there twice.
        DamageError: It is no tar, or is cut off.
        UserError: The storage does not answer.
    """
    place = root.place(path)
    members: list[str] = []
    sizes, offsets, labels = [], [], []
    try:
        with root.open(path, root.skip_ahead) as file:
            for _, group in groupby(_files_of(file, place), lambda member: member.sample):
                sample = list(group)
                image = _image_of(sample)
                if image is not None:
                    members.append(image.name)
                    sizes.append(image.size)
                    offsets.append(image.offset)
                    labels.append(_label_of(file, sample, place))
    except UserError:
        raise
    except OSError as error:
        raise MissingError(
            f"{place} cannot be opened: {error.strerror or 'no such file'}"
        ) from error
    if len(set(members)) < len(members):
        twice = next(name for name in members if members.count(name) > 1)
        raise SettingError(f"{place} holds {twice} twice: keep one of them")
    classes = np.array(labels, dtype=np.int64)
    require_classes(classes, f"the classes of {place}")
    return ArchiveIndex(
        np.array(sizes, dtype=np.int64),
        classes,
        pa.array(members, pa.string()),
        np.array(offsets, dtype=np.int64),
    )


def _files_of(file: BinaryIO, place: str) -> Iterator[_Member]:
    """The plain files of a tar in order; hidden ones do not count."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (found := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                name = found.name.removeprefix("./")
                hidden = any(part.startswith(".") for part in name.split("/"))
                if found.isreg() and not hidden:
                    yield _Member(name, found.size, found.offset_data)
            end = archive.offset
    except tarfile.TarError as error:
        raise DamageError(
            f"{place} is no sound tar: fetch or write it again ({first_line(error)})"
        ) from error
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes any rubbish for the end
        raise DamageError(
            f"{place} is cut off or damaged at byte {end}, where its next header or its end should "
            "be: fetch or write it again"
        )


def _image_of(sample: list[_Member]) -> _Member | None:
    images = [member for member in sample if ending_of(member.name) in IMAGE_EXTENSIONS]
    plain = [member for member in images if member.ending in IMAGE_EXTENSIONS]
    return next(iter(plain or images), None)


def _label_of(file: BinaryIO, sample: list[_Member], place: str) -> int:
    """The class of a sample, -1 if it tells none."""
    by_ending = {member.ending: member for member in sample}
    if (member := by_ending.get(".cls")) is not None:
        text = _content(file, member).decode(errors="replace").strip()
        try:
            return int(text)
        except ValueError as error:
            raise SettingError(
                f"{member.name} in {place} is {text[:40]!r}: expected a class number"
            ) from error
    if (member := by_ending.get(".json")) is not None:
        try:
            content = json.loads(_content(file, member))
        except ValueError as error:
            raise SettingError(f"{member.name} in {place} is no valid JSON: {error}") from error
        label = content.get("label") if isinstance(content, dict) else None
        if isinstance(label, int) and not isinstance(label, bool):
            return label
    return -1


def _content(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def read_from_tar(root: DataRoot, key: str, path: str, offset: int, size: int) -> bytes:
    """One encoded image of a tar, in one read of its range.

    The header before it is read along, so that a tar that was packed anew is not taken for the one
    that was indexed.

    Args:
        root: Folder that the path is relative to.
        key: Of the image, ``path#member``.
        path: The tar.
        offset: Where the image begins.
        size: Its bytes.

    Raises:
        MissingError: The tar is gone.
        DamageError: The image is not there any more.
        UserError: The storage does not answer.
    """
    place = root.place(path)
    try:
        data = root.read(path, offset - _BLOCK, offset + size)
    except UserError:
        raise
    except OSError as error:
        raise MissingError(
            f"{place} cannot be opened: {error.strerror or 'no such file'}"
        ) from error
    member = key[len(path) + 1 :]
    try:
        header = tarfile.TarInfo.frombuf(data[:_BLOCK], "utf-8", "surrogateescape")
        # A longer name, or one with other letters, stands in a header further ahead.
        short = member.isascii() and len(member) < tarfile.LENGTH_NAME - 2
        same = header.size == size and (not short or header.name.removeprefix("./") == member)
    except tarfile.HeaderError:
        same = False
    if not same or len(data) < _BLOCK + size:
        raise DamageError(
            f"{place} does not hold {member} where it lay when it was listed: it was cut off or "
            "packed anew; restore it, or list the data again into a new output"
        )
    return data[_BLOCK:]
