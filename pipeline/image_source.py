"""Decoded images of a plan, one at a time or in order ahead of their use."""

import hashlib
import mmap
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import MissingError
from .crops import evaluation_crop, squash
from .decoding import BadImage, decode_image
from .plan import Plan
from .sources import ImageReader

Pixels = NDArray[np.uint8]


_NEIGHBOURS = 1000
"""Bad images in a row after which the data are taken for gone."""


class ImageSource:
    """Decoded images of chosen rows of a plan, by position among the chosen.

    Args:
        plan: The images.
        rows: Rows of the plan that count, int64 (N,); all by default.
    """

    def __init__(self, plan: Plan, rows: NDArray[np.int64] | None = None) -> None:
        self.plan = plan
        self.rows = np.arange(len(plan)) if rows is None else rows
        self._reader = ImageReader(plan)
        # Shared with forked workers: one of them warns, not each.
        self._warned = np.frombuffer(mmap.mmap(-1, len(self.rows) + 1), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[type["ImageSource"], tuple[Plan, NDArray[np.int64]]]:
        return ImageSource, (self.plan, self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the plan and the chosen rows."""
        digest = hashlib.sha256(self.plan.fingerprint.encode())
        digest.update(np.ascontiguousarray(self.rows, dtype="<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of each chosen image, -1 where there is none; int64 (N,)."""
        return self.plan.labels[self.rows]

    def digests(self) -> NDArray[np.uint64]:
        """A hash of key, bytes and label of each chosen image, (N,)."""
        from pandas.util import hash_pandas_object

        columns = ["key", "bytes", "label"]
        hashes = [
            hash_pandas_object(table.to_pandas(), index=False).to_numpy()
            for table in self.plan.tables(columns)
        ]
        return np.concatenate([np.empty(0, np.uint64), *hashes])[self.rows]

    def names(self, positions: NDArray[np.int64]) -> list[str]:
        """The keys of some images, in any order."""
        rows, places = np.unique(self.rows[positions], return_inverse=True)  # a plan's: ascending
        found: list[str] = self.plan.take(rows)["key"].take(pa.array(places)).to_pylist()
        return found

    def warm(self) -> None:
        """Load what threads and forked workers should share (`ImageReader.warm`)."""
        self._reader.warm()

    @property
    def slow_in_random_order(self) -> str:
        """Why images in random order cost much more than themselves; "" where they do not."""
        if not self._reader.by_row_groups:
            return ""
        return (
            f"{self.plan.root} holds more Parquet than is kept in memory, so each image costs the "
            "reading of its whole row group: unpack the images into a folder or tars, or keep them "
            "in a part store (`semmae stage1 extract-parts --cache-images 256`) and pretrain with "
            "--images cache"
        )

    def decoded(self, position: int) -> Pixels:
        """One image, uint8 (H, W, 3).

        Raises:
            BadImage: It cannot be read.
        """
        return decode_image(self._reader.read(int(self.rows[position])))

    def decoded_or_next(self, position: int) -> tuple[int, Pixels]:
        """One image, or the next good one where it is bad, with the position it came from.

        A part store knows its bad images, so they are never asked for.  Without one they are found
        here: one warning names each, and training goes on with its neighbour.

        Raises:
            MissingError: It and its neighbours, up to a thousand, cannot be read.
        """
        tries = min(len(self), _NEIGHBOURS)
        for offset in range(tries):
            candidate = (position + offset) % len(self)
            try:
                return candidate, self.decoded(candidate)
            except BadImage as bad:
                self._warn(candidate, bad)
        raise MissingError(
            f"not one of {tries} images in a row in {self.plan.root} can be read, from "
            f"{self._key(position)} on: see whether the folder is all there"
        )

    def _warn(self, position: int, bad: BadImage) -> None:
        if not self._warned[position]:
            self._warned[position] = 1
            print(f"skipped {self._key(position)}: {bad}", file=sys.stderr, flush=True)

    def _key(self, position: int) -> str:
        return self.plan.key(int(self.rows[position]))


def drawn(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Positions of ``wanted`` of ``count`` images, or of all, drawn by the seed, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:wanted])


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Positions of ``wanted`` of ``count`` images, or of all, evenly from the first to the last.

    Images come in the order of their classes, so these are of all.
    """
    return np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)


Geometry = Literal["squash", "center"]
"""How an evaluation sees an image: whole, or its centre."""


def batches_in_order(
    images: ImageSource,
    image_size: tuple[int, int],
    batch_size: int,
    geometry: Geometry = "center",
    positions: NDArray[np.int64] | None = None,
    threads: int = 2,
) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
    """Images one after another, decoded by threads ahead of their use; bad ones are left out.

    Args:
        images: The images.
        image_size: (H, W), pixels.
        batch_size: Images at a time.
        geometry: Whole images squashed, or the centre crop of evaluations.
        positions: Which images; all by default.
        threads: Decoding threads.

    Yields:
        Positions int64 (B,) of the good images of each batch, and uint8 (B, H, W, 3).
    """
    fit_to = squash if geometry == "squash" else evaluation_crop
    wanted = np.arange(len(images)) if positions is None else positions

    def load(position: int) -> Pixels | None:
        try:
            return fit_to(images.decoded(position), image_size)
        except BadImage:
            return None

    images.warm()
    chunks = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = [pool.submit(load, int(p)) for chunk in chunks[:2] for p in chunk]
        for number, chunk in enumerate(chunks):
            if number + 2 < len(chunks):
                waiting += [pool.submit(load, int(p)) for p in chunks[number + 2]]
            loaded = [future.result() for future in waiting[: len(chunk)]]
            del waiting[: len(chunk)]
            good = [i for i, pixels in enumerate(loaded) if pixels is not None]
            if good:
                yield chunk[good], np.stack([pixels for pixels in loaded if pixels is not None])
    finally:
        pool.shutdown(cancel_futures=True)
