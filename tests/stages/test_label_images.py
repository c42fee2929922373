from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semmae.errors import DamageError, MismatchError, MissingError
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.label_images import (
    label_path,
    label_share,
    labels_of,
    patch_labels,
    read_label_map,
    refuse_other_shapes,
    true_labels,
)


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each pixel of the result takes the one that its centre falls on."""
    (h, w), (height, width) = size, values.shape
    rows = [int((i + Fraction(1, 2)) * height / h) for i in range(h)]
    columns = [int((j + Fraction(1, 2)) * width / w) for j in range(w)]
    return np.array([[values[i, j] for j in columns] for i in rows])


@pytest.mark.parametrize("shape", [(32, 32), (37, 50), (9, 13), (64, 33)])
def test_read_label_map__is_squashed_by_nearest_pixel(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = read_label_map(tmp_path / "x.png", (32, 24))
    np.testing.assert_array_equal(found, nearest(values, (32, 24)))


def test_read_label_map__takes_the_indices_of_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 3], [5, 1]], dtype=np.uint8))
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert written.mode == "P"
    assert read_label_map(tmp_path / "x.png", (2, 2)).tolist() == [[0, 3], [5, 1]]


def test_read_label_map__what_is_no_label_image_is_named(tmp_path: Path) -> None:
    place = tmp_path / "x.png"
    for spoil in (b"", b"no image", None):
        if spoil is None:
            Image.effect_noise((64, 64), 50).save(place)
            spoil = place.read_bytes()[:1000]
        place.write_bytes(spoil)
        with pytest.raises(DamageError, match=r"x\.png is damaged, or no image"):
            read_label_map(place, (8, 8))
    Image.new("RGB", (8, 8)).save(place)
    with pytest.raises(DamageError, match=r"x\.png has mode RGB .* one channel"):
        read_label_map(place, (8, 8))
    Image.fromarray(np.full((8, 8), 256, dtype=np.uint16)).save(place)
    with pytest.raises(DamageError, match="up to 256"):
        read_label_map(place, (8, 8))


def test_true_labels__of_photographs_that_are_no_multiples(tmp_path: Path) -> None:
    values = np.zeros((50, 75), dtype=np.uint8)
    values[:25, 40:] = 7
    Image.fromarray(values).save(tmp_path / "x.png")
    found = true_labels(tmp_path, ["x.jpg"], (2, 2), (32, 32))
    assert found.tolist() == [[[0, 7], [0, 0]]]
    with pytest.raises(MismatchError, match="equal patches"):
        true_labels(tmp_path, ["x.jpg"], (2, 2))


def test_label_path__of_files_and_of_parquet_rows() -> None:
    folder = Path("labels")
    assert label_path(folder, "train/cat/x.y.jpg") == Path("labels/train/cat/x.y.png")
    assert label_path(folder, "a#5.jpg") == Path("labels/a#5.png")
    assert label_path(folder, "data/x.parquet#5") == Path("labels/data/x.parquet#5.png")


def test_label_share__equals_the_slow_loop() -> None:
    drawn = np.random.default_rng(1).choice(4, (12, 15), p=[0.6, 0.2, 0.1, 0.1])
    label_map = np.asarray(drawn, dtype=np.uint8)
    patches = patch_labels(label_map, (4, 3))
    shares = []
    for i in range(4):
        for j in range(3):
            pixels = label_map[3 * i : 3 * i + 3, 5 * j : 5 * j + 5].ravel().tolist()
            counts = [pixels.count(label) for label in range(4)]
            assert patches[i, j] == counts.index(max(counts))
            shares.append(max(counts) / len(pixels))
    assert label_share(label_map, patches) == pytest.approx(np.mean(shares))


def test_label_share__is_one_where_no_patch_is_mixed() -> None:
    patches = np.array([[0, 7], [254, 7]], dtype=np.uint8)
    assert label_share(np.kron(patches, np.ones((4, 3), dtype=np.uint8)), patches) == 1.0


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, ImageSource]:
    """Three photographs of 60 x 40 with label images, and one that is none, without."""
    data, labels = tmp_path / "data", tmp_path / "labels"
    data.mkdir()
    labels.mkdir()
    for name in "abc":
        Image.effect_noise((40, 60), 50).save(data / f"{name}.jpg")
        Image.fromarray(np.full((30, 20), ord(name) - 96, dtype=np.uint8)).save(
            labels / f"{name}.png"
        )
    (data / "d.jpg").write_bytes(b"no image")
    return labels, ImageSource(list_images(data, "all"))


def test_labels_of__an_image_that_cannot_be_read_needs_none(
    labelled: tuple[Path, ImageSource],
) -> None:
    folder, images = labelled
    found = labels_of(folder, images, np.array([1, 2, 3]), (2, 3), (32, 48))
    assert found.tolist() == [[[label] * 3] * 2 for label in (2, 3, 0)]
    (folder / "b.png").unlink()
    with pytest.raises(MissingError, match=r"no label image at .*b\.png"):
        labels_of(folder, images, np.arange(4), (2, 3), (32, 48))
    with pytest.raises(MissingError, match=r"--labels is .*nowhere, where there is no folder"):
        labels_of(folder / "nowhere", images, np.arange(4), (2, 3), (32, 48))


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [
        *((60, 40, True), (600, 400, True), (3, 2, True), (56, 40, True), (32, 48, True)),
        *((40, 60, False), (60, 60, False), (30, 40, False), (60, 30, False)),
    ],
)
def test_refuse_other_shapes__looks_at_images_and_grid(
    labelled: tuple[Path, ImageSource], height: int, width: int, fits: bool
) -> None:
    folder, images = labelled
    Image.new("L", (width, height)).save(folder / "c.png")
    grid = (2, 3) if (height, width) == (32, 48) else (4, 4) if fits else (1, 5)
    if fits:
        refuse_other_shapes(folder, images, np.arange(3), grid)
        return
    told = rf"c\.png is {height} x {width} \(height x width\), and its image 60 x 40"
    with pytest.raises(MismatchError, match=told):
        refuse_other_shapes(folder, images, np.arange(3), grid)
