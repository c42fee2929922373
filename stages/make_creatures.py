"""`semmae data make-creatures`: a folder of generated images with true part labels.

    OUTPUT/creatures.json                        the settings: what a rerun must agree with
    OUTPUT/images/{train,val}/<species>/x.png    RGB; pass as --data OUTPUT/images
    OUTPUT/labels/{train,val}/<species>/x.png    palette images, pixel value = part id; --labels

Images and labels stand side by side, not one inside the other, so that a scan for training images
never meets a label image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from tqdm import tqdm

from ..errors import SettingError
from ..pipeline.creatures import (
    CLASS_NAMES,
    GENERATOR_VERSION,
    PART_NAMES,
    SPECIES,
    SPECIES_SEED,
    Split,
    draw_creature,
)
from ..storage.files import read_json, write_atomically, write_json

RECORD = "creatures.json"
# For viewers only; colours of Okabe and Ito, which stay apart for colour-blind readers too.
LABEL_COLOURS: tuple[tuple[int, int, int], ...] = (
    (32, 32, 32),
    (0, 114, 178),
    (213, 94, 0),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
)


@dataclass(frozen=True, kw_only=True)
class MakeCreaturesOptions:
    """Settings of `make_creatures`.

    Raises:
        SettingError: A value is out of its range.
    """

    output: Annotated[Path, "Folder to write; made if it is not there."]
    train: Annotated[int, "Images in the train split."] = 12000
    val: Annotated[int, "Images in the val split."] = 1000
    size: Annotated[int, "Height and width, pixels."] = 96
    seed: Annotated[int, "Seed of the images; the species stay the same."] = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("train", 1, 10**8),
            ("val", 0, 10**8),
            ("size", 32, 4096),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingError(
                    f"make-creatures: {name} must be in {low} to {high}, got {value}."
                )


def _record(options: MakeCreaturesOptions) -> dict[str, Any]:
    """Everything that the files depend on, and how to read them."""
    return {
        "kind": "creatures",
        "generator_version": GENERATOR_VERSION,
        "species_seed": SPECIES_SEED,
        "seed": options.seed,
        "size": options.size,
        "train": options.train,
        "val": options.val,
        "parts": list(PART_NAMES),
        "classes": list(CLASS_NAMES),
    }


def _settle(options: MakeCreaturesOptions) -> None:
    """Writes the record, or checks that the one that is there asks for the same files."""
    path, wanted = options.output / RECORD, _record(options)
    if path.exists():
        found = read_json(path)
        differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        if differing:
            key = differing[0]
            raise SettingError(
                f"make-creatures: {options.output} was made with {key} = {found.get(key)!r}, not "
                f"{wanted.get(key)!r}; give the same settings or name another folder."
            )
        for stray in options.output.glob("*/*/*/.*.tmp"):
            stray.unlink(missing_ok=True)
        return
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise SettingError(
            f"make-creatures: {options.output} holds other files and no {RECORD}; "
            f"name a new or an empty folder."
        )
    write_json(path, wanted)


def _files(options: MakeCreaturesOptions) -> Iterator[tuple[Split, int, Path, Path]]:
    """Split, index, image path and label path of every image."""
    splits: tuple[tuple[Split, int], ...] = (("train", options.train), ("val", options.val))
    for split, count in splits:
        for index in range(count):
            place = Path(split, CLASS_NAMES[index % SPECIES], f"{index:06d}.png")
            yield split, index, options.output / "images" / place, options.output / "labels" / place


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def make_creatures(options: MakeCreaturesOptions) -> None:
    """Writes the images and labels that are not there yet.

    Each file is written whole or not at all, so an interrupted run is finished by the same call,
    and the folder comes out the same.  One run at a time may write a folder.

    Args:
        options: What to make and where.

    Raises:
        SettingError: The folder was made with other settings, or holds something else.
        DamageError: The folder's record was altered.
        UserError: The system refused a write.
    """
    _settle(options)
    total = options.train + options.val
    for split, index, image, labels in tqdm(
        _files(options), "creatures", total, disable=None, unit="img"
    ):
        if image.exists() and labels.exists():
            continue
        creature = draw_creature(options.seed, index, size=options.size, split=split)
        write_atomically(image, _png(Image.fromarray(creature.image)))
        coloured = Image.fromarray(creature.labels)
        coloured.putpalette([value for colour in LABEL_COLOURS for value in colour])
        write_atomically(labels, _png(coloured))
