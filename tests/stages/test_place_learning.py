from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from semmae.errors import SettingError
from semmae.models.encoders import FrozenEncoder, Tokens
from semmae.models.places import CELLS
from semmae.models.vision import scaled
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages import place_learning
from semmae.stages.learn_parts import learn_parts
from semmae.stages.networks import open_learner
from semmae.stages.place_learning import Windows, learn_places, sample_windows
from semmae.tests.world import World, learn_options

CPU = torch.device("cpu")


class Colours(nn.Module):
    """An encoder whose tokens are the mean colours of patches of 8."""

    patch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(3), torch.ones(3)

    def features(self, pixels: Tensor) -> Tokens:
        patches = F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)
        return Tokens(patches.mean(dim=1), patches, patches.new_zeros(len(patches), 1, 1))


def encoder() -> FrozenEncoder:
    return cast(FrozenEncoder, Colours())


def source(folder: Path, picture: Any, count: int = 30) -> ImageSource:
    """Images of 64 px, made from the place (y, x) of each pixel, 0 to 1."""
    (folder / "train" / "a").mkdir(parents=True)
    y, x = np.mgrid[:64, :64] / 63
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = (255 * np.stack(picture(y, x, rng), axis=-1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "a" / f"{index:03d}.png")
    return ImageSource(list_images(str(folder), "train"))


def telling(y: Any, x: Any, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """The colour is the place."""
    return x, y, 0.5 * (x + y)


def silent(y: Any, x: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    """Each image is of one colour, which says nothing."""
    return tuple(np.full_like(x, value) for value in rng.random(3))


def windows_and_tokens(images: ImageSource) -> tuple[Windows, Tensor]:
    windows = sample_windows(encoder(), images, (64, 64), 30, 4, seed=0)
    whole = [scaled(torch.from_numpy(images.decoded(i))[None]) for i in range(len(images))]
    return windows, torch.cat([Colours().features(one).patches for one in whole])


def test_sample_windows__cells_are_where_the_content_lay(tmp_path: Path) -> None:
    windows = sample_windows(encoder(), source(tmp_path, telling), (64, 64), 30, 4, seed=0)
    assert windows.tokens.shape == (120, 16, 3)
    assert windows.grid == (4, 4)
    down, across = windows.cells // CELLS, windows.cells % CELLS
    for cell, content in ((across, windows.tokens[..., 0]), (down, windows.tokens[..., 1])):
        assert ((cell + 0.5) / CELLS - content.float()).abs().max() < 0.5 / CELLS + 0.05
    # Windows lie everywhere, and are half as wide as the image, a little more or less.
    assert set(across.flatten().tolist()) == set(range(CELLS))
    width = windows.tokens[:, :4, 0].float().aminmax(dim=1)
    assert 0.25 < (width.max - width.min).mean() < 0.5


def test_sample_windows__are_the_same_again(tmp_path: Path) -> None:
    images = source(tmp_path, telling)
    first, second = (sample_windows(encoder(), images, (64, 64), 9, 2, seed=3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.cells, second.cells)
    assert len(first.tokens) == 18


def test_learn_places__tells_the_place_from_content_that_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, tokens = windows_and_tokens(source(tmp_path, telling))
    # The mean of each place holds all there is, so tokens of other images are moved against it.
    moved = tokens.reshape(-1, 8, 8, 3).roll((2, 3), dims=(1, 2)).flatten(1, 2)
    mixed = torch.cat([tokens[:15], moved[:15]])
    model = learn_places(windows, mixed, (8, 8), 200, 0, CPU)
    assert model is not None
    assert "nats of where they lie" in capsys.readouterr().err
    features = model.features(mixed, (8, 8))
    assert features.shape == (30, 64, CELLS**2 // 2)
    torch.testing.assert_close(features.mean(dim=(0, 1)), torch.zeros(32), rtol=0, atol=1e-4)
    assert float(features.square().mean()) == pytest.approx(1, abs=1e-3)
    again = learn_places(windows, mixed, (8, 8), 200, 0, CPU)
    assert again is not None
    assert torch.equal(again.features(mixed, (8, 8)), features)


def test_learn_places__says_so_where_tokens_tell_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, tokens = windows_and_tokens(source(tmp_path, silent))
    assert learn_places(windows, tokens, (8, 8), 30, 0, CPU) is None
    assert "too little for parts" in capsys.readouterr().err


def test_learn_parts__by_places_resumes_and_opens(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_learning, "LEAST_TOLD", -100.0)
    options = learn_options(world, tmp_path / "run", background="none")
    learn_parts(options)
    trained = open_learner(tmp_path / "run")
    assert trained.learner.architecture.place_cells == CELLS
    assert trained.learner.architecture.feature_width == CELLS**2 // 2
    assert trained.learner.places is not None
    images = torch.randint(0, 256, (3, *trained.image_size, 3), dtype=torch.uint8)
    maps = trained.learner(trained.encoder(images), trained.grid)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(3, *trained.grid))
    again = open_learner(learn_parts(options).parent.parent)
    for name, value in trained.learner.state_dict().items():
        assert torch.equal(value, again.learner.state_dict()[name])


def test_learn_parts__refuses_places_that_tokens_do_not_tell(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_learning, "LEAST_TOLD", 100.0)
    with pytest.raises(SettingError, match="do not tell places"):
        learn_parts(learn_options(world, tmp_path / "refused", told_by="places"))
    learn_parts(learn_options(world, tmp_path / "run", told_by="auto", background="none"))
    assert open_learner(tmp_path / "run").learner.places is None


def test_learn_parts__by_tokens_learns_no_places(world: World, tmp_path: Path) -> None:
    learn_parts(learn_options(world, tmp_path / "run", told_by="tokens", background="none"))
    assert open_learner(tmp_path / "run").learner.places is None
