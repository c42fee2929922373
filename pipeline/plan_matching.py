"""The images of one plan found in another by key, both read once and in order."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..storage.table_streams import in_step
from .plan import Plan
from .plan_rows import with_sizes

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


def with_known_sizes(plan: Plan, known: Iterable[pa.Table]) -> Plan:
    """A plan whose images without a size have that of another plan; -1 stays where it has none.

    Args:
        plan: Images of which some have size -1.
        known: The other plan as tables in order, with the columns `MATCHED`.

    Raises:
        UserError: The plan is long, and its temporary file cannot be written.
    """
    sizes = plan.sizes
    if not (sizes < 0).any():
        return plan
    found = matches_of(plan.tables(MATCHED), known, len(plan)).sizes
    return replace(plan, rows=with_sizes(plan.rows, np.where(sizes < 0, found, sizes)))
