from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from semmae.errors import MissingError
from semmae.models.encoders import Tokens
from semmae.models.parts import PartLearner, part_labels
from semmae.pipeline.crops import squash
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.evals.part_views import (
    CROP_SCALE,
    Boxes,
    EncodedViews,
    View,
    encoded_views,
    joined,
    parts_in,
    seen_from,
    still_there,
)
from semmae.stages.networks import open_learner
from semmae.tests.world import World

VIEWS: tuple[View, ...] = ("whole", "flip", "shift", "crop")
PATCH, GRID, SIZE = 4, (3, 4), (12, 16)


class MeanColours(nn.Module):
    """An encoder whose patch tokens are the mean colours of the patches."""

    patch_size = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: torch.Tensor) -> Tokens:
        h, w = images.shape[1] // PATCH, images.shape[2] // PATCH
        patches = images.float().reshape(-1, h, PATCH, w, PATCH, 3)
        flat = patches.mean(dim=(2, 4)).flatten(1, 2)
        return Tokens(flat.mean(dim=1), flat, torch.ones(len(flat), 1, flat.shape[1]))


@pytest.fixture
def blocks(tmp_path: Path) -> ImageSource:
    """Images of one random colour a patch, three times as large as the learner sees them."""
    generator = np.random.default_rng(0)
    for number in range(5):
        colours = generator.integers(0, 256, (*GRID, 3), dtype=np.uint8)
        pixels = colours.repeat(3 * PATCH, axis=0).repeat(3 * PATCH, axis=1)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return ImageSource(list_images(tmp_path))


def encoded(images: ImageSource, batch: int = 2, seed: int = 0) -> EncodedViews:
    positions = np.arange(len(images))
    return joined(encoded_views(MeanColours(), images, SIZE, positions, VIEWS, batch, seed))  # type: ignore[arg-type]


def colour_maps(views: EncodedViews, view: View) -> np.ndarray:
    return np.asarray(views.tokens[view].patches.reshape(-1, *GRID, 3))


def test_encoded_views__hold_what_seen_from_expects_of_them(blocks: ImageSource) -> None:
    views = encoded(blocks)
    whole = colour_maps(views, "whole")
    # One number a place: where it comes from in the whole image.
    places = np.broadcast_to(np.arange(12, dtype=np.uint8).reshape(GRID), (5, *GRID))
    for view in ("flip", "shift"):
        origin = seen_from(view, places, views.boxes)
        there = still_there(view, colour_maps(views, view))
        for image in range(5):
            expected = whole[image].reshape(-1, 3)[origin[image].ravel()]
            np.testing.assert_allclose(there[image].reshape(-1, 3), expected, atol=12)


def test_encoded_views__a_shift_goes_on_at_the_border(blocks: ImageSource) -> None:
    views = encoded(blocks)
    moved, whole = colour_maps(views, "shift"), colour_maps(views, "whole")
    np.testing.assert_allclose(moved[:, 0, 1:], whole[:, 0, :-1], atol=40)
    np.testing.assert_allclose(moved[:, 1:, 0], whole[:, :-1, 0], atol=40)


def test_seen_from__a_crop_takes_the_nearest_place() -> None:
    maps = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    boxes = Boxes(np.array([[0, 0, 40, 40], [20, 0, 40, 20]]), np.array([[40, 40]] * 2))
    found = seen_from("crop", maps, boxes)
    assert np.array_equal(found[0], maps[0])
    for row in range(4):
        for column in range(4):
            y, x = 20 + (row + 0.5) * 5, (column + 0.5) * 5
            assert found[1, row, column] == maps[1, int(y // 10), int(x // 10)]


def test_seen_from__by_hand() -> None:
    maps = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    nowhere = Boxes(np.zeros((0, 4), int), np.zeros((0, 2), int))
    assert seen_from("flip", maps, nowhere).tolist() == [[[3, 2, 1], [6, 5, 4]]]
    assert seen_from("shift", maps, nowhere).tolist() == [[[1, 2]]]
    assert still_there("shift", maps).tolist() == [[[5, 6]]]
    assert still_there("flip", maps).tolist() == maps.tolist()


def test_encoded_views__crops_are_boxes_of_the_images_and_follow_the_seed(
    blocks: ImageSource,
) -> None:
    views = encoded(blocks)
    top, left, bottom, right = views.boxes.edges.T
    share = (bottom - top) * (right - left) / views.boxes.sizes.prod(axis=1)
    assert ((share > CROP_SCALE[0] - 0.05) & (share <= 1)).all()
    assert views.boxes.sizes.tolist() == [[36, 48]] * 5
    assert not np.array_equal(encoded(blocks, seed=1).boxes.edges, views.boxes.edges)


def test_encoded_views__do_not_hang_on_the_batch(blocks: ImageSource) -> None:
    first, second = encoded(blocks, 1), encoded(blocks, 5)
    assert np.array_equal(first.boxes.edges, second.boxes.edges)
    for view in VIEWS:
        assert torch.equal(first.tokens[view].patches, second.tokens[view].patches)
        assert torch.equal(first.colours[view], second.colours[view])


def test_encoded_views__leave_bad_images_out(blocks: ImageSource) -> None:
    good = encoded(blocks)
    for number in (0, 3):
        Path(blocks.plan.root, f"{number}.png").write_bytes(b"none")
    left = encoded(ImageSource(list_images(blocks.plan.root)), batch=1)
    assert left.positions.tolist() == [1, 2, 4]
    for view in VIEWS:
        expected = good.tokens[view].patches[[1, 2, 4]]
        assert torch.equal(left.tokens[view].patches, expected)


def test_joined__nothing_is_a_mistake() -> None:
    with pytest.raises(MissingError, match="not one of the images"):
        joined([])


def test_parts_in__are_those_of_the_learner(world: World) -> None:
    trained = open_learner(world.learner)
    images = ImageSource(list_images(world.data, "val"))
    chosen = np.arange(7)
    views = joined(
        encoded_views(trained.encoder, images, trained.image_size, chosen, ("whole",), 4)
    )
    labels, margins = parts_in(trained.learner, views, "whole", trained.grid, 3)
    pixels = np.stack([squash(images.decoded(i), trained.image_size) for i in range(7)])
    given = torch.from_numpy(pixels)
    maps = trained.learner(trained.encoder(given), trained.grid, given)
    expected, margin = part_labels(maps)
    assert isinstance(trained.learner, PartLearner)
    assert (labels == expected.numpy()).mean() > 0.99
    np.testing.assert_allclose(margins, margin.numpy(), atol=1e-4)
