from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semmae.errors import SettingError
from semmae.storage.part_identity import StoreIdentity, shard_size_for

IDENTITY = StoreIdentity(
    images=43,  # five shards of 8 and a partial one of 3
    shard_size=8,
    grid=(3, 4),
    parts=5,
    background=4,
    image_size=(48, 64),
    batch_size=8,
    dtype="float32",
    device_type="cpu",
    plan_fingerprint="f" * 8,
    learner_hash="a" * 64,
    preprocessing={"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"},
    attention_heads=2,
    probabilities=True,
)


@given(images=st.integers(1, 10_000_000))
@settings(max_examples=200, deadline=None)
def test_shard_size_for__is_the_nearest_power_of_two(images: int) -> None:
    size = shard_size_for(images)
    assert size in {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}
    for other in (size // 2, size * 2):
        if 32 <= other <= 8192:
            assert abs(size - images / 160) <= abs(other - images / 160)


def test_shard_size_for__known_sizes() -> None:
    assert [shard_size_for(n) for n in (1, 5_000, 100_000, 1_281_167)] == [32, 32, 512, 8192]
    assert [shard_size_for(n) for n in (10**8, 10**9, 10**10)] == [8192, 16384, 131072]


@pytest.mark.parametrize("images", [819_200_000, 819_200_001, 10**9, 10**11])
def test_shard_size_for__leaves_five_digits_to_name_shards(images: int) -> None:
    identity = replace(IDENTITY, images=images, shard_size=shard_size_for(images))
    assert identity.shards <= 100_000
    assert identity.shard_size == 8192 or identity.shards > 50_000


@given(images=st.integers(1, 5000), size=st.sampled_from([1, 32, 512, 1024]))
@settings(max_examples=50, deadline=None)
def test_shard_range__ranges_partition_the_images(images: int, size: int) -> None:
    identity = replace(IDENTITY, images=images, shard_size=size)
    ranges = [identity.shard_range(shard) for shard in range(identity.shards)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(images))
    for outside in (-1, identity.shards):
        with pytest.raises(IndexError):
            identity.shard_range(outside)


@pytest.mark.parametrize(
    "changes",
    [{"images": 0}, {"shard_size": 700}, {"grid": (0, 4)}, {"parts": 256}, {"background": 5},
     {"attention_heads": -1}, {"batch_size": 0}],
)  # fmt: skip
def test_store_identity__refuses_what_no_store_can_hold(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        replace(IDENTITY, **changes)


def test_store_identity__record_round_trip() -> None:
    again = StoreIdentity.from_record(IDENTITY.to_record())
    assert again.to_record() == IDENTITY.to_record()
    assert (again.grid, again.image_size) == (IDENTITY.grid, IDENTITY.image_size)
