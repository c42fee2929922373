"""GPUs that fail, played by errors such as torch raises of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from semmae.errors import UserError
from semmae.pipeline.image_loading import LoadedImage
from semmae.pipeline.shard_worker import ShardActor, WorkerLostError, written_shards
from semmae.stages.device_faults import device_faults
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.worker_settings import WorkerSettings
from semmae.tests.world import World, lasting_bytes

ASSERT = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable\n"


def met(error: Exception) -> None:
    with device_faults(torch.device("cuda:1"), "use less"):
        raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.AcceleratorError(ASSERT), "CUDA error: device-side assert triggered"),
        (torch.AcceleratorError("an unknown code"), "an unknown code"),
        (RuntimeError(ASSERT), "CUDA error: device-side assert triggered"),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors"),
            "CUDA error: uncorrectable ECC error encountered",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "cuDNN error: CUDNN_STATUS"),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (RuntimeError("CUDA unknown error - this may be due to"), "CUDA unknown error - this may"),
        (
            RuntimeError("Unexpected error from cudaGetDeviceCount(). Did you run"),
            "Unexpected error from cudaGetDeviceCount()",
        ),
        (
            RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
            "CUDA driver initialization failed",
        ),
        (
            torch.cuda.DeferredCudaCallError(
                "CUDA call failed lazily at initialization with\n\nat"
            ),
            "CUDA call failed lazily",
        ),
    ],
)
def test_device_faults__a_gpu_that_failed_loses_its_worker(error: Exception, words: str) -> None:
    with pytest.raises(WorkerLostError) as lost:
        met(error)
    assert str(lost.value).startswith(f"cuda:1 failed ({words}")
    assert "\n" not in str(lost.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_device_faults__memory_that_ran_out_is_the_users_to_mend(error: Exception) -> None:
    with pytest.raises(UserError, match=r"the memory of cuda:1 ran out: use less$") as raised:
        met(error)
    assert not isinstance(raised.value, WorkerLostError)


def test_device_faults__other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        met(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Fails(ExtractionWorker):
    """A worker whose GPU fails at its second shard."""

    now = 0

    def _encode(self, loaded: list[LoadedImage], precision: str = "") -> dict[str, torch.Tensor]:
        if self.now == 1:
            raise torch.AcceleratorError(ASSERT)
        return super()._encode(loaded, precision)

    def __call__(self, shard: int, tell: Any = lambda images: None) -> Any:
        self.now = shard
        return super().__call__(shard, tell)


def test_extract_parts__a_gpu_that_failed_is_one_sentence_and_the_next_run_goes_on(
    world: World, tmp_path: Path
) -> None:
    options = ExtractPartsOptions(data=world.data, learner=world.learner, output=tmp_path / "store")
    with pytest.raises(UserError, match=r"^cpu failed \(CUDA error: device-side assert triggered"):
        extract_parts(options, Fails)
    # What was being written by then is written.
    assert (tmp_path / "store/commits/00000.json").exists()
    # The shard is not to blame.
    assert not list((tmp_path / "store/runs/tries").iterdir())
    extract_parts(options)
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(world.store)


def test_extraction_worker__whose_gpu_is_gone_is_lost_and_not_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings = WorkerSettings(
        output=world.store,
        root=world.data,
        learner=world.learner,
        run="a",
        device="cuda",
        decode_threads=1,
        decode_timeout=0,
    )
    with pytest.raises(WorkerLostError, match=r"^the GPU of a worker is gone \(CUDA finds none\)"):
        ExtractionWorker(settings)


def test_shard_actor__tells_that_it_is_lost_and_ends_when_asked_whether_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> Any:
        raise WorkerLostError("cuda:0 failed")

    actor, ends = ShardActor(), list[int]()
    monkeypatch.setattr("os._exit", ends.append)
    actor.ready()
    assert ends == []
    reply = actor.work(make, None, 3)
    with pytest.raises(WorkerLostError, match=r"^on .*: cuda:0 failed$"):
        written_shards(reply, "10.0.0.1:6379")
    actor.ready()
    assert ends == [1]
