import random

import pyarrow as pa
import pytest

from semmae.storage.plan_changes import plan_changes


def plan_of(sizes: dict[str, int], rows: int) -> list[pa.Table]:
    """A plan with one tar in it whose members do not lie in order of their names."""
    keys = sorted(sizes, key=lambda key: (key.partition("#")[0], key[::-1]))
    whole = pa.table(
        {
            "key": keys,
            "path": [key.partition("#")[0] for key in keys],
            "bytes": [sizes[key] for key in keys],
        }
    )
    return [whole.slice(start, rows) for start in range(0, len(keys), rows)]


@pytest.mark.parametrize("rows", [3, 20, 1000])
def test_plan_changes__counts_what_a_plain_comparison_counts(rows: int) -> None:
    rng = random.Random(rows)
    keys = [f"{rng.randrange(10**6)}.jpg" for _ in range(100)]
    keys += [f"5.tar#{rng.randrange(10**6)}.jpg" for _ in range(60)]
    have = {key: rng.randrange(3) for key in keys[:150]}
    want = {key: rng.randrange(3) for key in keys[20:]}
    told = plan_changes(plan_of(have, rows), plan_of(want, rows + 1))
    changed = [key for key in have if key in want and have[key] != want[key]]
    added, removed, other = told.split("; ")
    assert added.startswith(f"{len(want.keys() - have.keys())} images were added, such as ")
    assert removed.startswith(f"{len(have.keys() - want.keys())} images were removed, such as ")
    assert other.startswith(f"{len(changed)} images have another size in bytes, such as ")
    assert added.rpartition(" ")[2] in want.keys() - have.keys()
    assert other.rpartition(" ")[2] in changed


def test_plan_changes__of_equal_images_are_of_their_order() -> None:
    plan = plan_of({"a": 1, "b": 2}, 1)
    assert plan_changes(plan, plan) == "their order is another"
