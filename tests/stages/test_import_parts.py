import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semmae import cli
from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.pipeline.sources import list_images
from semmae.stages.evals.parts import PartsOptions, measure_parts
from semmae.stages.import_parts import PATCH, ImportPartsOptions, import_parts
from semmae.stages.label_images import label_path, true_labels
from semmae.stages.pretrain import pretrain
from semmae.stages.show import (
    ShowMasksOptions,
    ShowPartsOptions,
    parts_info,
    show_masks,
    show_parts,
)
from semmae.stages.store_filling import commit_shard
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, lasting_bytes, pretrain_options


def options_for(world: World, output: Path, **changes: object) -> ImportPartsOptions:
    plain = ImportPartsOptions(labels=world.labels, data=world.data, output=output, grid="4")
    return replace(plain, **changes)  # type: ignore[arg-type]


def interrupt(monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    """Make the next imports break off when they come to a shard."""

    def stops(output: Path, number: int, *rest: Any, **arrays: Any) -> dict[str, Any]:
        if number == shard:
            raise KeyboardInterrupt
        return commit_shard(output, number, *rest, **arrays)

    monkeypatch.setattr("semmae.stages.import_parts.commit_shard", stops)


@pytest.fixture(scope="module")
def imported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the true parts of the world."""
    output = tmp_path_factory.mktemp("imported") / "store"
    import_parts(options_for(world, output))
    return output


@pytest.fixture
def few(tmp_path: Path) -> ImportPartsOptions:
    """Four images of 8 x 12 pixels and their label images, on a grid of 2 x 2."""
    generator = np.random.default_rng(5)
    for name in "abcd":
        for folder in ("images/train", "labels/train"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (8, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / f"{name}.jpg")
        write_labels(tmp_path / "labels" / "train" / f"{name}.png", generator.integers(0, 5, 96))
    return ImportPartsOptions(
        labels=tmp_path / "labels",
        data=str(tmp_path / "images"),
        output=tmp_path / "store",
        grid="2",
    )


def write_labels(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.reshape(8, 12).astype(np.uint8)).save(path)


def test_import_parts__holds_the_majority_label_of_each_patch(world: World, imported: Path) -> None:
    store = PartStore.open(imported)
    keys = list_images(world.data, "train").keys.tolist()
    side = 4 * PATCH
    expected = true_labels(world.labels, keys, (4, 4), (side, side))
    np.testing.assert_array_equal(store.labels(), expected)
    assert store.identity.image_size == (side, side)
    assert store.identity.background == 0
    largest = max(np.asarray(Image.open(label_path(world.labels, key))).max() for key in keys)
    assert store.identity.parts == largest + 1
    assert store.identity.preprocessing == {"geometry": "squash", "labels": "majority"}


@pytest.mark.parametrize(("grid", "shape"), [("2", (2, 2)), ("2x3", (2, 3)), ("5x1", (5, 1))])
def test_import_parts__labels_of_another_size_than_the_grid_follow_the_slow_loop(
    few: ImportPartsOptions, grid: str, shape: tuple[int, int]
) -> None:
    few = replace(few, grid=grid)
    import_parts(few)
    store = PartStore.open(few.output)
    assert store.identity.grid == shape
    (h, w), (height, width) = shape, (shape[0] * PATCH, shape[1] * PATCH)
    assert store.identity.image_size == (height, width)
    for row, name in enumerate("abcd"):
        values = np.asarray(Image.open(few.labels / "train" / f"{name}.png")).tolist()
        votes: list[list[list[int]]] = [[[0] * 5 for _ in range(w)] for _ in range(h)]
        for y in range(height):
            for x in range(width):
                label = values[(2 * y + 1) * 8 // (2 * height)][(2 * x + 1) * 12 // (2 * width)]
                votes[y // PATCH][x // PATCH][label] += 1
        expected = [[cell.index(max(cell)) for cell in line] for line in votes]
        assert store.labels()[row].tolist() == expected
        share = np.mean([max(cell) / PATCH**2 for line in votes for cell in line])
        confidence = store.meta(["confidence"])["confidence"].to_pylist()
        assert confidence[row] == pytest.approx(share)


def test_import_parts__its_meta_is_that_of_an_extraction(world: World, imported: Path) -> None:
    ours, theirs = (pd.read_parquet(store / "meta") for store in (imported, world.store))
    same = ["index", "key", "label", "width", "height", "crc32", "status"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    assert ours["confidence"].between(0, 1, inclusive="right").all()
    areas = np.stack(ours["part_areas"].to_list())
    np.testing.assert_allclose(areas.sum(axis=1), 1, atol=1e-6)


def test_import_parts__scores_100_against_the_same_labels(
    world: World, imported: Path, tmp_path: Path
) -> None:
    metrics = measure_parts(
        PartsOptions(parts=imported, data=world.data, labels=world.labels, output=tmp_path)
    )
    for name in ("nmi", "ari", "fg_nmi", "fg_ari", "in_image_ari", "in_image_fg_ari"):
        assert metrics[name] == pytest.approx(100), name
    assert metrics["grid.nmi"] < 100


def test_import_parts__the_store_serves_pictures_masks_and_pretraining(
    world: World, imported: Path, tmp_path: Path
) -> None:
    info = parts_info(imported)
    assert (info["images"], info["bad images"], info["background"]) == (72, 0, "part 0")
    shown = show_parts(ShowPartsOptions(parts=imported, data=world.data, output=tmp_path / "p.png"))
    masks = show_masks(ShowMasksOptions(parts=imported, data=world.data, output=tmp_path / "m.png"))
    assert shown.is_file()
    assert masks.is_file()
    options = pretrain_options(world, tmp_path / "run", masking="semantic", parts=imported)
    assert pretrain(options).is_file()


def test_import_parts__an_interrupted_import_ends_as_one_that_was_not(
    world: World, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(world, tmp_path / "store", decode_threads=3)
    with monkeypatch.context() as patch:
        interrupt(patch, shard=1)
        with pytest.raises(KeyboardInterrupt):
            import_parts(options)
    with pytest.raises(DamageError, match="not complete"):
        PartStore.open(tmp_path / "store")
    first = next((tmp_path / "store" / "parts.zarr" / "labels").rglob("0/0/0"))
    written = first.stat().st_mtime_ns
    import_parts(options)
    assert first.stat().st_mtime_ns == written
    assert lasting_bytes(tmp_path / "store") == lasting_bytes(imported)
    runs = (tmp_path / "store" / "runs").iterdir()
    assert ['"parts import"' in run.read_text() for run in runs] == [True, True]


def test_import_parts__one_that_is_complete_is_left_as_it_is(world: World, imported: Path) -> None:
    before = lasting_bytes(imported)
    record = import_parts(options_for(world, imported))
    assert (record["ok"], record["bad"]) == (72, 0)
    assert lasting_bytes(imported) == before


def test_import_parts__a_changed_label_is_refused(few: ImportPartsOptions) -> None:
    import_parts(few)
    before = lasting_bytes(few.output)
    values = np.asarray(Image.open(few.labels / "train" / "c.png")).copy()
    values[3, 3] = (values[3, 3] + 1) % 4
    write_labels(few.labels / "train" / "c.png", values)
    with pytest.raises(MismatchError, match="learner_hash"):
        import_parts(few)
    assert lasting_bytes(few.output) == before


def test_import_parts__labels_that_swap_images_are_another_import(few: ImportPartsOptions) -> None:
    import_parts(few)
    a, b = (few.labels / "train" / f"{name}.png" for name in "ab")
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    with pytest.raises(MismatchError, match="learner_hash"):
        import_parts(few)


def test_import_parts__bad_images_are_rows_and_need_no_labels(few: ImportPartsOptions) -> None:
    train = Path(few.data) / "train"
    broken = (train / "b.jpg").read_bytes()[:-200]
    (train / "b.jpg").write_bytes(broken)
    (few.labels / "train" / "b.png").unlink()
    (train / "c.jpg").write_bytes(b"no image")
    record = import_parts(few)
    assert (record["ok"], record["bad"]) == (2, 2)
    meta = pd.read_parquet(str(few.output / "meta"))
    assert meta["status"].tolist() == ["ok", "bad", "bad", "ok"]
    assert meta["error_code"].tolist()[1:3] == ["truncated", "not-an-image"]
    assert meta["crc32"][1] == zlib.crc32(broken)
    assert meta["confidence"].isna().tolist() == [False, True, True, False]
    assert (np.asarray(PartStore.open(few.output).labels())[1:3] == 255).all()


def test_import_parts__a_missing_label_image_is_named_and_nothing_written(
    few: ImportPartsOptions,
) -> None:
    (few.labels / "train" / "d.png").unlink()
    with pytest.raises(MissingError, match=r"no label image at .*train/d\.png"):
        import_parts(few)
    assert not few.output.exists()
    with pytest.raises(MissingError, match=r"--labels is .*nowhere"):
        import_parts(replace(few, labels=few.labels / "nowhere"))


def test_import_parts__a_damaged_label_image_is_named_and_nothing_written(
    few: ImportPartsOptions,
) -> None:
    place = few.labels / "train" / "b.png"
    place.write_bytes(place.read_bytes()[:60])
    with pytest.raises(DamageError, match=r"train/b\.png is damaged"):
        import_parts(few)
    Image.new("RGB", (12, 8)).save(place)
    with pytest.raises(DamageError, match=r"train/b\.png has mode RGB"):
        import_parts(few)
    assert not few.output.exists()


def test_import_parts__the_first_of_several_faults_in_order_of_the_plan_is_named(
    few: ImportPartsOptions,
) -> None:
    for name in "dcb":
        (few.labels / "train" / f"{name}.png").unlink()
    with pytest.raises(MissingError, match=r"train/b\.png"):
        import_parts(replace(few, decode_threads=4))


def test_import_parts__parts_are_counted_over_pixels_or_given(few: ImportPartsOptions) -> None:
    values = np.zeros(96)
    values[5] = 9  # one pixel, which is no majority anywhere
    write_labels(few.labels / "train" / "d.png", values)
    import_parts(few)
    assert PartStore.open(few.output).identity.parts == 10
    given = replace(few, output=few.output.with_name("given"), num_parts=12, background=11)
    import_parts(given)
    identity = PartStore.open(given.output).identity
    assert (identity.parts, identity.background) == (12, 11)
    with pytest.raises(SettingError, match=r"d\.png holds label 9, but --num-parts 9 allows"):
        import_parts(replace(few, output=few.output.with_name("fewer"), num_parts=9))
    assert not few.output.with_name("fewer").exists()


def test_import_parts__label_254_fits_and_255_does_not(few: ImportPartsOptions) -> None:
    place = few.labels / "train" / "a.png"
    write_labels(place, np.full(96, 254))
    import_parts(few)
    store = PartStore.open(few.output)
    assert store.identity.parts == 255
    assert (np.asarray(store.labels()[0]) == 254).all()
    write_labels(place, np.full(96, 255))
    with pytest.raises(SettingError, match=r"a\.png holds label 255, .* labels 0 to 254"):
        import_parts(replace(few, output=few.output.with_name("other")))


def test_import_parts__background_is_none_or_a_label(few: ImportPartsOptions) -> None:
    import_parts(replace(few, background=-1))
    assert PartStore.open(few.output).identity.background is None
    with pytest.raises(SettingError, match=r"--background is 5: expected a label in .*0 to 4"):
        import_parts(replace(few, output=few.output.with_name("other"), background=5))


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"grid": "0"},
            {"grid": "14x257"},
            {"grid": "14x"},
            {"grid": 257},
            {"decode_threads": 0},
            {"num_parts": 0},
        ),
        {"cache_images": -1},
        *({"num_parts": 256}, {"background": -2}, {"background": 255}),
        {"num_parts": 3, "background": 3},
    ],
)
def test_import_parts__settings_out_of_range_are_named(
    few: ImportPartsOptions, changes: dict[str, Any]
) -> None:
    flag = "--" + list(changes)[-1].replace("_", "-")
    with pytest.raises(SettingError, match=f"{flag} is {list(changes.values())[-1]}: expected"):
        replace(few, **changes)


def test_import_parts__labels_of_rows_of_parquet(few: ImportPartsOptions, tmp_path: Path) -> None:
    import_parts(few)
    images = sorted((Path(few.data) / "train").iterdir())
    (tmp_path / "parquet").mkdir()
    (tmp_path / "rows").mkdir()
    table = pa.table({"image": [{"bytes": image.read_bytes()} for image in images]})
    pq.write_table(table, tmp_path / "parquet" / "train-0.parquet")
    for row, image in enumerate(images):
        label = few.labels / "train" / f"{image.stem}.png"
        shutil.copy(label, tmp_path / "rows" / f"train-0.parquet#{row}.png")
    rows = replace(
        few,
        data=str(tmp_path / "parquet"),
        labels=tmp_path / "rows",
        output=tmp_path / "of-rows",
    )
    import_parts(rows)
    here, there = (PartStore.open(o.output).labels() for o in (few, rows))
    np.testing.assert_array_equal(here, there)


def test_import_parts__no_readable_image_is_a_mistake(few: ImportPartsOptions) -> None:
    for image in (Path(few.data) / "train").iterdir():
        image.write_bytes(b"no image")
    shutil.rmtree(few.labels)
    few.labels.mkdir()
    with pytest.raises(SettingError, match="not one of the 4 images"):
        import_parts(few)


def test_parts_import__is_a_command(
    few: ImportPartsOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"labels": few.labels, "data": few.data, "output": few.output, "grid": 2}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["semmae", "parts", "import", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert f"wrote the part store {few.output}: 4 images, 0 bad" in capsys.readouterr().out
    assert PartStore.open(few.output).identity.images == 4


def test_import_parts__label_images_of_other_images_are_refused_and_nothing_written(
    few: ImportPartsOptions,
) -> None:
    for place in (few.labels / "train").iterdir():
        Image.new("L", (60, 20)).save(place)
    with pytest.raises(MismatchError, match=r"train/a\.png is 20 x 60 .* expected the same shape"):
        import_parts(few)
    assert not few.output.exists()


def test_import_parts__a_store_among_the_images_is_refused(few: ImportPartsOptions) -> None:
    inside = Path(few.data) / "store"
    with pytest.raises(SettingError, match=r"--output .*store lies in .* among the images"):
        import_parts(replace(few, output=inside, split="all"))
    assert not inside.exists()
