"""A tiny data set, encoder, part learner and store, made once by the stages themselves; and S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.learn_parts import learn_parts
from semmae.stages.make_creatures import MakeCreaturesOptions, make_creatures
from semmae.stages.pretrain import pretrain
from semmae.storage import connections, retries
from semmae.tests.faulty_proxy import FaultyProxy
from semmae.tests.s3_server import S3Server, use_s3
from semmae.tests.world import World, learn_options, pretrain_options


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file in one of several processes: its fixtures are made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, which tests must not find or fill."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    folder = tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def attentive_store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part store of the world's images that keeps the encoder's class-token attention."""
    store = tmp_path_factory.mktemp("attentive") / "store"
    extract_parts(
        ExtractPartsOptions(
            data=world.data, learner=world.learner, output=store, class_attention=True
        )
    )
    return store


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    make_creatures(
        MakeCreaturesOptions(output=made.root / "creatures", train=72, val=24, size=32, seed=3)
    )
    pretrain(pretrain_options(made, made.encoder))
    learn_parts(learn_options(made, made.learner))
    extract_parts(ExtractPartsOptions(data=made.data, learner=made.learner, output=made.store))
    return made


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server without buckets."""
    pytest.importorskip("moto.server")
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that fails is asked five times, without long waits."""
    quick = retries.Patience(tries=5, first_wait=0.01, longest_wait=0.05)
    monkeypatch.setattr(retries, "PATIENCE", quick)


@pytest.fixture
def direct_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """S3 without a proxy, which takes as long as the server itself."""
    s3fs = pytest.importorskip("s3fs")
    use_s3(s3_server.url, monkeypatch)
    yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def calm_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """S3, through a proxy that spoils nothing."""
    s3fs = pytest.importorskip("s3fs")
    with FaultyProxy(s3_server.port, stall=0.9) as between:
        between.calm = True
        use_s3(between.url, monkeypatch)
        yield between
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def faulty_s3(
    calm_s3: FaultyProxy, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> FaultyProxy:
    """The same, spoiling most first tries."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.6)
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.6)
    calm_s3.calm = False
    return calm_s3
