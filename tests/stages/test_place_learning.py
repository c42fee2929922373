from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from semmae.errors import SettingError
from semmae.models.encoders import FrozenEncoder, Tokens
from semmae.models.parts import PartLearner
from semmae.models.places import CELLS, SPAN, PlacePredictor
from semmae.models.vision import scaled
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages import learn_parts as learning
from semmae.stages import part_start
from semmae.stages.learn_parts import LearnPartsOptions, learn_parts
from semmae.stages.networks import open_learner
from semmae.stages.place_learning import learn_places, sample_place_views
from semmae.stages.predictor_learning import Lesson
from semmae.tests.stages.colours import Colours
from semmae.tests.world import World, learn_options


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


class Voter:
    """Calls the left half of each image object, or all of it."""

    def __init__(self, everything: bool) -> None:
        self._left = 8 if everything else 4

    def to(self, device: torch.device) -> "Voter":
        return self

    def patches(self, tokens: Tokens, grid: tuple[int, int]) -> Any:
        mask = torch.zeros(len(tokens.patches), *grid)
        mask[:, :, : self._left] = 1
        return SimpleNamespace(objects=mask.flatten(1))


def voter(everything: bool = True) -> PartLearner:
    return cast(PartLearner, Voter(everything))


def views_and_tokens(images: ImageSource) -> tuple[tuple[Lesson, Lesson], Tensor]:
    views = sample_place_views(encoder(), voter(), images, (64, 64), 90, seed=0)
    whole = [scaled(torch.from_numpy(images.decoded(i))[None]) for i in range(len(images))]
    return views, torch.cat([Colours().features(one).patches for one in whole])


def learned_places(
    run: Path, views: Sequence[Lesson], tokens: Tensor, steps: int
) -> tuple[PlacePredictor, float]:
    options = LearnPartsOptions(data="", encoder="", output=run, place_steps=steps, device="cpu")
    return learn_places(lambda: views, "", tokens, (8, 8), options)


def test_sample_place_views__cells_are_where_the_content_lay(tmp_path: Path) -> None:
    images = source(tmp_path, telling, 90)
    windows, crops = sample_place_views(encoder(), voter(), images, (64, 64), 90, seed=0)
    assert windows.tokens.shape == (90, 16, 3)
    assert windows.grid == (4, 4)
    assert crops.tokens.shape == (90, 64, 3)
    # A disc of the image's area has 4.51 patches of radius.
    reach = SPAN * 4.51 / 4
    for views in (windows, crops):
        down, across = views.targets // CELLS, views.targets % CELLS
        for cell, content in ((across, views.tokens[..., 0]), (down, views.tokens[..., 1])):
            told = ((cell + 0.5) / CELLS * 2 - 1) * reach / 2 + 0.5
            assert (told - content.float()).abs().max() < reach / 2 / CELLS + 0.05
        assert len(set(across.flatten().tolist())) == CELLS // 2
    # Windows are half as wide as the image, a little more or less.
    width = windows.tokens[:, :4, 0].float().aminmax(dim=1)
    assert 0.25 < (width.max - width.min).mean() < 0.5


def test_sample_place_views__what_the_voter_calls_background_is_background(tmp_path: Path) -> None:
    images = source(tmp_path, telling, 40)
    for views in sample_place_views(encoder(), voter(False), images, (64, 64), 40, seed=0):
        at = views.tokens[..., 0].float()
        sure = (at - 0.5).abs() > 0.1
        assert torch.equal((views.targets == CELLS**2)[sure], (at > 0.5)[sure])


def test_sample_place_views__are_the_same_again(tmp_path: Path) -> None:
    images = source(tmp_path, telling)
    first, second = (
        sample_place_views(encoder(), voter(), images, (64, 64), 9, seed=3) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)
        assert len(one.tokens) == 9


def test_learn_places__tells_the_place_from_content_that_tells_it(tmp_path: Path) -> None:
    views, tokens = views_and_tokens(source(tmp_path, telling, 90))
    # The mean of each place holds all there is, so tokens of other images are moved against it.
    moved = tokens.reshape(-1, 8, 8, 3).roll((2, 3), dims=(1, 2)).flatten(1, 2)
    mixed = torch.cat([tokens[:15], moved[:15]])
    model, told = learned_places(tmp_path / "run", views, mixed, 200)
    assert told > 0.9
    seen = model.told(mixed, (8, 8))
    features = model.features(seen.shares)
    assert features.shape == (30, 64, CELLS**2 // 2)
    torch.testing.assert_close(features.mean(dim=(0, 1)), torch.zeros(32), rtol=0, atol=1e-2)
    assert float(features.square().mean()) == pytest.approx(1, abs=1e-2)
    assert float(seen.background.max()) < 0.1
    again, _ = learned_places(tmp_path / "again", views, mixed, 200)
    assert torch.equal(again.told(mixed, (8, 8)).shares, seen.shares)


def test_learn_places__tokens_that_say_nothing_tell_nothing(tmp_path: Path) -> None:
    views, tokens = views_and_tokens(source(tmp_path, silent))
    assert learned_places(tmp_path / "run", views, tokens, 30)[1] < 0.05


def test_learn_places__predicts_the_background(tmp_path: Path) -> None:
    images = source(tmp_path, telling, 60)
    views = sample_place_views(encoder(), voter(False), images, (64, 64), 60, seed=0)
    _, tokens = views_and_tokens(images)
    model, _ = learned_places(tmp_path / "run", views, tokens.roll(8 * 4, dims=1), 300)
    crops = views[1]
    standard = (
        crops.tokens[:6].float() - crops.tokens.float().mean(0)
    ) / crops.tokens.float().std()
    found = model(standard, (8, 8)).softmax(dim=2)[..., -1] > 0.5
    assert (found == (crops.targets[:6] == CELLS**2)).float().mean() > 0.8


@pytest.mark.parametrize("rounds", [1, 3])
def test_learn_parts__by_places_resumes_and_opens(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(learning, "LEAST_TOLD", -100.0)
    options = learn_options(world, tmp_path / "run", rounds=rounds)
    learn_parts(options)
    trained = open_learner(tmp_path / "run")
    shape = trained.learner.architecture
    assert shape.predictor == ("places" if rounds == 1 else "parts")
    assert shape.told_by == "predictor"
    assert shape.feature_width == (CELLS**2 // 2 if rounds == 1 else shape.parts)
    assert trained.learner.predictor is not None
    images = torch.randint(0, 256, (3, *trained.image_size, 3), dtype=torch.uint8)
    maps = trained.learner(trained.encoder(images), trained.grid)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(3, *trained.grid))
    again = open_learner(learn_parts(options).parent.parent)
    for name, value in trained.learner.state_dict().items():
        assert torch.equal(value, again.learner.state_dict()[name])


@pytest.mark.parametrize("background", ["token", "none", "voted"])
def test_learn_parts__later_rounds_keep_the_background(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    monkeypatch.setattr(learning, "LEAST_TOLD", -100.0)
    found = []
    for rounds in (1, 2):
        run = tmp_path / f"{rounds}"
        learn_parts(learn_options(world, run, rounds=rounds, background=background))
        found.append(open_learner(run).learner.architecture.background)
    assert found[0] == found[1]
    assert background in (found[0], "voted")  # a vote may find nothing


def test_learn_parts__has_one_round_where_parts_are_of_each_image(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LEAST_TOLD", -100.0)
    learn_parts(learn_options(world, tmp_path, variant="image-kmeans", told_by="places"))
    assert open_learner(tmp_path).learner.architecture.predictor == "places"


def test_learn_parts__refuses_places_that_tokens_do_not_tell(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "LEAST_TOLD", 100.0)
    with pytest.raises(SettingError, match="do not tell places"):
        learn_parts(learn_options(world, tmp_path / "refused", told_by="places"))
    learn_parts(learn_options(world, tmp_path / "run", background="none"))
    run = open_learner(tmp_path / "run").learner
    assert run.predictor is None
    assert run.architecture.told_by == "tokens"


def test_learn_parts__where_the_vote_finds_no_object_there_is_no_background(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(part_start, "OBJECT_SHARE", (2.0, 3.0))
    monkeypatch.setattr(learning, "LEAST_TOLD", -100.0)
    learn_parts(learn_options(world, tmp_path / "run"))
    assert capsys.readouterr().err.count("learning without a background") == 1
    shape = open_learner(tmp_path / "run").learner.architecture
    assert (shape.background, shape.told_by, shape.channels) == ("none", "predictor", 3)
    learn_parts(learn_options(world, tmp_path / "tokens", told_by="tokens"))
    trained = open_learner(tmp_path / "tokens").learner
    assert trained.architecture.background == "none"
    assert trained.predictor is None


@pytest.mark.parametrize("rounds", [1, 2])
def test_learn_parts__where_the_prediction_finds_no_object_the_vote_is_taken(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rounds: int,
) -> None:
    def blind(*given: Any) -> tuple[PlacePredictor, float]:
        places, told = learn_places(*given)
        assert places.last.bias is not None
        places.last.bias.data[-1] += 1e4
        return places, told

    monkeypatch.setattr(learning, "learn_places", blind)
    monkeypatch.setattr(part_start, "OBJECT_SHARE", (1e-6, 1.0))
    monkeypatch.setattr(learning, "LEAST_TOLD", -100.0)
    learn_parts(learn_options(world, tmp_path, rounds=rounds))
    told = capsys.readouterr().err
    assert told.count("0% of the patches would be object") == 1
    assert "taking the vote" in told
    shape = open_learner(tmp_path).learner.architecture
    assert (shape.background, shape.told_by) == ("voted", "predictor")


def test_learn_parts__by_tokens_without_their_background_learns_no_places(
    world: World, tmp_path: Path
) -> None:
    for background in ("none", "voted"):
        run = tmp_path / background
        learn_parts(learn_options(world, run, told_by="tokens", background=background))
        assert open_learner(run).learner.predictor is None


def test_sample_place_views__without_a_readable_image_are_refused(tmp_path: Path) -> None:
    images = source(tmp_path, telling, 3)
    for path in (tmp_path / "train" / "a").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(SettingError, match="--place-images"):
        sample_place_views(encoder(), voter(), images, (64, 64), 3, seed=0)
