from pathlib import Path

import pytest

from semmae.storage.connections import whole_place
from semmae.storage.store_paths import store_path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("s3://bucket/images/", "s3://bucket/images"),
        ("memory://", "memory://"),
        ("file:///data/my%20images", "/data/my images"),
        ("/data/images/", "/data/images"),
        (Path("/data"), "/data"),
    ],
)
def test_whole_place__leaves_urls_and_makes_paths_absolute(data: str | Path, expected: str) -> None:
    assert whole_place(data) == expected


def test_store_path__knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert store_path("~/store") == Path("/home/me/store")
    assert store_path("store/~") == Path("store/~")
