from pathlib import Path

import numpy as np
import pytest
import zarr

from semmae.storage.part_records import read_set_up
from semmae.storage.part_shards import ShardCodec, array_specs, round_mantissa


def slow_round(value: float, kept: int) -> float:
    """The nearest number with ``kept`` mantissa bits, half to even, in plain arithmetic."""
    if value == 0:
        return value
    exponent = max(int(np.floor(np.log2(abs(value)))), -14)
    step = 2.0 ** (exponent - kept)
    return round(value / step) * step


@pytest.mark.parametrize("kept", [3, 6, 9])
def test_round_mantissa__equals_the_slow_reference(kept: int) -> None:
    every = np.arange(0x7BFF, dtype=np.uint16)[::7].view(np.float16)
    values = np.concatenate([every, -every])
    values = values[np.abs(values) < 32768]  # above, rounding up may overflow
    want = np.array([slow_round(float(v), kept) for v in values], dtype=np.float16)
    assert np.array_equal(round_mantissa(values, kept), want)


@pytest.mark.parametrize("name", ["labels", "class_attention", "probabilities"])
def test_shard_codec__agrees_with_zarr_on_every_object(finished: Path, name: str) -> None:
    plan, identity = read_set_up(finished)
    codec, spec = ShardCodec(finished, plan, identity, name), array_specs(identity)[name]
    whole = np.asarray(zarr.open_array(finished / "parts.zarr" / name, mode="r")[:])
    for shard in range(identity.shards):
        data = (finished / "parts.zarr" / name / spec.key(shard)).read_bytes()
        start, stop = identity.shard_range(shard)
        assert np.array_equal(
            codec.decode(shard, data), whole[start:stop], equal_nan=name != "labels"
        )
        assert codec.encode(shard, whole[start:stop]) == data
