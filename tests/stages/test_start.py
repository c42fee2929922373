"""`stage2 pretrain --start`: what a run begins from, and what resuming makes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semmae.errors import DamageError, MismatchError, MissingError, SettingError, UserError
from semmae.models.autoencoder import Architecture, MaskedAutoencoder
from semmae.models.vision import sincos_positions
from semmae.pipeline.training import fit
from semmae.stages import pretrain as stage
from semmae.stages.evals.knn import KnnOptions, knn
from semmae.stages.export import ExportOptions, export
from semmae.stages.networks import open_autoencoder
from semmae.stages.pretrain import Pretraining, PretrainOptions, pretrain
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.tests.released_mae import trained_mae, training_file
from semmae.tests.world import World, pretrain_options

TINY = Architecture(
    image_size=(32, 32),
    patch_size=8,
    width=192,
    depth=12,
    heads=3,
    decoder_width=128,
    decoder_depth=4,
    decoder_heads=4,
)
Begin = Callable[[PretrainOptions], MaskedAutoencoder]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """The network of a run as it is handed to the trainer."""
    models: list[MaskedAutoencoder] = []

    def caught(task: Pretraining, options: PretrainOptions) -> Path:
        models.append(task._model)
        return options.output

    def begin(options: PretrainOptions) -> MaskedAutoencoder:
        monkeypatch.setattr(stage, "fit", caught)
        pretrain(options)
        monkeypatch.setattr(stage, "fit", fit)
        return models[-1]

    return begin


def tiny(world: World, output: Path, start: object, **changes: object) -> PretrainOptions:
    return pretrain_options(world, output, size="tiny", start=str(start), **changes)


def test_start__a_run_goes_on_from_another_runs_weights(
    world: World, tmp_path: Path, begun: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    options = pretrain_options(world, tmp_path, start=str(world.encoder))
    expected = open_autoencoder(world.encoder).state_dict()
    for name, tensor in begun(options).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert capsys.readouterr().err.splitlines() == [
        f"begins from {world.encoder}: encoder and decoder"
    ]


def test_start__a_training_file_of_mae_gives_encoder_and_decoder(
    world: World, tmp_path: Path, begun: Begin
) -> None:
    released = trained_mae(TINY)
    torch.save(training_file(released), tmp_path / "mae.pth")
    model = begun(tiny(world, tmp_path / "run", tmp_path / "mae.pth"))
    given = released.state_dict()
    for name, tensor in model.state_dict().items():
        expected = given[name.removeprefix("encoder.")]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_start__an_encoder_alone_gets_a_fresh_decoder_and_that_is_said(
    world: World,
    tmp_path: Path,
    begun: Begin,
    suffix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = {
        name: tensor.contiguous()
        for name, tensor in trained_mae(TINY).state_dict().items()
        if not name.startswith(("decoder_", "mask_token"))
    }
    path = tmp_path / f"encoder.{suffix}"
    if suffix == "pth":
        torch.save({"model": weights}, path)
    else:
        save_file(weights, str(path))
    model = begun(tiny(world, tmp_path / "run", path))
    told = capsys.readouterr().err.splitlines()[1:]  # the first is of its pixels
    assert told == [f"begins from {path}: encoder; a fresh decoder, since there is none"]
    assert torch.equal(model.encoder.cls_token, weights["cls_token"])
    torch.manual_seed(0)
    without = MaskedAutoencoder(TINY)
    assert torch.equal(model.decoder_pred.weight, without.decoder_pred.weight)


def test_start__an_export_of_a_run_begins_like_the_run(
    world: World, tmp_path: Path, begun: Begin
) -> None:
    expected = open_autoencoder(world.encoder).state_dict()
    export(ExportOptions(checkpoint=str(world.encoder), output=tmp_path / "mae.pth", format="mae"))
    model = begun(pretrain_options(world, tmp_path / "a", start=str(tmp_path / "mae.pth")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    export(ExportOptions(checkpoint=str(world.encoder), output=tmp_path / "timm"))
    named = f"timm:local-dir:{tmp_path / 'timm'}"
    model = begun(pretrain_options(world, tmp_path / "b", start=named))
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, expected[f"encoder.{name}"]), name
    config = tmp_path / "timm" / "config.json"
    config.write_text(config.read_text().replace("0.485", "0.5"))
    with pytest.raises(SettingError, match="takes pixels of mean"):
        begun(pretrain_options(world, tmp_path / "c", start=named))


def test_start__another_grid_and_patch_size_are_said(
    world: World, tmp_path: Path, begun: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    options = pretrain_options(
        world, tmp_path, start=str(world.encoder), image_size="32x48", patch_size=16
    )
    model = begun(options)
    assert model.architecture.grid == (2, 3)
    assert torch.equal(model.encoder.pos_embed, sincos_positions(128, (2, 3)))
    assert capsys.readouterr().err.strip() == (
        f"begins from {world.encoder}: encoder and decoder; "
        "positions made for 2 x 3 patches in place of 4 x 4; "
        "patch embedding resampled from 8 to 16 pixels; "
        "a fresh last layer of the decoder, for the other patch size"
    )


def test_start__the_run_trains_the_weights_it_began_from(world: World, tmp_path: Path) -> None:
    """After an epoch at a rate near nothing they are what they were."""
    options = pretrain_options(
        world, tmp_path, start=str(world.encoder), base_learning_rate=1e-12, seed=5
    )
    trained = load_checkpoint(pretrain(options))["model"]
    for name, tensor in open_autoencoder(world.encoder).state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-8, msg=name)


def test_start__a_run_that_goes_on_does_not_read_it_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, run = tmp_path / "start.pt", tmp_path / "run"
    start.write_bytes(checkpoints(world.encoder)[-1][1].read_bytes())
    options = pretrain_options(world, run, start=str(start), epochs=2, checkpoint_steps=3)
    whole = load_checkpoint(pretrain(options))
    recorded = json.loads((run / "options.json").read_text())["options"]["start"]
    assert recorded.startswith("sha256:")

    def unread(named: str) -> None:
        raise AssertionError("the weights to start from are read again")

    monkeypatch.setattr(stage, "open_start", unread)
    checkpoints(run)[-1][1].unlink()  # as if it had been interrupted
    moved = tmp_path / "moved.pt"
    start.rename(moved)
    again = load_checkpoint(
        pretrain(pretrain_options(world, run, start=str(moved), epochs=2, checkpoint_steps=3))
    )
    for name, tensor in whole["model"].items():
        assert torch.equal(again["model"][name], tensor), name

    moved.unlink()
    gone = pretrain_options(world, run, start=str(moved), epochs=2, checkpoint_steps=3)
    with pytest.raises(MissingError, match=r"goes on without it if --start is what its options"):
        pretrain(gone)
    pretrain(pretrain_options(world, run, start=recorded, epochs=2, checkpoint_steps=3))


def test_start__a_run_begun_otherwise_is_not_gone_on_with(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(pretrain_options(world, run))
    with pytest.raises(MismatchError, match="--start was None, is sha256:"):
        pretrain(pretrain_options(world, run, start=str(world.encoder)))
    assert json.loads((run / "options.json").read_text())["options"]["start"] is None


def text_file(folder: Path, world: World) -> str:
    (folder / "text.pth").write_text("no weights")
    return str(folder / "text.pth")


@pytest.mark.parametrize(
    ("start_of", "kind", "told"),
    [
        (lambda folder, world: str(folder / "nowhere"), MissingError, "no checkpoint at .*nowhere"),
        (lambda folder, world: "sha256:abc", MissingError, "sha256:abc"),
        (lambda folder, world: str(world.learner), SettingError, "is a part learner"),
        (text_file, DamageError, r"text\.pth"),
    ],
    ids=["missing", "hash", "learner", "text"],
)
def test_start__what_cannot_be_begun_from_is_one_sentence_and_leaves_nothing(
    start_of: Callable[[Path, World], str],
    kind: type[UserError],
    told: str,
    world: World,
    tmp_path: Path,
) -> None:
    options = pretrain_options(world, tmp_path / "run", start=start_of(tmp_path, world))
    with pytest.raises(kind, match=told) as caught:
        pretrain(options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_start__an_encoder_of_another_size_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"128 wide and 6 deep .* --size is 192 wide"):
        pretrain(tiny(world, tmp_path / "run", world.encoder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "recorded"),
    [(32, 32), ("32", 32), (" 32x32 ", 32), ("32x48", "32x48"), ("48 x 32", "48x32")],
)
def test_image_size__is_recorded_in_one_way(
    size: int | str, recorded: int | str, world: World, tmp_path: Path
) -> None:
    """A square is a number, as in runs from before rectangles, which so go on."""
    options = pretrain_options(world, tmp_path, image_size=size)
    assert stage._recorded(options).image_size == recorded


def test_image_size__may_be_a_rectangle(world: World, tmp_path: Path) -> None:
    options = pretrain_options(
        world, tmp_path, image_size="32x48", masking="semantic", parts=world.store
    )
    state = load_checkpoint(pretrain(options))
    assert state["options"]["image_size"] == "32x48"
    assert state["architecture"]["image_size"] == [32, 48]
    assert torch.equal(state["model"]["encoder.pos_embed"], sincos_positions(128, (4, 6)))
    found = knn(
        KnnOptions(
            checkpoint=str(tmp_path), data=world.data, output=tmp_path / "r", baselines=False
        )
    )
    other = knn(
        KnnOptions(
            checkpoint=str(tmp_path),
            data=world.data,
            output=tmp_path / "r",
            baselines=False,
            image_size="24x40",
        )
    )
    assert found.keys() == other.keys()
    assert pretrain(options) == checkpoints(tmp_path)[-1][1]  # goes on, with nothing to do


@pytest.mark.parametrize("size", ["0", "big", "32x", "33", "32x33", -32])
def test_image_size__one_that_cannot_be_is_one_sentence(
    size: str | int, world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="--image-size is") as caught:
        pretrain_options(world, tmp_path, image_size=size)
    assert "encoder's own" not in str(caught.value)
    assert "\n" not in str(caught.value)
