import dataclasses
import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.models.autoencoder import MaskedAutoencoder
from semmae.pipeline.crops import flips
from semmae.pipeline.feeding import Batch
from semmae.pipeline.flops import FlopCount
from semmae.pipeline.loss_bins import part_shares
from semmae.pipeline.mask_policies import POLICIES
from semmae.pipeline.randomness import Purpose, streams
from semmae.pipeline.schedule import BatchSampler, Draw
from semmae.pipeline.sources import list_images
from semmae.stages.extract_parts import ExtractPartsOptions, extract_parts
from semmae.stages.learn_parts import learn_parts
from semmae.stages.pretrain import (
    ALPHA_EDGES,
    PART_SIZE_EDGES,
    Pretraining,
    PretrainOptions,
    pretrain,
    pretraining_data,
)
from semmae.storage.checkpoints import checkpoints, load_checkpoint
from semmae.storage.part_store import PartStore
from semmae.tests.pipeline.reads import ScalarReads
from semmae.tests.pipeline.tiny import lines_of, log_of, same
from semmae.tests.world import World, learn_options, pretrain_options


@pytest.mark.parametrize("masking", POLICIES)
def test_pretrain__masks_leave_the_exact_count(
    masking: str, world: World, attentive_store: Path, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, masking=masking, parts=attentive_store)
    batch = pretraining_data(options).__getitems__([Draw(i, 0, i / 72) for i in range(72)])
    assert (~batch["mask"]).sum(dim=1).tolist() == [4] * 72


def test_pretrain__writes_checkpoint_log_and_pictures(world: World, tmp_path: Path) -> None:
    path = pretrain(
        pretrain_options(world, tmp_path, masking="semantic", parts=world.store, epochs=2)
    )
    state = load_checkpoint(path)
    assert state["kind"] == "pretraining"
    assert state["samples_seen"] == 2 * 64
    lines = lines_of(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_pretraining_data__tells_which_images_are_left_out(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, store = tmp_path / "images", tmp_path / "store"
    data.mkdir()
    for number, image in enumerate(sorted(Path(world.data).rglob("*.png"))[:4]):
        (data / f"{number}.png").write_bytes(image.read_bytes()[: 50 if number == 2 else None])
    extract_parts(ExtractPartsOptions(data=str(data), learner=world.learner, output=store))
    capsys.readouterr()
    options = pretrain_options(world, tmp_path, data=str(data), masking="semantic", parts=store)
    assert len(pretraining_data(options)) == 3
    assert f"1 of 4 images are left out: they were bad when {store}" in capsys.readouterr().err
    options = pretrain_options(world, tmp_path, masking="semantic", parts=world.store)
    assert len(pretraining_data(options)) == 72
    assert capsys.readouterr().err == ""


PART_SIZE = "loss_by_part_size"


def losses_told(run: Path, name: str) -> list[dict[str, float]]:
    """Losses by a share at each point of the logs, by the range of the share."""
    points = lines_of(run, "steps.jsonl")
    return [
        {key.partition("/")[2]: value for key, value in point.items() if key.startswith(f"{name}/")}
        for point in points
    ]


@pytest.mark.parametrize("changes", [{}, {"predicted_share": 0.4}, {"masking": "random"}])
def test_pretrain__tells_losses_by_alpha_and_by_part_size(
    changes: dict[str, Any], world: World, tmp_path: Path
) -> None:
    settings = {"masking": "semantic", "parts": world.store, "log_steps": 1, **changes}
    options = pretrain_options(world, tmp_path / "run", micro_batch=8, **settings)
    pretrain(options)
    by_alpha, by_size = (losses_told(options.output, n) for n in ("loss_by_alpha", PART_SIZE))
    data, schedule = pretraining_data(options), options.schedule(72)
    order = schedule.permutation(options.seed, 0)
    for step in range(4):
        batch = data.__getitems__(schedule.draws(step, order))
        scheduled = options.masking == "semantic"
        assert by_alpha[step].keys() == (
            ranges_of(batch["alpha"], ALPHA_EDGES) if scheduled else set()
        )
        sizes = ranges_of(part_shares(batch["parts"])[batch["mask"]], PART_SIZE_EDGES)
        # Patches that are not predicted have no loss.
        partly = options.predicted_share < 1
        assert by_size[step].keys() <= sizes if partly else by_size[step].keys() == sizes


def ranges_of(shares: torch.Tensor, edges: tuple[float, ...]) -> set[str]:
    """Names of the ranges that shares lie in."""
    ends = [0.0, *edges, 1.0]
    found = np.searchsorted(np.array(edges, np.float32), shares.flatten().numpy(), side="right")
    return {f"{ends[place]:g}-{ends[place + 1]:g}" for place in found.tolist()}


def test_pretraining__losses_told_are_means_of_the_losses_of_patches(
    world: World, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, masking="semantic", parts=world.store)
    data = pretraining_data(options)
    model = MaskedAutoencoder(options.architecture())
    task = Pretraining(model, data, options)
    draws = [Draw(index, 0, index / 72) for index in range(72)]
    batches = [data.__getitems__(draws[:40]), data.__getitems__(draws[40:])]
    losses, shares, alphas = [], [], []
    with torch.no_grad():
        for batch in batches:
            task.loss(batch)
            found, patches = model.patch_losses(batch["images"], batch["mask"], 4)
            losses.append(found)
            shares.append(part_shares(batch["parts"]).gather(1, patches))
            alphas.append(batch["alpha"])
    loss, share, alpha = (torch.cat(values).numpy() for values in (losses, shares, alphas))
    task.after_step(1.0, torch.ones(()))
    told = task.figures()
    assert task.figures() == {}
    expected = {}
    for name, values, by, edges in (
        ("loss_by_alpha", loss.mean(axis=1), alpha, ALPHA_EDGES),
        (PART_SIZE, loss, share, PART_SIZE_EDGES),
    ):
        ends = [0.0, *edges, 1.1]
        for low, high in itertools.pairwise(ends):
            chosen = values[(by >= np.float32(low)) & (by < np.float32(high))]
            if chosen.size:
                expected[f"{name}/{low:g}-{min(high, 1):g}"] = chosen.mean()
    assert told == pytest.approx(expected, rel=1e-5)
    assert sum(name.startswith("loss_by_alpha") for name in told) == 5


@pytest.mark.parametrize("changes", [{}, {"predicted_share": 0.4, "recompute": True}])
def test_pretraining__knows_the_flops_of_its_step(
    changes: dict[str, Any], world: World, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, **changes)
    data = pretraining_data(options)
    model = MaskedAutoencoder(options.architecture())
    task = Pretraining(model, data, options)
    model.recomputes = False
    batch = data.__getitems__([Draw(index, 0, 0.0) for index in range(6)])
    with FlopCount() as count:
        task.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    assert task.flops(6) == count.flops > 0


def test_pretrain__predicts_the_same_patches_in_parts_of_any_size(
    world: World, tmp_path: Path
) -> None:
    found = []
    for size in (0, 4):
        settings = {"micro_batch": size, "predicted_share": 0.4, "precision": "fp32"}
        run = tmp_path / str(size)
        pretrain(pretrain_options(world, run, log_steps=1, **settings))
        found.append([point["loss"] for point in lines_of(run, "steps.jsonl")])
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_pretrain__without_parts_tells_losses_by_nothing(world: World, tmp_path: Path) -> None:
    pretrain(pretrain_options(world, tmp_path, log_steps=1))
    assert losses_told(tmp_path, "loss_by_alpha") == losses_told(tmp_path, PART_SIZE) == [{}] * 4


def test_pretrain__draws_masks_over_the_parts_that_are_known(world: World, tmp_path: Path) -> None:
    heights: list[int] = []
    for masking, parts in (("random", None), ("random", world.store), ("semantic", world.store)):
        run = tmp_path / str(len(heights))
        pretrain(pretrain_options(world, run, masking=masking, parts=parts))
        with Image.open(run / "pictures" / "reconstructions-epoch-0001.png") as picture:
            heights.append(picture.height)
    assert heights == [3 + 3 * 131, 3 + 4 * 131, 3 + 4 * 131]


def test_pretrain__masking_changes_only_the_masks(
    world: World, attentive_store: Path, tmp_path: Path
) -> None:
    draws = [Draw(i, 1, 0.5) for i in range(8)]
    batches = []
    for masking in POLICIES:
        options = pretrain_options(world, tmp_path, parts=attentive_store, masking=masking)
        batches.append(pretraining_data(options).__getitems__(draws))
    for one, other in itertools.combinations(batches, 2):
        assert torch.equal(one["images"], other["images"])
        assert not torch.equal(one["mask"], other["mask"])


@pytest.mark.parametrize("masking", ["semantic", "attention", "shuffled"])
def test_pretrain__masks_of_a_store_without_one_are_refused(
    masking: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=f"--masking {masking} needs --parts"):
        pretrain(pretrain_options(world, tmp_path, masking=masking))
    assert not list(tmp_path.iterdir())


def test_pretrain__attention_that_the_store_does_not_keep_is_refused(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match="extract the parts anew with --class-attention"):
        pretrain(pretrain_options(world, tmp_path, masking="attention", parts=world.store))
    assert not list(tmp_path.iterdir())


def test_pretrain__attention_masks_what_the_store_says_is_attended(
    world: World, attentive_store: Path, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path, masking="attention", parts=attentive_store)
    # Crops of the whole, square images; only the flip is left.
    data = pretraining_data(dataclasses.replace(options, crop_scale=1.0))
    store = PartStore.open(attentive_store)
    plan = list_images(world.data, "train")
    mask = data.__getitems__([Draw(i, 0, 0.0) for i in range(72)])["mask"].numpy()
    assert plan.fingerprint == store.identity.plan_fingerprint
    attention = np.asarray(store.class_attention()[:]).astype(float).mean(axis=1)
    flipped = flips(streams(options.seed, Purpose.FLIP, 0, np.arange(72)))
    for row, seen, flip in zip(mask.reshape(72, 4, 4), attention, flipped, strict=True):
        upright = row[:, ::-1] if flip else row
        assert seen[upright].min() >= seen[~upright].max() * (1 - 2**-10)


@pytest.mark.parametrize(
    "change", [{"masking": "block"}, {"alpha_by": "epoch"}, {"alpha_start": 0.5}]
)
def test_pretrain__goes_on_with_the_same_masks_or_not_at_all(
    change: dict[str, object], world: World, tmp_path: Path
) -> None:
    settings = {"masking": "shuffled", "parts": world.store}
    pretrain(pretrain_options(world, tmp_path, **settings))
    name, value = next(iter(change.items()))
    with pytest.raises(MismatchError, match=f"--{name.replace('_', '-')} was .*, is {value}"):
        pretrain(pretrain_options(world, tmp_path, **{**settings, **change}))


def test_pretrain_options__refuse_a_schedule_that_no_mask_follows(
    world: World, tmp_path: Path
) -> None:
    changes = {"gamma": 3.0, "alpha_start": 0.5, "alpha_end": 0.5, "alpha_by": "epoch"}
    for name, value in changes.items():
        pretrain_options(world, tmp_path, masking="shuffled", **{name: value})
        flag = f"--{name.replace('_', '-')}"
        said = f"^{flag} is {value}: expected its default, .*, with --masking block: it has no al"
        with pytest.raises(SettingError, match=said):
            pretrain_options(world, tmp_path, masking="block", **{name: value})


def test_pretrain__logs_alpha_only_where_masks_follow_it(world: World, tmp_path: Path) -> None:
    settings = {"parts": world.store, "log_steps": 1}
    for masking in ("semantic", "random"):
        pretrain(pretrain_options(world, tmp_path / masking, masking=masking, **settings))
        lines = [*lines_of(tmp_path / masking), *lines_of(tmp_path / masking, "steps.jsonl")]
        assert {"alpha" in line for line in lines} == {masking == "semantic"}


@pytest.mark.parametrize(("ratio", "said"), [(0.02, "at least one of the 16"), (0.98, "none of")])
def test_pretrain_options__refuse_a_mask_of_nothing_or_of_all(
    ratio: float, said: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=f"mask.ratio.* {ratio}.*{said}"):
        pretrain_options(world, tmp_path, mask_ratio=ratio)
    for fitting in (1 / 16, 15 / 16):
        pretrain_options(world, tmp_path, mask_ratio=fitting)


def test_pretrain_options__compute_at_most_256_images_at_once(tmp_path: Path) -> None:
    given = PretrainOptions(data="images", output=tmp_path, masking="random")
    for processes, parts in ((1, 16), (4, 16), (16, 16), (64, 64)):
        assert given.batch_parts(processes) == parts
    sampler = BatchSampler(given.schedule(9000), given.seed, 0, given.batch_parts(1))
    assert {len(draws) for draws in itertools.islice(sampler, 20)} == {256}
    assert dataclasses.replace(given, micro_batch=0).batch_parts(4) == 4


def test_pretrain__alpha_by_epoch_is_the_same_all_through_it(world: World, tmp_path: Path) -> None:
    settings = {"masking": "semantic", "parts": world.store, "alpha_by": "epoch", "epochs": 2}
    pretrain(pretrain_options(world, tmp_path, **settings))
    lines = lines_of(tmp_path)
    assert [line["alpha"] for line in lines] == [0.25, 1.0]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_pretrain__an_incomplete_store_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.store, tmp_path / "store")
    (tmp_path / "store" / "complete.json").unlink()
    options = pretrain_options(world, tmp_path / "run", masking="semantic")
    from dataclasses import replace

    with pytest.raises(DamageError, match="not complete"):
        pretrain(replace(options, parts=tmp_path / "store"))


@pytest.mark.parametrize("workers", [0, 2])
def test_pretrain__refuses_images_that_changed_since_their_parts_were_made(
    workers: int, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.data, tmp_path / "images")
    settings = {"data": str(tmp_path / "images"), "parts": world.store, "masking": "semantic"}
    options = pretrain_options(world, tmp_path / "run", **settings, loader_workers=workers)
    first, last = (tmp_path / "images" / list_images(world.data, "train").key(i) for i in (0, 71))
    extra = first.with_name("one-more.png")
    shutil.copy(last, extra)
    with pytest.raises(
        MismatchError, match=f"lacks 1 of 73 .*{extra.name} first; run extract-parts"
    ):
        pretrain(options)
    extra.unlink()
    for image in (tmp_path / "images").rglob("*.png"):
        image.write_bytes(image.read_bytes() + b"!")
    with pytest.raises(MismatchError, match=r"\.png has \d+ bytes, and had \d+ when it was listed"):
        pretrain(options)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_pretrain__trains_on_what_is_left_of_the_images(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "images")
    plan = list_images(tmp_path / "images", "train")
    Path(plan.root, plan.key(5)).unlink()
    options = pretrain_options(world, tmp_path / "run", parts=world.store, masking="semantic")
    data = pretraining_data(dataclasses.replace(options, data=str(tmp_path / "images")))
    whole = pretraining_data(options)
    assert (len(data), len(whole)) == (71, 72)
    assert data.fingerprint != whole.fingerprint


def test_pretrain__a_store_of_other_images_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    options = pretrain_options(
        world, tmp_path / "run", data=str(tmp_path / "images"), masking="semantic"
    )
    from dataclasses import replace

    with pytest.raises(MismatchError, match="lacks 20 of 20"):
        pretrain(replace(options, parts=world.store))


def test_pretrain__says_which_of_images_and_part_store_changed(
    world: World, attentive_store: Path, tmp_path: Path
) -> None:
    options = pretrain_options(world, tmp_path / "run", parts=world.store, masking="semantic")
    pretrain(options)
    with pytest.raises(MismatchError) as raised:
        pretrain(dataclasses.replace(options, parts=attentive_store))
    told = [PartStore.open(store).fingerprint[:12] for store in (world.store, attentive_store)]
    assert str(raised.value) == (
        f"the run in {tmp_path / 'run'} was started on other data: part store {told[0]} "
        f"then, {told[1]} now (72 images then, 72 now); restore what changed or choose "
        "another --output"
    )
    shutil.copytree(world.data, tmp_path / "images")
    next((tmp_path / "images" / "train").rglob("*.png")).unlink()
    changed = str(tmp_path / "images")
    with pytest.raises(
        MismatchError, match=r"data: images \w+ then, \w+ now \(72 images then, 71 now"
    ):
        pretrain(dataclasses.replace(options, data=changed))
    options = dataclasses.replace(options, output=tmp_path / "random", masking="random")
    pretrain(options)
    with pytest.raises(MismatchError, match=r"images .*; part store \w+ then, none now"):
        pretrain(dataclasses.replace(options, data=changed, parts=None))


def test_pretrain__says_what_differs_between_part_stores(world: World, tmp_path: Path) -> None:
    options = pretrain_options(world, tmp_path / "run", parts=world.store, masking="semantic")
    pretrain(options)
    learn_parts(learn_options(world, tmp_path / "learner", seed=1))
    other = tmp_path / "other"
    extract_parts(ExtractPartsOptions(data=world.data, learner=tmp_path / "learner", output=other))
    told = r"other data: part store \w+ then, \w+ now; its learner \w{12} then, \w{12} now \("
    with pytest.raises(MismatchError, match=told):
        pretrain(dataclasses.replace(options, parts=other))


def test_pretrain__names_the_images_that_changed(world: World, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(world.data, images)
    options = pretrain_options(world, tmp_path / "run", data=str(images))
    pretrain(options)
    keys = list_images(images, "train").keys.tolist()
    (images / keys[3]).unlink()
    (images / keys[7]).write_bytes((images / keys[7]).read_bytes() + b"!")
    shutil.copy(images / keys[0], images / keys[0].replace(".png", "x.png"))
    added = keys[0].replace(".png", "x.png")
    said = rf"\(72 images then, 72 now: 2 new or changed, such as {added}, {keys[7]}; 2 of before"
    with pytest.raises(MismatchError, match=said):
        pretrain(options)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if killed before the first one
    pretrain(options)
    (images / added).unlink()
    with pytest.raises(MismatchError, match=r"\(72 images then, 71 now: 1 of before gone"):
        pretrain(options)
    shutil.copy(images / keys[0], images / added)
    (images / keys[7]).write_bytes(b"!")
    (tmp_path / "run" / "images.npy").write_bytes(b"")
    with pytest.raises(MismatchError, match=r"\(72 images then, 72 now\); restore"):
        pretrain(options)


def test_pretrain__killed_and_gone_on_with_is_the_same_to_the_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that draws or keeps anything: masks of parts, workers, places, average."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    settings = {"masking": "semantic", "parts": world.store, "epochs": 2, "ema": 0.9}
    settings |= {"predicted_share": 0.4, "loader_workers": 2, "checkpoint_steps": 3}
    whole = pretrain(pretrain_options(world, tmp_path / "whole", micro_batch=8, **settings))
    options = pretrain_options(world, tmp_path / "killed", micro_batch=8, **settings)
    child = os.fork()
    if child == 0:
        loss, calls = Pretraining.loss, []

        def killed(task: Pretraining, batch: Batch) -> tuple[torch.Tensor, Any]:
            calls.append(1)
            if len(calls) == 12:  # the sixth step's second part, in the middle of an epoch
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(task, batch)

        try:
            monkeypatch.setattr(Pretraining, "loss", killed)
            pretrain(options)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [step for step, _ in checkpoints(options.output)] == [3, 4]
    path = pretrain(options)
    assert path.name == whole.name
    assert same(path, whole)
    assert log_of(options.output) == log_of(tmp_path / "whole")


def test_pretrain__reads_no_tensor_between_two_points_of_the_log(
    world: World, tmp_path: Path
) -> None:
    """The host would wait for the device at each."""
    counts = []
    settings = {"masking": "semantic", "parts": world.store, "predicted_share": 0.4, "ema": 0.9}
    for batch in (24, 8):  # in three steps and in nine
        options = pretrain_options(world, tmp_path / str(batch), log_steps=1000, **settings)
        options = dataclasses.replace(options, batch_size=batch, clip_gradients=1.0)
        with ScalarReads() as reads:
            pretrain(options)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_pretrain__compiled_it_trains_as_it_does_plain(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs as for torch's own compiler, which would take a minute, but run as they are."""
    compiled, asked = torch.compile, []

    def traced(function: Any) -> Any:
        asked.append(function)
        return compiled(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    found = []
    for compiling in (False, True):
        run = tmp_path / str(compiling)
        settings = {"compile": compiling, "predicted_share": 0.4, "log_steps": 1}
        pretrain(pretrain_options(world, run, **settings))
        found.append([point["loss"] for point in lines_of(run, "steps.jsonl")])
    assert len(asked) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_pretrain__a_missing_compiler_is_one_sentence(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    def quickly_compiled(model: MaskedAutoencoder, images: Tensor, *rest: Any) -> Any:
        losses = model.mask_token.mean() * images.float().mean(dim=(2, 3))
        return losses, losses.argsort()

    monkeypatch.setattr(MaskedAutoencoder, "patch_losses", quickly_compiled)
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/c++"))
    with pytest.raises(MissingError, match=r"^--compile finds no compiler .*leave --compile out$"):
        pretrain(pretrain_options(world, tmp_path, compile=True))
