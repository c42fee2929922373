import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semmae.errors import MismatchError, MissingError, SettingError
from semmae.pipeline.sources import list_images
from semmae.pipeline.stored_images import store_images
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.import_parts import ImportPartsOptions, import_parts
from semmae.stages.pictures import colours_of
from semmae.stages.show import (
    ShowMasksOptions,
    ShowPartsOptions,
    ShowReconstructionsOptions,
    parts_info,
    show_masks,
    show_parts,
    show_reconstructions,
)
from semmae.storage.part_store import PartStore
from semmae.tests.world import World


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "png", "picture.png.pdf"])
def test_show_options__output_must_be_a_png(name: str) -> None:
    for options in (ShowPartsOptions, ShowMasksOptions):
        with pytest.raises(SettingError, match=r"--output is .*expected .*png"):
            options(parts=Path("x"), data="x", output=Path(name))
    with pytest.raises(SettingError, match=r"--output is .*expected .*png"):
        ShowReconstructionsOptions(run=Path("x"), data="x", output=Path(name))
    assert ShowPartsOptions(parts=Path("x"), data="x", output=Path("a.PNG"))


def test_show__other_images_are_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "data")
    gone = tmp_path / "data" / list_images(world.data, "train").keys[3]
    gone.unlink()
    output = tmp_path / "picture.png"
    settings = {"parts": world.store, "data": str(tmp_path / "data"), "output": output}
    with pytest.raises(MismatchError, match=f"1 of its 72 .*{gone.name}, is not there"):
        show_parts(ShowPartsOptions(**settings))  # type: ignore[arg-type]
    gone.write_bytes(b"of another size")
    with pytest.raises(MismatchError, match=f"{gone.name}, has another size"):
        show_masks(ShowMasksOptions(**settings))  # type: ignore[arg-type]
    assert not output.exists()


def test_show__images_gone_bad_are_skipped(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "data")
    for key in list_images(world.data, "train").keys[:70]:
        place = tmp_path / "data" / key
        place.write_bytes(bytes(place.stat().st_size))
    output = tmp_path / "picture.png"
    show_masks(ShowMasksOptions(parts=world.store, data=str(tmp_path / "data"), output=output))
    # A row for each of the two images left, of the eight asked for.
    assert np.array(Image.open(output)).shape[0] < 3 * 128 + 64


def test_store_images__rows_are_those_of_the_store(world: World) -> None:
    store = PartStore.open(world.store)
    plan = store_images(store, world.data)
    assert len(plan) == store.identity.images == 72
    assert plan.fingerprint == store.identity.plan_fingerprint
    assert all((Path(plan.root) / key).is_file() for key in plan.keys)


def test_show__draws_parts_masks_and_reconstructions(world: World, tmp_path: Path) -> None:
    parts = show_parts(
        ShowPartsOptions(parts=world.store, data=world.data, output=tmp_path / "parts.png")
    )
    masks = show_masks(
        ShowMasksOptions(parts=world.store, data=world.data, output=tmp_path / "masks.png")
    )
    made = show_reconstructions(
        ShowReconstructionsOptions(
            run=world.encoder, data=world.data, output=tmp_path / "reconstructions.png"
        )
    )
    for path in (parts, masks, made):
        picture = np.array(Image.open(path))
        assert picture.ndim == 3
        assert picture.std() > 10


def test_show_masks__has_a_column_for_every_policy(
    world: World, attentive_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = []
    for store in (attentive_store, world.store):
        output = tmp_path / "masks.png"
        show_masks(ShowMasksOptions(parts=store, data=world.data, output=output, images=24))
        pages.append(np.array(Image.open(output)))
        told = capsys.readouterr().err
        assert ("no masks of --masking attention" in told) == (store == world.store)
    # Image, parts, semantic and shuffled at four points each, random, block, green, attention.
    assert [page.shape[1] for page in pages] == [14 * 131 + 3, 13 * 131 + 3]
    page = pages[0]
    assert page[:16].std() > 10
    columns = [page[16:, 3 + 131 * i :][:, :128] for i in range(14)]
    one_each = [columns[place] for place in (5, 6, 7, 8, 9, 13)]
    assert len({column.tobytes() for column in one_each}) == 6
    for column in columns[2:]:
        assert np.mean((column[3:131] == 110).all(axis=2)) == pytest.approx(0.75, abs=0.01)


def test_parts_info__counts_images_and_parts(world: World) -> None:
    info = parts_info(world.store)
    assert info["images"] == 72
    assert info["bad images"] == 0
    assert info["grid"] == "4 x 4"
    assert info["made by"] == f"learner {PartStore.open(world.store).identity.learner_hash[:12]}"


def test_parts_info__says_where_imported_parts_come_from(world: World, tmp_path: Path) -> None:
    import_parts(
        ImportPartsOptions(
            labels=world.labels, data=world.data, output=tmp_path / "store", grid="4"
        )
    )
    assert str(parts_info(tmp_path / "store")["made by"]).startswith("label images ")


def test_show_parts__draws_parts_alone_where_the_images_are_not_named(
    world: World, tmp_path: Path
) -> None:
    output = tmp_path / "parts.png"
    show_parts(ShowPartsOptions(parts=world.store, output=output, images=12))
    drawn = np.array(Image.open(output))
    assert drawn.shape == (2 * 131 + 3, 8 * 131 + 3, 3)
    store = PartStore.open(world.store)
    shown = np.random.default_rng(0).permutation(np.flatnonzero(store.ok()))[11]
    labels = np.asarray(store.labels()[int(shown)])
    colours = colours_of(store.identity.parts, store.identity.background)
    tile = drawn[134:262, 3 + 3 * 131 : 131 + 3 * 131]
    assert np.array_equal(tile, colours[labels].repeat(32, axis=0).repeat(32, axis=1))


def test_show_parts__a_store_of_bad_images_has_nothing_to_show(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartStore, "ok", lambda self: np.zeros(72, dtype=bool))
    with pytest.raises(MissingError, match=r"every image of .* is bad: expected one with parts"):
        show_parts(ShowPartsOptions(parts=world.store, output=tmp_path / "parts.png"))


def test_show_parts__draws_soft_parts_where_the_store_keeps_them(
    world: World, tmp_path: Path
) -> None:
    extract_parts(
        ExtractPartsOptions(
            data=world.data, learner=world.learner, output=tmp_path / "store", probabilities=True
        )
    )
    rows = {}
    for name, store in (("hard", world.store), ("soft", tmp_path / "store")):
        output = tmp_path / f"{name}.png"
        show_parts(ShowPartsOptions(parts=store, data=world.data, output=output, images=8))
        rows[name] = np.array(Image.open(output))
    height = rows["hard"].shape[0]
    assert height == 2 * 131 + 3
    assert rows["soft"].shape[0] == 3 * 131 + 3
    assert np.array_equal(rows["soft"][: height - 3], rows["hard"][: height - 3])
    assert rows["soft"][height:-3].std() > 10
