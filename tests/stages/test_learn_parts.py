import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from semmae.errors import MemoryFullError, MismatchError, MissingError, SettingError, UserError
from semmae.models import encoders
from semmae.models.encoders import FrozenEncoder, Tokens
from semmae.models.parts import part_labels
from semmae.pipeline.crops import squash
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.sources import list_images
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.learn_parts import learn_parts
from semmae.stages.networks import open_encoder, open_learner, save_encoder
from semmae.stages.part_start import (
    part_order,
    position_share,
    started_learner,
)
from semmae.storage.checkpoints import load_checkpoint
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, learn_options


def last_line(run: Path) -> dict[str, float]:
    """What the log of a run says of its last epoch."""
    line: dict[str, float] = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return line


def test_started_learner__anchors_lie_on_the_clusters_of_the_data(
    world: World, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directions = torch.eye(8)[:3] * 10
    assigned = torch.randint(0, 3, (20, 16))
    patches = directions[assigned] + 0.1 * torch.randn(20, 16, 8)
    tokens = Tokens(torch.randn(20, 8), patches, torch.full((20, 2, 16), 1 / 17))
    learner = started_learner(tokens, (4, 4), learn_options(world, tmp_path, background="none"))
    maps = learner(tokens, (4, 4))
    found = maps.argmax(dim=1).flatten(1)
    pairs = {(int(a), int(b)) for a, b in zip(assigned.ravel(), found.ravel(), strict=True)}
    # Each cluster of the data is one part nearly everywhere: the blur mixes at borders.
    counts = torch.zeros(3, 3)
    for a, b in zip(assigned.ravel(), found.ravel(), strict=True):
        counts[a, b] += 1
    assert pairs
    assert sorted(counts.argmax(dim=1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("variant", ["anchored", "paper"])
def test_learn_parts__both_variants_train_and_open(
    world: World, tmp_path: Path, variant: str
) -> None:
    learn_parts(learn_options(world, tmp_path / "run", variant=variant, pixel_weight=0.5))
    trained = open_learner(tmp_path / "run")
    assert trained.grid == (4, 4)
    assert trained.learner.architecture.variant == variant
    assert (tmp_path / "run" / "pictures" / "parts-epoch-0001.png").is_file()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    maps = trained.learner(trained.encoder(images), trained.grid)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 4, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"consistency_weight": 1.0, "perceptual_weight": 1.0},
        {"consistency_weight": 1.0, "cached_images": 72},
    ],
    ids=["plain", "all losses", "cached views"],
)
def test_learn_parts__goes_on_to_the_same_weights(
    world: World, tmp_path: Path, settings: dict[str, float]
) -> None:
    options = learn_options(world, tmp_path / "whole", epochs=2, **settings)
    whole = load_checkpoint(learn_parts(options))
    options = learn_options(
        world, tmp_path / "cut", epochs=2, checkpoint_steps=1, keep_checkpoints=0, **settings
    )
    learn_parts(options)
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[3:]:
        path.unlink()
    again = load_checkpoint(learn_parts(options))
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name]), name
    first, second = (last_line(tmp_path / name) for name in ("whole", "cut"))
    for name in ("loss", "diversity", "features", "smallest_share", *settings):
        assert first.get(name) == second.get(name), name


def test_learn_parts__other_settings_in_the_same_folder_are_refused(
    world: World, tmp_path: Path
) -> None:
    learn_parts(learn_options(world, tmp_path / "run"))
    with pytest.raises(MismatchError, match="temperature"):
        learn_parts(learn_options(world, tmp_path / "run", temperature=0.2))


def test_learn_parts__a_missing_encoder_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no encoder at nowhere"):
        learn_parts(learn_options(world, tmp_path, encoder="nowhere"))


def test_learn_parts__nothing_to_rebuild_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nothing would be rebuilt"):
        learn_options(world, tmp_path, feature_weight=0.0, pixel_weight=0.0)


def test_save_encoder__opens_to_the_same_features(world: World, tmp_path: Path) -> None:
    encoder = open_encoder(str(world.encoder))
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    again = open_encoder(str(tmp_path / "encoder.safetensors"))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(encoder(images).patches, again(images).patches)
    assert torch.equal(encoder(images).attention, again(images).attention)


def test_learn_parts__a_folder_of_another_run_is_left_alone(world: World) -> None:
    before = sorted(world.encoder.rglob("*"))
    with pytest.raises(MismatchError, match="pretraining"):
        learn_parts(learn_options(world, world.encoder))
    assert sorted(world.encoder.rglob("*")) == before


def test_position_share__is_the_variance_that_place_explains() -> None:
    torch.manual_seed(0)
    content, place = torch.randn(400, 16, 8), torch.randn(16, 8)
    assert position_share(content) < 0.01
    assert position_share(place.expand(5, 16, 8)) == pytest.approx(1)
    mixed = content + 2 * (place - place.mean(0)) / place.std(correction=0)
    assert position_share(mixed) == pytest.approx(0.8, abs=0.05)


def test_started_learner__takes_positions_off_where_they_are_most_of_the_tokens(
    world: World, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    place = 5 * torch.randn(16, 8)
    tokens = Tokens(
        torch.randn(60, 8), torch.randn(60, 16, 8) + place, torch.full((60, 2, 16), 0.1)
    )
    options = learn_options(world, tmp_path, background="none")
    learner = started_learner(tokens, (4, 4), options)
    assert learner.architecture.places == 16
    assert learner.patches(tokens, (4, 4)).features.mean(dim=0).abs().max() < 1e-4
    kept = started_learner(tokens, (4, 4), replace(options, positions="keep"))
    assert kept.architecture.places == 0
    assert kept.patches(tokens, (4, 4)).features.mean(dim=0).abs().max() > 0.5


@pytest.mark.parametrize("variant", ["kmeans", "image-kmeans", "colour", "attention", "grid"])
def test_learn_parts__baselines_need_no_training_and_extract(
    world: World, tmp_path: Path, variant: str
) -> None:
    options = learn_options(world, tmp_path / "run", variant=variant, background="none")
    assert learn_parts(options) == learn_parts(options)
    trained = open_learner(tmp_path / "run")
    assert trained.learner.architecture.variant == variant
    assert not list(trained.learner.parameters())
    record = extract_parts(
        ExtractPartsOptions(data=world.data, learner=tmp_path / "run", output=tmp_path / "store")
    )
    assert record["ok"] == record["images"]
    stored = PartStore.open(tmp_path / "store").labels()
    images = ImageSource(list_images(world.data, "train"))
    pixels = torch.from_numpy(squash(images.decoded(0), trained.image_size))[None]
    maps = trained.learner(trained.encoder(pixels), trained.grid, pixels)
    assert np.array_equal(stored[0], part_labels(maps)[0][0].numpy())


def test_learn_parts__cached_tokens_are_those_of_the_images(world: World, tmp_path: Path) -> None:
    fresh = learn_parts(learn_options(world, tmp_path / "fresh"))
    count = len(list_images(world.data, "train"))
    cached = learn_parts(learn_options(world, tmp_path / "cached", cached_images=count))
    first, second = (load_checkpoint(path)["model"] for path in (fresh, cached))
    for name, weights in first.items():
        # Tokens are kept in float16: eleven bits of each.
        torch.testing.assert_close(second[name], weights, rtol=0.02, atol=0.02)
    again = learn_options(world, tmp_path / "cached", cached_images=count)
    assert learn_parts(again) == cached


@pytest.mark.parametrize("name", ["pixel_weight", "perceptual_weight"])
def test_learn_parts__cached_tokens_cannot_rebuild_pixels(
    world: World, tmp_path: Path, name: str
) -> None:
    with pytest.raises(SettingError, match="--cached-images keeps tokens"):
        learn_options(world, tmp_path, cached_images=4, **{name: 0.5})


@pytest.mark.parametrize("settings", [{}, {"cached_images": 72}], ids=["images", "cached"])
def test_learn_parts__consistency_is_a_loss(
    world: World, tmp_path: Path, settings: dict[str, int]
) -> None:
    learn_parts(learn_options(world, tmp_path / "run", consistency_weight=1.0, **settings))
    line = last_line(tmp_path / "run")
    assert 0 < line["consistency"] < 1
    listed = line["features"] + 0.1 * line["diversity"] + line["consistency"]
    assert line["loss"] == pytest.approx(listed, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["feature_weight", "pixel_weight", "perceptual_weight", "consistency_weight"]
)
def test_learn_parts__baselines_refuse_weights_of_losses(
    world: World, tmp_path: Path, name: str
) -> None:
    with pytest.raises(SettingError, match="--variant kmeans has nothing to train"):
        learn_options(world, tmp_path, variant="kmeans", **{name: 0.5})
    with pytest.raises(SettingError, match=f"--{name.replace('_', '-')} is -1"):
        learn_options(world, tmp_path, **{name: -1.0})


@pytest.mark.parametrize("by", ["area", "direction"])
def test_part_order__does_not_hang_on_the_numbering(by: Literal["area", "direction"]) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 8)).astype(np.float32)
    assigned = rng.choice(5, size=1000, p=[0.1, 0.3, 0.05, 0.35, 0.2])
    wanted = centres[part_order(centres, assigned, by)]
    for _ in range(5):
        renumbered = rng.permutation(5)  # old number of each new one
        found = part_order(centres[renumbered], np.argsort(renumbered)[assigned], by)
        assert np.array_equal(centres[renumbered][found], wanted)
    if by == "area":
        assert part_order(centres, assigned, by).tolist() == [3, 1, 4, 0, 2]


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"image_size": "48"}, MismatchError, "--image-size was 0, is 48"),
        ({"num_parts": 5}, MismatchError, "--num-parts was 3, is 5"),
        ({"resume": "never"}, SettingError, "holds a run already"),
    ],
)
def test_learn_parts__refuses_to_go_on_before_anything_is_read(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    error: type[Exception],
    told: str,
) -> None:
    settings = {"cached_images": 20, "sample_images": 20, "num_parts": 3}
    learn_parts(learn_options(world, tmp_path / "run", **settings))
    assert "reading tokens" in capsys.readouterr().err
    with pytest.raises(error, match=told):
        learn_parts(learn_options(world, tmp_path / "run", **settings | changes))
    assert "reading" not in capsys.readouterr().err


def test_learn_parts__a_batch_may_be_of_all_cached_images(world: World, tmp_path: Path) -> None:
    changes = {"cached_images": 10, "sample_images": 20, "batch_size": 16}
    learn_parts(learn_options(world, tmp_path, **changes, seed=2**32 + 1))
    with pytest.raises(SettingError, match="--batch-size is 32"):
        learn_parts(learn_options(world, tmp_path, **changes | {"batch_size": 32}))


def test_learn_parts__refuses_attention_of_a_class_token_that_is_not_there(
    world: World, tmp_path: Path
) -> None:
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    save_encoder(FrozenEncoder(model), tmp_path / "pooled.safetensors")
    options = learn_options(
        world, tmp_path / "run", variant="attention", encoder=str(tmp_path / "pooled.safetensors")
    )
    with pytest.raises(SettingError, match="--variant attention is of the class token"):
        learn_parts(options)


def test_learn_parts__refuses_an_average_that_nothing_reads(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--ema is 0\.9"):
        learn_options(world, tmp_path, ema=0.9)


@pytest.mark.parametrize("variant", ["colour", "attention", "grid"])
def test_learn_parts__refuses_places_where_they_tell_nothing(
    world: World, tmp_path: Path, variant: str
) -> None:
    with pytest.raises(SettingError, match="told neither by places nor by tokens"):
        learn_options(world, tmp_path, variant=variant, told_by="places")


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    return open_learner(run).learner.state_dict()


def test_learn_parts__starts_alike_by_few_images_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn_parts(learn_options(world, tmp_path / "many"))
    monkeypatch.setattr(encoders, "PAIRS_AT_ONCE", 5 * 16**2)
    learn_parts(learn_options(world, tmp_path / "few"))
    many, few = trained_weights(tmp_path / "many"), trained_weights(tmp_path / "few")
    for name, weight in many.items():
        torch.testing.assert_close(few[name], weight, msg=name)


def test_learn_parts__the_start_is_that_of_full_precision(world: World, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        changes = {"variant": "kmeans", "precision": precision}
        learn_parts(learn_options(world, tmp_path / precision, **changes))
    full, half = trained_weights(tmp_path / "fp32"), trained_weights(tmp_path / "bf16")
    assert "scores.centres" in full
    for name, weight in full.items():
        assert torch.equal(half[name], weight), name


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
OF_IMAGES = "try a smaller --image-size or --encoder, or --device cpu$"
OF_STEP = "--micro-batch is 0, so 16 images are computed at once; try --micro-batch 8; the same"


@pytest.mark.parametrize(
    ("place", "changes", "error", "way_out"),
    [
        ("part_start.batches_in_order", {}, FULL, OF_IMAGES),
        ("place_learning.look_again", {}, FULL, OF_IMAGES),
        (
            "second_views.look_again",
            {"cached_images": 72, "consistency_weight": 1.0},
            FULL,
            OF_IMAGES,
        ),
        (
            "place_learning.object_cells",
            {},
            MemoryError(),
            "tokens of --sample-images 2000 and --place",
        ),
        (
            "part_start._cluster",
            {"variant": "kmeans", "background": "none"},
            MemoryError(),
            "2000 are",
        ),
        ("part_training.PartLearning.loss", {}, FULL, OF_STEP),
    ],
)
def test_learn_parts__memory_that_ran_out_names_what_took_it(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    changes: dict[str, Any],
    error: Exception,
    way_out: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"semmae.stages.{place}", full)
    with pytest.raises(MemoryFullError, match=way_out):
        learn_parts(learn_options(world, tmp_path, **changes))


@pytest.mark.parametrize("variant", ["paper", "image-kmeans", "colour", "attention", "grid"])
def test_learn_parts__refuses_an_order_of_what_is_not_ordered(
    world: World, tmp_path: Path, variant: str
) -> None:
    with pytest.raises(SettingError, match=f"--part-order is direction, and --variant {variant}"):
        learn_options(world, tmp_path, variant=variant, part_order="direction")


def test_learn_parts__refuses_to_rebuild_pixels_of_one_patch(world: World, tmp_path: Path) -> None:
    options = learn_options(world, tmp_path / "run", variant="paper", image_size="8")
    with pytest.raises(SettingError, match="an image is one patch, and pixels are rebuilt from"):
        learn_parts(options)


@pytest.mark.parametrize("variant", ["paper", "anchored"])
def test_learn_parts__learns_of_images_of_one_row(
    world: World, tmp_path: Path, variant: str
) -> None:
    changes = {"variant": variant, "image_size": "8x32", "consistency_weight": 0.1}
    learn_parts(learn_options(world, tmp_path, **changes))
    assert open_learner(tmp_path).grid == (1, 4)


def test_learn_parts__refuses_a_background_that_the_variant_lacks(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="has none"):
        learn_options(world, tmp_path, variant="kmeans", background="token")


@pytest.mark.parametrize("variant", ["anchored", "grid"])
def test_learn_parts_options__noise_needs_a_decoder(
    world: World, tmp_path: Path, variant: str
) -> None:
    with pytest.raises(SettingError, match=f"--decoder-noise .* --variant {variant} has none"):
        learn_options(world, tmp_path / "run", variant=variant, decoder_noise=True)
    assert learn_options(world, tmp_path / "run", pixel_weight=1.0, decoder_noise=True)


def test_learn_parts__what_cannot_be_is_refused_before_tokens_are_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: object) -> None:
        raise AssertionError("tokens come last")

    monkeypatch.setattr("semmae.stages.learn_parts.sample_tokens", sample)
    run = tmp_path / "run"
    with pytest.raises(SettingError, match="--variant grid, --num-parts 40: a grid of 4 x 4"):
        learn_parts(learn_options(world, run, variant="grid", num_parts=40))
    inside = Path(world.data) / "train" / "run"
    with pytest.raises(SettingError, match=r"--output .*run lies in .*, among the images"):
        learn_parts(learn_options(world, inside))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        learn_parts(learn_options(world, tmp_path / "file" / "run"))
    assert not run.exists()
    assert not inside.exists()
