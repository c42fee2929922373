"""The images of one plan found in another by key, both read once and in order."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..storage.table_streams import in_step

MATCHED = ["index", "key", "path", "bytes"]
"""Columns of a plan that matching reads."""


class Matches(NamedTuple):
    """What another plan holds of each image of a plan."""

    rows: NDArray[np.int64]
    """Its row there, -1 where there is none, (N,)."""
    sizes: NDArray[np.int64]
    """Its bytes there, -1 where there is none, (N,)."""


def matches_of(wanted: Iterable[pa.Table], held: Iterable[pa.Table], images: int) -> Matches:
    """Find images of a plan in another by key.

    Args:
        wanted: The plan as tables in order, with the columns `MATCHED`.
        held: The other one.
        images: Images of ``wanted``, N.
    """
    found = Matches(np.full(images, -1), np.full(images, -1))
    for mine, theirs in in_step([wanted, held]):
        place = pc.index_in(mine["key"], value_set=theirs["key"].combine_chunks())
        here = mine["index"].to_numpy()
        for values, column in zip(found, ("index", "bytes"), strict=True):
            values[here] = pc.fill_null(theirs[column].take(place), -1).to_numpy()
    return found
