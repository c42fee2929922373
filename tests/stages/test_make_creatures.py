import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semmae.errors import DamageError, SettingError
from semmae.pipeline.creatures import PART_NAMES, draw_creature
from semmae.stages import make_creatures as stage
from semmae.stages.make_creatures import MakeCreaturesOptions, make_creatures
from semmae.storage.files import write_atomically


def _options(output: Path, **settings: int) -> MakeCreaturesOptions:
    return MakeCreaturesOptions(
        output=output,
        train=settings.get("train", 14),
        val=settings.get("val", 3),
        size=settings.get("size", 32),
        seed=settings.get("seed", 5),
    )


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_make_creatures__files_hold_the_drawn_images_and_labels(tmp_path: Path) -> None:
    make_creatures(_options(tmp_path / "set"))
    images = sorted((tmp_path / "set/images").rglob("*.png"))
    assert len(images) == 17
    for path in images:
        split, folder, name = path.parts[-3:]
        creature = draw_creature(
            5, int(path.stem), size=32, split="val" if split == "val" else "train"
        )
        assert int(folder[:2]) == creature.species
        assert np.array_equal(np.asarray(Image.open(path)), creature.image)
        labels = Image.open(tmp_path / "set/labels" / split / folder / name)
        assert labels.mode == "P"
        assert np.array_equal(np.asarray(labels), creature.labels)
    record = json.loads((tmp_path / "set/creatures.json").read_text())
    assert (record["seed"], record["size"], record["train"], record["val"]) == (5, 32, 14, 3)
    assert record["parts"] == list(PART_NAMES)
    assert len(stage.LABEL_COLOURS) == len(set(stage.LABEL_COLOURS)) == len(PART_NAMES)


def test_make_creatures__an_interrupted_run_ends_complete_and_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_creatures(_options(tmp_path / "whole"))
    writes, write = [0], write_atomically

    def failing(path: Path, data: bytes) -> None:
        writes[0] += 1
        if writes[0] == 12:  # between an image and its labels
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_atomically", failing)
        with pytest.raises(KeyboardInterrupt):
            make_creatures(_options(tmp_path / "cut"))
    # What a killed process leaves behind.
    (tmp_path / "cut/images/train/00-amberpiper/.000000.png.0a.tmp").write_bytes(b"half")
    make_creatures(_options(tmp_path / "cut"))
    assert _content(tmp_path / "cut") == _content(tmp_path / "whole")


def test_make_creatures__a_rerun_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_creatures(_options(tmp_path / "set"))
    monkeypatch.setattr(stage, "draw_creature", None)
    make_creatures(_options(tmp_path / "set"))


@pytest.mark.parametrize("name", ["train", "val", "size", "seed"])
def test_make_creatures__refuses_a_folder_of_other_settings(tmp_path: Path, name: str) -> None:
    make_creatures(_options(tmp_path, train=1, val=0))
    before = _content(tmp_path)
    changed = {"train": 1, "val": 0, name: 40}
    with pytest.raises(SettingError, match=rf"{name} = .*not 40"):
        make_creatures(_options(tmp_path, **changed))
    assert _content(tmp_path) == before


def test_make_creatures__refuses_a_folder_of_other_files_or_an_altered_record(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SettingError, match="other files"):
        make_creatures(_options(tmp_path))
    make_creatures(_options(tmp_path / "set", train=1, val=0))
    record = tmp_path / "set/creatures.json"
    record.write_text(record.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(DamageError):
        make_creatures(_options(tmp_path / "set", train=1, val=0))


@pytest.mark.parametrize(
    ("name", "value"), [("train", 0), ("val", -1), ("size", 31), ("size", 4097), ("seed", -1)]
)
def test_options__refuse_what_is_out_of_range(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(SettingError, match=rf"{name} must be .* got {value}"):
        _options(tmp_path, **{name: value})
