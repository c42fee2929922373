import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semmae.errors import DamageError, MismatchError, SettingError
from semmae.stages.pretrain import pretrain, pretraining_data
from semmae.storage.checkpoints import load_checkpoint
from semmae.tests.world import World, pretrain_options


def test_pretrain__semantic_masks_leave_the_exact_count(world: World, tmp_path: Path) -> None:
    options = pretrain_options(world, tmp_path, masking="semantic", parts=world.store)
    from semmae.pipeline.schedule import Draw

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


def test_pretrain__masking_changes_only_the_masks(world: World, tmp_path: Path) -> None:
    from semmae.pipeline.schedule import Draw

    draws = [Draw(i, 1, 0.5) for i in range(8)]
    options = pretrain_options(world, tmp_path, parts=world.store)
    random = pretraining_data(options).__getitems__(draws)
    options = pretrain_options(world, tmp_path, parts=world.store, masking="semantic")
    semantic = pretraining_data(options).__getitems__(draws)
    assert torch.equal(random["images"], semantic["images"])
    assert not torch.equal(random["mask"], semantic["mask"])


def test_pretrain__semantic_without_parts_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--parts"):
        pretrain(pretrain_options(world, tmp_path, masking="semantic"))
    assert not list(tmp_path.iterdir())


def test_pretrain__an_incomplete_store_is_refused(world: World, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(world.store, tmp_path / "store")
    (tmp_path / "store" / "complete.json").unlink()
    options = pretrain_options(world, tmp_path / "run", masking="semantic")
    from dataclasses import replace

    with pytest.raises(DamageError, match="not complete"):
        pretrain(replace(options, parts=tmp_path / "store"))


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
