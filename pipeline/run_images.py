"""Which images a run was started on, kept beside it: a changed data set is told by image."""

import io
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..storage.files import read_whole, write_atomically

MOST = 1 << 24
"""Images of which a digest each is kept, 134 MB; of more, a run knows the fingerprint alone."""

_NAMED = 3
_FILE = "images.npy"


@runtime_checkable
class Digested(Protocol):
    """Training data made of images that each have a digest and a name."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def digests(self) -> NDArray[np.uint64]:
        """Of key, bytes and label of each image, (N,)."""
        ...

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """Of some images."""
        ...


def keep_images(folder: Path, data: object) -> None:
    """Write ``RUN/images.npy``, uint64 (N,), where the data have digests.

    Args:
        folder: Of a run that begins; one that was killed before its first checkpoint may have left
            the file of other data there.
        data: What it trains on.

    Raises:
        UserError: The file cannot be written.
    """
    if not isinstance(data, Digested) or len(data) > MOST:
        return
    made = io.BytesIO()
    np.save(made, data.digests())
    write_atomically(folder / _FILE, made.getvalue())


def changed_images(folder: Path, data: object) -> str:
    """How a run's images differ from those it was started on, in words; empty if it is not known.

    Args:
        folder: Of the run.
        data: What it is to train on now.
    """
    had = _kept(folder)
    if had is None or not isinstance(data, Digested):
        return ""
    have = data.digests()
    new = np.flatnonzero(~np.isin(have, had))
    gone = int((~np.isin(had, have)).sum())
    said = []
    if len(new):
        said.append(f"{len(new)} new or changed, such as {', '.join(data.names(new[:_NAMED]))}")
    if gone:
        said.append(f"{gone} of before gone or changed")
    return "; ".join(said)


def _kept(folder: Path) -> NDArray[np.uint64] | None:
    with suppress(OSError, ValueError, EOFError, UserError):
        found: NDArray[np.uint64] = np.load(io.BytesIO(read_whole(folder / _FILE)))
        return found
    return None
