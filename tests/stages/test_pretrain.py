import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semmae.errors import DamageError, MismatchError, MissingError, SettingError
from semmae.pipeline.crops import flips
from semmae.pipeline.mask_policies import POLICIES
from semmae.pipeline.randomness import Purpose, streams
from semmae.pipeline.schedule import Draw
from semmae.pipeline.sources import list_images
from semmae.stages.pretrain import pretrain, pretraining_data
from semmae.storage.checkpoints import load_checkpoint
from semmae.storage.part_store import PartStore
from semmae.tests.world import World, pretrain_options


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
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())


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


def test_pretrain__alpha_by_epoch_is_the_same_all_through_it(world: World, tmp_path: Path) -> None:
    settings = {"masking": "semantic", "parts": world.store, "alpha_by": "epoch", "epochs": 2}
    pretrain(pretrain_options(world, tmp_path, **settings))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
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
