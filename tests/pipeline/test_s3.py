"""Data on an S3 server of this machine, through a proxy that spoils most first tries."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from semmae.errors import MissingError, UserError
from semmae.pipeline.decoding import BadImage
from semmae.pipeline.sources import ImageReader, list_images
from semmae.tests.faulty_proxy import FaultyProxy
from semmae.tests.pipeline.images import picture, write_forms
from semmae.tests.s3_server import S3Server, use_s3

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("quick_retries")

BUCKET = "images"
IMAGES = [picture(number) for number in range(10)]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_forms(tmp_path_factory.mktemp("forms"), IMAGES)


@pytest.fixture(scope="module")
def filled(s3_server: S3Server, forms: dict[str, Path]) -> S3Server:
    """An S3 server that holds every form of the images."""
    client = s3_server.client
    client.create_bucket(Bucket=BUCKET)
    for root in forms.values():
        for file in sorted(root.rglob("*.*")):
            key = file.relative_to(root.parent).as_posix()
            client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
    client.put_object(Bucket=BUCKET, Key="folder/", Body=b"")  # stands for the folder
    return s3_server


@pytest.fixture
def calm(filled: S3Server, calm_s3: FaultyProxy) -> FaultyProxy:
    """A proxy before that server that spoils nothing."""
    return calm_s3


@pytest.fixture
def proxy(filled: S3Server, faulty_s3: FaultyProxy, own_caches: Path) -> FaultyProxy:
    """The same, spoiling most first tries."""
    return faulty_s3


def read_all(reader: ImageReader) -> list[bytes]:
    order = np.random.default_rng(0).permutation(len(reader)).tolist()
    with ThreadPoolExecutor(4) as pool:
        data = dict(zip(order, pool.map(reader.read, order), strict=True))
    return [data[index] for index in range(len(reader))]


@pytest.mark.parametrize("form", ["folder", "parquet", "tars"])
def test_s3__gives_plan_and_bytes_of_the_local_data_through_faults(
    form: str, proxy: FaultyProxy, forms: dict[str, Path]
) -> None:
    local = list_images(forms[form], "train")
    plan = list_images(f"s3://{BUCKET}/{form}", "train")
    assert plan.root == f"s3://{BUCKET}/{form}"
    assert plan.table.equals(local.table)
    assert (plan.class_names, plan.fingerprint) == (local.class_names, local.fingerprint)
    reader = ImageReader(plan, in_memory_limit=0)
    assert read_all(reader) == IMAGES_IN_ORDER[form] == read_all(ImageReader(local))
    expected = {"busy", "dropped", "none"} | ({"stalled"} if form != "parquet" else set())
    assert expected <= {fault for fault, count in proxy.met.items() if count}


IN_CLASSES = [data for label in (0, 1) for data in IMAGES[label::2]]
IMAGES_IN_ORDER = {"folder": IN_CLASSES, "parquet": IMAGES, "tars": IMAGES}


def test_s3__reads_an_image_by_one_request(calm: FaultyProxy) -> None:
    for form in ("folder", "tars"):
        reader = ImageReader(list_images(f"s3://{BUCKET}/{form}"))
        calm.requests.clear()
        for index in range(len(reader)):
            reader.read(index)
        assert calm.requests.total() == len(IMAGES)
        assert all(request.startswith("GET ") for request in calm.requests)


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_s3__goes_through_an_archive_once(
    form: str, calm: FaultyProxy, own_caches: Path, filled: S3Server
) -> None:
    first = list_images(f"s3://{BUCKET}/{form}")
    calm.requests.clear()
    assert list_images(f"s3://{BUCKET}/{form}").table.equals(first.table)
    archives = [request for request in calm.requests if ".parquet" in request or ".tar" in request]
    assert archives
    assert all(request.startswith("HEAD ") for request in archives)


def test_s3__lists_folders_by_one_request_each(calm: FaultyProxy) -> None:
    list_images(f"s3://{BUCKET}/folder")
    classes = [request for request in calm.requests if "class-" in request]
    assert [calm.requests[request] for request in classes] == [1, 1]
    assert calm.requests.total() <= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_s3__reads_in_forked_processes_and_pickled(calm: FaultyProxy) -> None:
    reader = ImageReader(list_images(f"s3://{BUCKET}/tars"))
    assert reader.read(3) == IMAGES[3]
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if read_all(reader) == IMAGES else 1
            finally:
                os._exit(status)
        children.append(child)
    assert read_all(pickle.loads(pickle.dumps(reader))) == IMAGES
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_s3__a_dead_server_is_no_bad_image(
    filled: S3Server, forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(filled.port, stall=0) as between:
        between.calm = True
        use_s3(between.url, monkeypatch)
        plans = [list_images(f"s3://{BUCKET}/{form}") for form in forms]
    s3fs.S3FileSystem.clear_instance_cache()
    for plan in plans:
        with pytest.raises(UserError, match=r"storage of s3://.* does not answer: 5 tries") as met:
            ImageReader(plan).read(0)
        assert "\n" not in str(met.value)
    with pytest.raises(UserError, match=r"storage of s3://images/folder does not answer: 5 tries"):
        list_images(f"s3://{BUCKET}/folder")


def test_s3__a_missing_image_is_bad_and_a_missing_bucket_is_not(
    calm: FaultyProxy, filled: S3Server
) -> None:
    client = filled.client
    client.create_bucket(Bucket="passing")
    client.put_object(Bucket="passing", Key="a/0.png", Body=IMAGES[0])
    client.put_object(Bucket="passing", Key="a/1.png", Body=IMAGES[1])
    reader = ImageReader(list_images("s3://passing"))
    client.delete_object(Bucket="passing", Key="a/1.png")
    with pytest.raises(BadImage, match="unreadable: No such file or directory") as bad:
        reader.read(1)
    assert bad.value.kind == "FileNotFoundError"
    client.delete_object(Bucket="passing", Key="a/0.png")
    client.delete_bucket(Bucket="passing")
    with pytest.raises(MissingError, match="s3://passing is gone or empty"):
        reader.read(0)


def test_s3__says_in_a_sentence_what_is_wrong(
    calm: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match=r"s3://nowhere does not exist: give a folder"):
        list_images("s3://nowhere")
    with pytest.raises(MissingError, match=r"s3://images/nothing does not exist: give a folder"):
        list_images(f"s3://{BUCKET}/nothing")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://images/folder cannot be read: .*credentials"):
        list_images(f"s3://{BUCKET}/folder")
