"""Part stores on an S3 server of this machine, through a proxy that can spoil requests."""

import json
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semmae.errors import UserError
from semmae.pipeline.cluster import open_workers
from semmae.pipeline.shard_worker import Record
from semmae.pipeline.sources import list_images
from semmae.pipeline.watching import Tell
from semmae.stages.evals.history import rerun
from semmae.stages.evals.parts import PartsOptions, evaluate_parts
from semmae.stages.extract_parts import (
    ExtractPartsOptions,
    extract_parts,
    worker_settings,
)
from semmae.stages.extraction_forecast import forecast_extraction
from semmae.stages.extraction_worker import ExtractionWorker
from semmae.stages.import_parts import ImportPartsOptions, import_parts
from semmae.stages.pretrain import pretrain, pretraining_data
from semmae.stages.show import (
    ShowMasksOptions,
    ShowPartsOptions,
    parts_info,
    show_masks,
    show_parts,
)
from semmae.stages.store_care import RepairPartsOptions, repair_parts, verify_parts
from semmae.storage import mapped_arrays, part_writer, remote_path
from semmae.storage.files import read_json, write_json
from semmae.storage.part_store import PartStore
from semmae.storage.part_writer import create_store
from semmae.storage.remote_path import RemotePath
from semmae.storage.store_paths import StorePath, store_path
from semmae.tests.faulty_proxy import FaultyProxy
from semmae.tests.s3_server import S3Server
from semmae.tests.world import World, lasting_bytes, pretrain_options

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("quick_retries")


def options_for(world: World, output: StorePath, **changes: object) -> ExtractPartsOptions:
    options = ExtractPartsOptions(
        data=world.data,
        learner=world.learner,
        output=output,
        cache_images=24,
    )
    return replace(options, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("local") / "store"
    extract_parts(options_for(world, output))
    return output


@pytest.fixture(scope="module")
def full(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with soft part maps too."""
    output = tmp_path_factory.mktemp("full") / "store"
    extract_parts(options_for(world, output, probabilities=True))
    return output


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """The URL of an empty bucket."""
    name, client = "stores", s3_server.client
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    keys = [{"Key": key} for key in objects_of(s3_server)]
    if keys:
        client.delete_objects(Bucket=name, Delete={"Objects": keys})
    client.delete_bucket(Bucket=name)


@pytest.fixture
def output(bucket: str) -> StorePath:
    return store_path(f"{bucket}/store")


@pytest.fixture
def there(full: Path, s3_server: S3Server, output: StorePath) -> StorePath:
    """The full store, put on the server as it is."""
    for file in full.rglob("*"):
        inner = file.relative_to(full)
        if file.is_file() and inner.parts[0] != "cache":
            key = f"store/{inner.as_posix()}"
            s3_server.client.put_object(Bucket="stores", Key=key, Body=file.read_bytes())
    return output


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user for what is cached of remote stores."""
    folder = tmp_path / "cached"
    folder.mkdir()
    monkeypatch.setattr(mapped_arrays, "_private_folder", lambda: folder)
    return folder


def objects_of(server: S3Server) -> dict[str, Any]:
    """When each object of the bucket was written, by key."""
    found = server.client.list_objects_v2(Bucket="stores").get("Contents", [])
    return {entry["Key"]: entry["LastModified"] for entry in found}


def refuse(*_: object) -> Any:
    raise AssertionError("no worker is needed")


def test_extract_parts__to_s3_writes_the_bytes_of_the_local_store(
    world: World, local: Path, output: StorePath, direct_s3: S3Server
) -> None:
    record = extract_parts(options_for(world, output))
    assert lasting_bytes(output) == lasting_bytes(local)
    before = objects_of(direct_s3)
    assert [key for key in before if ".tmp" in key or "/tries/" in key] == []
    assert extract_parts(options_for(world, output), refuse) == record
    assert objects_of(direct_s3) == before
    (kept,) = (output / "runs").glob("*.json")
    assert read_json(kept)["options"]["output"] == "s3://stores/store"


def test_extract_parts__through_faults_ends_with_the_same_bytes(
    world: World, local: Path, output: StorePath, faulty_s3: FaultyProxy
) -> None:
    extract_parts(options_for(world, output))
    faulty_s3.calm = True
    assert lasting_bytes(output) == lasting_bytes(local)
    assert {"busy", "dropped", "stalled"} <= {fault for fault, n in faulty_s3.met.items() if n}
    again = {request.split()[0] for request, n in faulty_s3.requests.items() if n > 1}
    assert {"GET", "PUT", "HEAD"} <= again


class TakesOver(ExtractionWorker):
    """A worker that has nothing to encode."""

    def _batch(self, loaded: Any) -> Any:
        raise AssertionError("nothing is new")


class Stops(ExtractionWorker):
    """A worker that breaks off in the middle of its second shard."""

    def _batch(self, loaded: Any) -> Any:
        if self._now == 1:
            raise KeyboardInterrupt
        return super()._batch(loaded)

    def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
        self._now = shard
        return super().__call__(shard, tell)


def test_extract_parts__broken_off_anywhere_goes_on_to_the_same_bytes(
    world: World,
    local: Path,
    output: StorePath,
    calm_s3: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stands() -> list[str]:
        return [name for name in lasting_bytes(output) if name.split("/")[0] in ("commits", "meta")]

    with pytest.raises(KeyboardInterrupt):
        extract_parts(options_for(world, output), Stops)
    assert stands() == ["commits/00000.json", "meta/part-00000.parquet"]

    def stops_between(path: StorePath, record: dict[str, Any]) -> None:
        if path.name == "00001.json":
            raise KeyboardInterrupt
        write_json(path, record)

    monkeypatch.setattr(part_writer, "write_json", stops_between)
    with pytest.raises(KeyboardInterrupt):
        extract_parts(options_for(world, output))
    monkeypatch.setattr(part_writer, "write_json", write_json)
    assert stands() == ["commits/00000.json", "meta/part-00000.parquet", "meta/part-00001.parquet"]

    class Loses(ExtractionWorker):
        def __call__(self, shard: int, tell: Tell = print) -> Future[Record]:
            if shard == 2:
                self._writer.wait()  # an upload is tried again for long
                calm_s3.answer = 503
            return super().__call__(shard, tell)

    with pytest.raises(UserError, match=r"s3://stores/.* does not answer: 5 tries") as lost:
        extract_parts(options_for(world, output), Loses)
    assert "\n" not in str(lost.value)
    calm_s3.answer = None
    extract_parts(options_for(world, output))
    assert lasting_bytes(output) == lasting_bytes(local)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_extraction_worker__in_processes_of_their_own_write_the_same_bytes(
    world: World, local: Path, output: StorePath, direct_s3: S3Server
) -> None:
    """What an actor does with the settings that it is sent, without Ray's half minute to start."""

    def in_processes(shards: list[int]) -> Iterator[dict[str, Any]]:
        settings = pickle.dumps(replace(worker_settings(options, plan, workers), output=output))
        children = []
        for shard in shards:
            child = os.fork()
            if child == 0:
                ended = 1
                try:
                    ExtractionWorker(pickle.loads(settings))(shard).result()
                    ended = 0
                finally:
                    os._exit(ended)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(shards)
        yield from ()

    options = options_for(world, output)
    with open_workers(options.placement) as workers:
        plan = list_images(options.data, options.split)
        create_store(output, PartStore.open(local).identity, plan.tables(), plan.class_names)
        list(in_processes([0, 1, 2]))
    assert extract_parts(options, refuse)["ok"] == 72
    assert lasting_bytes(output) == lasting_bytes(local)


def test_update__takes_rows_from_a_store_on_s3_and_is_mended_by_them(
    world: World, full: Path, there: StorePath, bucket: str, direct_s3: S3Server, tmp_path: Path
) -> None:
    kept = {"probabilities": True, "cache_images": 0}
    extract_parts(options_for(world, tmp_path / "new", update=full, **kept))
    new = store_path(f"{bucket}/new")
    assert isinstance(new, RemotePath)
    extract_parts(options_for(world, new, update=there, **kept), TakesOver)
    sound = lasting_bytes(new)
    assert sound == lasting_bytes(tmp_path / "new")
    (new / "meta/part-00001.parquet").write_bytes(b"something else")
    (new / "parts.zarr/labels/c/2/0/0").unlink()
    (new / "commits/00000.json").unlink()
    named = {fault.name for fault in verify_parts(new)}
    assert named == {
        "meta/part-00001.parquet",
        "parts.zarr/labels/c/2/0/0",
        "commits/00000.json",
    }
    assert {fault.name for fault in repair_parts(RepairPartsOptions(parts=new))} == named
    assert lasting_bytes(new) == sound
    (new / "notes.txt").write_bytes(b"foreign")
    assert [str(fault) for fault in verify_parts(new)] == [
        "notes.txt is foreign: no record of the store knows it"
    ]


def test_import_parts__to_s3_writes_the_bytes_of_the_local_store(
    world: World, output: StorePath, direct_s3: S3Server, tmp_path: Path
) -> None:
    options = ImportPartsOptions(
        labels=world.labels, data=world.data, output=tmp_path / "store", grid="4"
    )
    import_parts(options)
    import_parts(replace(options, output=output))
    assert lasting_bytes(output) == lasting_bytes(tmp_path / "store")


def test_part_store__of_s3_gives_what_the_local_one_gives(
    full: Path, there: StorePath, faulty_s3: FaultyProxy, temporary: Path
) -> None:
    here, remote = PartStore.open(full), PartStore.open(there)
    assert remote.fingerprint == here.fingerprint
    assert remote.meta().equals(here.meta())
    assert remote.plan().equals(here.plan())
    np.testing.assert_array_equal(remote.labels(), here.labels())
    assert [file.name for file in temporary.iterdir()] == [f"labels-{here.fingerprint}.npy"]
    soft = here.probabilities()
    np.testing.assert_array_equal(remote.probabilities()[:], soft[:])
    np.testing.assert_array_equal(remote.probabilities()[40], soft[40])
    kept, cache = remote.image_cache(), here.image_cache()
    for index in (0, 40, 71):
        np.testing.assert_array_equal(kept.read(index), cache.read(index))
    assert {"busy", "dropped"} <= {fault for fault, n in faulty_s3.met.items() if n}


def test_part_store__labels_of_s3_are_read_once(
    there: StorePath, calm_s3: FaultyProxy, temporary: Path
) -> None:
    PartStore.open(there).labels()
    calm_s3.requests.clear()
    store = PartStore.open(there)
    assert store.labels().shape == (72, 4, 4)
    assert not [request for request in calm_s3.requests if "parts.zarr" in request]


def test_image_cache__of_s3_is_read_by_ranges(there: StorePath, calm_s3: FaultyProxy) -> None:
    cache = PartStore.open(there).image_cache()
    cache.warm()
    calm_s3.requests.clear()
    for index in range(40, 50):
        cache.read(index)
    assert calm_s3.requests.total() == 10
    assert all(request.startswith("GET ") and "bytes=" in request for request in calm_s3.requests)


def test_pretrain__with_a_store_on_s3_is_that_with_the_local_one(
    world: World,
    full: Path,
    there: StorePath,
    direct_s3: S3Server,
    temporary: Path,
    tmp_path: Path,
) -> None:
    settings: dict[str, object] = {"masking": "semantic", "images": "cache"}
    remote = pretrain_options(world, tmp_path / "run", parts=there, loader_workers=2, **settings)
    at_hand = pretrain_options(world, tmp_path / "other", parts=full, **settings)
    assert pretraining_data(remote).fingerprint == pretraining_data(at_hand).fingerprint
    logs = []
    for options in (remote, at_hand):
        pretrain(options)
        log = json.loads((options.output / "log.jsonl").read_text())
        logs.append({name: log[name] for name in ("loss", "alpha", "step")})
    assert logs[0] == logs[1]


def test_eval_parts__of_a_store_on_s3_is_on_record_and_runs_again(
    world: World,
    full: Path,
    there: StorePath,
    direct_s3: S3Server,
    temporary: Path,
    tmp_path: Path,
) -> None:
    options = PartsOptions(parts=there, output=tmp_path / "results", images=20)
    metrics = evaluate_parts(options)
    assert metrics == evaluate_parts(replace(options, parts=full, output=tmp_path / "others"))
    table = rerun(tmp_path / "results")
    assert set(table["checkpoint"]) == {"s3://stores/store"}
    assert table["measured"].all()
    assert set(table["note"]) == {""}


def test_show__and_info_of_a_store_on_s3_are_those_of_the_local_one(
    world: World,
    full: Path,
    there: StorePath,
    direct_s3: S3Server,
    temporary: Path,
    tmp_path: Path,
) -> None:
    assert parts_info(there) == parts_info(full)
    drawn = []
    for name, store in (("remote", there), ("local", full)):
        parts, masks = tmp_path / f"{name}.png", tmp_path / f"{name}-masks.png"
        show_parts(ShowPartsOptions(parts=store, data=world.data, output=parts))
        show_masks(ShowMasksOptions(parts=store, data=world.data, output=masks, images=2))
        drawn.append((parts.read_bytes(), masks.read_bytes()))
    assert drawn[0] == drawn[1]


def test_forecast_extraction__to_s3_writes_nothing_there(
    world: World, bucket: str, there: StorePath, direct_s3: S3Server
) -> None:
    before = objects_of(direct_s3)
    options = options_for(world, there, probabilities=True)
    assert forecast_extraction(options)["done already"] == 72
    new = replace(options, output=store_path(f"{bucket}/new"))
    assert forecast_extraction(new)["done already"] == 0
    assert objects_of(direct_s3) == before


# Large files, and uploads that are killed.


def in_small_parts(monkeypatch: pytest.MonkeyPatch, size: int = 1 << 16) -> None:
    """Let files of twice a size go in parts of it."""
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(remote_path, "_LARGE", 2 * size)
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: size)
    monkeypatch.setattr(s3fs.S3FileSystem._pipe_file, "__defaults__", (size, None, "overwrite"))


def uploads_of(server: S3Server) -> set[str]:
    """Keys of the uploads that were begun and not ended."""
    found = server.client.list_multipart_uploads(Bucket="stores").get("Uploads", [])
    return {upload["Key"] for upload in found}


@pytest.mark.parametrize("way", ["write_bytes", "upload"])
def test_remote_path__tries_a_large_file_again_part_by_part(
    way: str,
    output: StorePath,
    faulty_s3: FaultyProxy,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(output, RemotePath)
    in_small_parts(monkeypatch)
    data = np.random.default_rng(0).bytes(200 << 10)
    (tmp_path / "file").write_bytes(data)
    if way == "upload":
        with (tmp_path / "file").open("rb") as file:
            output.upload(file)
    else:
        output.write_bytes(data)
    faulty_s3.calm = True
    assert b"".join(output.blocks()) == data
    parts = [request for request in faulty_s3.requests if "partNumber=" in request]
    assert len({request.partition("partNumber=")[2] for request in parts}) == 4
    assert max(faulty_s3.requests[request] for request in parts) > 1
    # One upload, of which some parts were put twice: not one upload a failure.
    assert len({request.partition("uploadId=")[2].split("&")[0] for request in parts}) == 1
    assert uploads_of(s3_server) == set()


def test_remote_path__begins_again_an_upload_that_another_ended(
    output: StorePath, direct_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_parts(monkeypatch)
    monkeypatch.setattr(remote_path, "_PART_TRIES", 1)  # this server answers 500, not 404
    call = s3fs.S3FileSystem._call_s3
    ended: list[str] = []

    async def ends_it_first(self: Any, method: str, *rest: Any, **asked: Any) -> Any:
        if method == "upload_part" and asked["PartNumber"] == 2 and not ended:
            ended.append(asked["UploadId"])
            named = {name: asked[name] for name in ("Bucket", "Key", "UploadId")}
            direct_s3.client.abort_multipart_upload(**named)
        return await call(self, method, *rest, **asked)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", ends_it_first)
    data = bytes(150 << 10)
    assert isinstance(output, RemotePath)
    output.write_bytes(data)
    assert len(ended) == 1
    assert output.stat().st_size == len(data)
    assert uploads_of(direct_s3) == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_extract_parts__killed_in_an_upload_leaves_nothing_once_it_is_run_again(
    world: World,
    local: Path,
    output: StorePath,
    direct_s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = options_for(world, output)
    child = os.fork()
    if child == 0:
        call = s3fs.S3FileSystem._call_s3

        async def killed(self: Any, method: str, *rest: Any, **asked: Any) -> Any:
            if method == "complete_multipart_upload":
                os.kill(os.getpid(), signal.SIGKILL)
            return await call(self, method, *rest, **asked)

        try:
            monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", killed)
            in_small_parts(monkeypatch, 1 << 10)
            extract_parts(options)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    (left,) = uploads_of(direct_s3)
    assert left.startswith("store/")
    others = {"store/notes", "store2/images/00000.jpeg"}
    for key in others:
        direct_s3.client.create_multipart_upload(Bucket="stores", Key=key)
    extract_parts(options)
    assert uploads_of(direct_s3) == others
    assert lasting_bytes(output) == lasting_bytes(local)
    for upload in direct_s3.client.list_multipart_uploads(Bucket="stores")["Uploads"]:
        named = {name: upload[name] for name in ("Key", "UploadId")}
        direct_s3.client.abort_multipart_upload(Bucket="stores", **named)


def test_end_uploads__goes_through_all_pages(
    output: StorePath, direct_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"store/images/{number}" for number in range(5)]
    for key in keys:
        direct_s3.client.create_multipart_upload(Bucket="stores", Key=key)
    found = direct_s3.client.list_multipart_uploads(Bucket="stores")["Uploads"]

    def paged(self: Any, method: str, KeyMarker: str = "", **asked: Any) -> Any:
        here = [upload for upload in found if upload["Key"] > KeyMarker][:2]
        more = here[-1]["Key"] < keys[-1]
        after = {"NextKeyMarker": here[-1]["Key"], "NextUploadIdMarker": here[-1]["UploadId"]}
        return {"Uploads": here, "IsTruncated": more, **(after if more else {})}

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", paged)
    assert isinstance(output, RemotePath)
    output.end_uploads(lambda name: name != "images/3")
    assert uploads_of(direct_s3) == {"store/images/3"}
    output.end_uploads(lambda name: True)
    assert uploads_of(direct_s3) == set()


def test_extract_parts__without_the_right_to_list_uploads_completes_all_the_same(
    world: World,
    local: Path,
    output: StorePath,
    direct_s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = []

    def denies(self: Any, method: str, **asked: Any) -> Any:
        refused.append(method)
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", denies)
    extract_parts(options_for(world, output))
    assert refused == ["list_multipart_uploads"]
    assert lasting_bytes(output) == lasting_bytes(local)
