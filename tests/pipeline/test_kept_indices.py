import os
from collections.abc import Callable
from pathlib import Path

import pytest

from semmae.pipeline import sources
from semmae.pipeline.archives import ArchiveIndex
from semmae.pipeline.data_root import DataRoot
from semmae.pipeline.sources import ImageReader, list_images
from semmae.tests.pipeline.images import picture, write_forms

Forms = dict[str, Path]


@pytest.fixture
def forms(tmp_path: Path, own_caches: Path) -> Forms:
    return write_forms(tmp_path / "forms", [picture(number) for number in range(10)])


@pytest.fixture
def gone_through(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives that are gone through, as they are."""
    paths: list[str] = []

    def told(index: Callable[[DataRoot, str], ArchiveIndex]) -> Callable[..., ArchiveIndex]:
        def found(root: DataRoot, path: str) -> ArchiveIndex:
            paths.append(path)
            return index(root, path)

        return found

    for name in ("index_of_parquet", "index_of_tar"):
        monkeypatch.setattr(sources, name, told(getattr(sources, name)))
    return paths


@pytest.mark.parametrize("form", ["parquet", "tars"])
@pytest.mark.parametrize("split", ["all", "train"])
def test_list_images__goes_through_an_archive_once(
    form: str, split: sources.Split, forms: Forms, gone_through: list[str]
) -> None:
    first = list_images(forms[form], split)
    assert gone_through
    gone_through.clear()
    again = list_images(forms[form], split)
    assert gone_through == []
    assert again.table.equals(first.table)
    assert (again.class_names, again.fingerprint) == (first.class_names, first.fingerprint)


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_list_images__goes_through_what_changed(
    form: str, forms: Forms, gone_through: list[str]
) -> None:
    """Of the same size, too."""
    list_images(forms[form])
    changed, *others = sorted({*gone_through})
    gone_through.clear()
    os.utime(forms[form] / changed, (1, 1))
    list_images(forms[form])
    assert gone_through == [changed]
    assert changed not in others


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_list_images__a_damaged_index_is_made_anew(
    form: str, forms: Forms, own_caches: Path, gone_through: list[str]
) -> None:
    expected = list_images(forms[form]).table
    kept = sorted(own_caches.rglob("*.parquet"))
    assert len(kept) == len(gone_through)
    gone_through.clear()
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    assert list_images(forms[form]).table.equals(expected)
    assert len(gone_through) == 1


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_list_images__does_without_a_cache_folder(
    form: str, forms: Forms, own_caches: Path, gone_through: list[str]
) -> None:
    own_caches.write_text("a file")
    for _ in range(2):
        plan = list_images(forms[form])
        assert ImageReader(plan).read(0)
    assert len(gone_through) == 2 * len({*gone_through})
