"""Train, validation and test parts of a data set, told by the names of folders and files."""

import re
from collections.abc import Callable
from typing import Literal

from ..errors import MissingError

Split = Literal["train", "val", "all"]

# A test split is the validation split of last resort.
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "valid"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_named(name: str) -> str | None:
    """The split that a folder's whole name tells: train, val or test."""
    return _SPLIT_OF.get(name.lower())


def split_in(path: str) -> str | None:
    """The split that the first fitting word of a file's name tells, or else of its folder's.

    ``train-00001.parquet``, ``imagenet-val-000003.tar``, ``train/000003.tar``.
    """
    folder, _, name = path.lower().rpartition("/")
    words = [*re.findall("[a-z]+", name), *re.findall("[a-z]+", folder)]
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)


def chosen_of(
    place: str, split: Split, names: list[str], split_of: Callable[[str], str | None]
) -> list[str]:
    """Those of the folders or files that belong to a split.

    Args:
        place: Where they lie, for messages.
        split: The split; val takes a test split where there is no validation split.
        names: Folders or files.
        split_of: The split of a name, None where it tells none.

    Returns:
        All of them for "all", and for "train" where no name tells a split.

    Raises:
        MissingError: None belongs to the split.
    """
    splits = {split_of(name) for name in names} - {None}
    if split == "all" or (split == "train" and not splits):
        return names
    wanted = "test" if split == "val" and "val" not in splits else split
    chosen = [name for name in names if split_of(name) == wanted]
    if not chosen:
        raise MissingError(
            f"{place} has no {split} split: expected a folder {split}/ or files {split}-*.parquet "
            f"or {split}-*.tar; add one, or ask for split all"
        )
    return chosen
