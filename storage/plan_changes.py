"""What differs between the images a store was begun with and those of today."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from .table_streams import in_step

_COMPARED = {"bytes": "size in bytes", "label": "class"}
"""Columns in which an image may have changed, and what they are."""


def plan_changes(have: Iterable[pa.Table], want: Iterable[pa.Table]) -> str:
    """In words: how many images were added, removed or changed, with one of each.

    Args:
        have: The plan of the store as tables in order; columns ``key``, ``path`` and, if known,
            ``bytes`` and ``label``.
        want: The plan of this run.
    """
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for before, after in in_step([have, want]):
        for word, keys in _changed(before, after):
            if len(keys):
                counts[word] = counts.get(word, 0) + len(keys)
                first.setdefault(word, keys[0].as_py())
    words = ["were added", "were removed", *(f"have another {word}" for word in _COMPARED.values())]
    told = [f"{counts[w]} images {w}, such as {first[w]}" for w in words if w in counts]
    return "; ".join(told) or "their order is another"


def _changed(have: pa.Table, want: pa.Table) -> list[tuple[str, pa.Array]]:
    """Keys of the images that changed, with how."""
    before, after = have["key"].combine_chunks(), want["key"].combine_chunks()
    place = pc.index_in(before, value_set=after)
    both = pc.is_valid(place)
    found = [
        ("were added", after.filter(pc.invert(pc.is_in(after, value_set=before)))),
        ("were removed", before.filter(pc.invert(both))),
    ]
    for column, word in _COMPARED.items():
        if column in have.column_names and column in want.column_names:
            old = have[column].combine_chunks().filter(both)
            new = want[column].combine_chunks().take(place.filter(both))
            changed = before.filter(both).filter(pc.not_equal(old, new))
            found.append((f"have another {word}", changed))
    return found
