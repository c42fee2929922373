"""What differs between the images a store was begun with and those of today."""

import pyarrow as pa
import pyarrow.compute as pc


def plan_changes(have: pa.Table, want: pa.Table) -> str:
    """In words: how many images were added, removed or changed, with one of each.

    Args:
        have: The plan of the store; columns ``key`` and, if known, ``bytes`` and ``label``.
        want: The plan of this run.
    """
    told = []
    before, after = have["key"].combine_chunks(), want["key"].combine_chunks()
    added = after.filter(pc.invert(pc.is_in(after, value_set=before)))
    removed = before.filter(pc.invert(pc.is_in(before, value_set=after)))
    for word, keys in (("added", added), ("removed", removed)):
        if len(keys):
            told.append(f"{len(keys)} images were {word}, such as {keys[0]}")
    place = pc.index_in(before, value_set=after)
    both = pc.is_valid(place)
    for column, word in (("bytes", "size in bytes"), ("label", "class")):
        if column in have.column_names and column in want.column_names:
            old = have[column].combine_chunks().filter(both)
            new = want[column].combine_chunks().take(place.filter(both))
            changed = before.filter(both).filter(pc.not_equal(old, new))
            if len(changed):
                told.append(f"{len(changed)} images have another {word}, such as {changed[0]}")
    return "; ".join(told) or "their order is another"
