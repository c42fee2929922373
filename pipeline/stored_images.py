"""The images of a part store, found again in the data that it was made from."""

from pathlib import Path

import pyarrow as pa

from ..errors import MismatchError
from ..storage.part_store import PartStore
from .plan import PLAN_SCHEMA, Plan
from .plan_matching import MATCHED, matches_of
from .sources import list_images


def store_images(store: PartStore, data: str | Path) -> Plan:
    """The plan of a store with its images where they lie now; row i is row i of the store.

    Args:
        store: A part store.
        data: The images it was made from, all splits; there may be more.

    Raises:
        MissingError: The data are not there, or hold no images.
        MismatchError: The data lack an image of the store, or hold it with another size.
    """
    held = list_images(data)
    table = store.plan()
    places, sizes = matches_of([table], held.tables(MATCHED), len(table))
    other = sizes != table["bytes"].to_numpy()
    if other.any():
        first = int(other.argmax())
        fault = "is not there" if places[first] < 0 else "has another size"
        raise MismatchError(
            f"{store.path} was made from other images than {held.root} holds: "
            f"{int(other.sum())} of its {len(table)} are missing or have changed, the first, "
            f"{table['key'][first]}, {fault}; give --data the images that the store was made from"
        )
    # A tar that was packed anew holds the same images at other places.
    offset = PLAN_SCHEMA.get_field_index("offset")
    now = held.table["offset"].take(pa.array(places))
    return Plan(
        held.root, table.set_column(offset, PLAN_SCHEMA.field(offset), now), store.class_names
    )
