"""Networks from what users name: ``--encoder``, ``--checkpoint``, ``--learner``."""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save

from ..errors import DamageError, MismatchError, MissingError, SettingError
from ..models.autoencoder import Architecture, MaskedAutoencoder
from ..models.encoders import (
    FrozenEncoder,
    TimmNetwork,
    build_encoder,
    timm_encoder,
    timm_encoder_again,
)
from ..models.parts import PartArchitecture, PartLearner
from ..models.readings import DEFAULT_READING, Facet, Reading
from ..models.vision import IMAGENET_MEAN, IMAGENET_STD
from ..models.warm_start import Start, start_of
from ..pipeline.options import parse_sides
from ..storage.checkpoints import file_hash, load_checkpoint, resolve_checkpoint
from ..storage.files import write_atomically

ENCODER_FILE = "encoder.safetensors"
"""The frozen encoder in the folder of a part learner, so that the folder is all one needs."""


Weights = Literal["trained", "ema"]
"""Which weights of a run's checkpoint are taken: those of its last step, or their average."""


def open_encoder(
    named: str, reading: Reading | None = None, weights: Weights = "trained"
) -> FrozenEncoder:
    """The encoder of ``--encoder`` or ``--checkpoint``.

    Args:
        named: ``timm:<name>``, a weight file, or the folder of a run.
        reading: Which blocks to read, and what of them; None is what `save_encoder` recorded in
            the file, else the patch tokens of the last block.
        weights: Which weights of a run.

    Raises:
        SettingError: timm has no such network, the file holds no vision transformer, the reading
            names blocks that it has not, or it keeps no average and that is asked for.
        MissingError: There is no such file, or timm's weights cannot be had.
        DamageError: The file cannot be read, or holds weights that are not finite.
    """
    if named.startswith("timm:"):
        _weights_of({}, weights, named)
        found = timm_encoder(named.removeprefix("timm:"), reading=reading or DEFAULT_READING)
        return _finite(found, named)
    path = _file_of(named)
    return _encoder_of(_weights_of(load_checkpoint(path), weights, named), path, reading)


def _weights_of(state: dict[str, Any], weights: Weights, name: str) -> dict[str, Any]:
    """A checkpoint with the weights that were chosen in the place of the trained ones."""
    if weights == "trained":
        return state
    if "ema" not in state:
        raise SettingError(
            f"--weights is ema, and {name} keeps no moving average of its weights: expected a run "
            "that was started with --ema; drop the flag to take the trained ones"
        )
    return {**state, "model": state["ema"]}


def open_start(named: str, weights: Weights = "trained") -> Start:
    """The encoder, and the decoder if there is one, that pretraining is to begin from.

    Args:
        named: As for `open_encoder`.
        weights: Likewise.

    Raises:
        SettingError, MissingError, DamageError: As `open_encoder`; also SettingError as of
            `refuse_other_pixels`.
    """
    state: dict[str, Any] = {}
    if named.startswith("timm:"):
        encoder = open_encoder(named, weights=weights)
    else:
        path = _file_of(named)
        state = _weights_of(load_checkpoint(path), weights, named)
        encoder = _encoder_of(state, path)
    refuse_other_pixels(encoder, named)
    return start_of(state, encoder.transformer, named)


def refuse_other_pixels(encoder: FrozenEncoder, named: str) -> None:
    """Refuse to train on an encoder whose pixels are not normalised as those of our runs.

    Raises:
        SettingError: They are normalised otherwise.
    """
    mean, std = tuple(encoder.mean.tolist()), tuple(encoder.std.tolist())
    if not np.allclose([mean, std], [IMAGENET_MEAN, IMAGENET_STD]):
        raise SettingError(
            f"{named} takes pixels of mean {mean} and deviation {std}, pretraining gives "
            f"{IMAGENET_MEAN} and {IMAGENET_STD}: name another network to start from"
        )


def _file_of(named: str) -> Path:
    if not Path(named).exists():
        raise MissingError(
            f"no encoder at {named}: expected timm:<name>, a weight file or the folder of a run"
        )
    return resolve_checkpoint(Path(named))


def _encoder_of(state: dict[str, Any], path: Path, reading: Reading | None = None) -> FrozenEncoder:
    name = str(path)
    if state.get("kind") == "parts":
        raise SettingError(
            f"{name} is a part learner: expected an encoder, such as the run it was learned on"
        )
    if state.get("kind") == "encoder":  # of student and teacher, the teacher
        taught = any(name.startswith("teacher.") for name in state["model"])
        prefix = "teacher." if taught else "student."
        own = {k: v for k, v in state["model"].items() if k.startswith(prefix)}
        state = {**state, "model": {k.removeprefix(prefix): v for k, v in own.items()}}
    record = _record_in(state)
    if reading is None and record:
        read = record["reading"]
        reading = Reading(tuple(read["blocks"]), read["kind"], read["pooled"])
    reading = reading or DEFAULT_READING
    if record.get("timm"):
        network = TimmNetwork(**record["timm"])
        encoder = timm_encoder_again(network, state["model"], name, reading)
    else:
        size = (0, 0)
        mean, std = record.get("mean", IMAGENET_MEAN), record.get("std", IMAGENET_STD)
        if not (record or "kind" in state):
            size, mean, std = _told_beside(path)
        encoder = build_encoder({**state, **record}, name, None, size, reading, mean, std)
    return _finite(encoder, name)


def _finite(encoder: FrozenEncoder, name: str) -> FrozenEncoder:
    """The encoder, whose every weight is a number.

    Raises:
        DamageError: One is not.
    """
    weights = encoder.transformer.state_dict()
    broken = [key for key, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise DamageError(
            f"{len(broken)} of {len(weights)} tensors of {name} hold weights that are not finite, "
            f"{broken[0]} first: take an older checkpoint, or get the file again"
        )
    return encoder


def _told_beside(path: Path) -> tuple[tuple[int, int], Sequence[float], Sequence[float]]:
    """The images that a file of others takes: their size, and mean and deviation of their pixels.

    Its tensors tell none of it; timm's ``config.json`` does, where it lies beside.  The size is
    (0, 0) where nothing tells it, mean and deviation are ImageNet's; one line says which are taken.

    Raises:
        DamageError: The ``config.json`` beside the file is none.
    """
    beside = path.with_name("config.json")
    told: dict[str, Any] = {}
    try:
        if beside.is_file():
            told = json.loads(beside.read_text()).get("pretrained_cfg") or {}
        _, height, width = (int(side) for side in told.get("input_size", (3, 0, 0)))
        mean, std = (
            tuple(float(value) for value in told.get(of, usual))
            for of, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
        )
        known = len(mean) == len(std) == 3
    except (ValueError, TypeError, AttributeError):
        known = False
    if not known:
        raise DamageError(
            f"{beside} is not what timm writes beside weights: expected JSON with input_size, mean "
            'and std, three numbers each, under "pretrained_cfg"; put it right, or remove it'
        )
    why = "ImageNet's, as no config.json beside it says others"
    if told.keys() & {"mean", "std"}:
        why = "as config.json beside it says"
    print(f"{path} is given pixels of mean {mean} and deviation {std}, {why}", file=sys.stderr)
    return (height, width), mean, std


RECORD = "semmae"
"""Key of the metadata of an encoder's file.  One key: safetensors writes several in an order that
changes from save to save, and equal encoders shall have equal files."""


def _record_in(state: dict[str, Any]) -> dict[str, Any]:
    """What `save_encoder` wrote beside the tensors; empty for files of others."""
    return json.loads(state[RECORD]) if RECORD in state else {}


def encoder_file(encoder: FrozenEncoder) -> bytes:
    """A safetensors file of which `open_encoder` gives the same encoder, read the same way."""
    record = {
        "architecture": {"heads": encoder.heads, "image_size": encoder.native_size},
        "reading": asdict(encoder.reading),
        "mean": encoder.mean.tolist(),
        "std": encoder.std.tolist(),
        "timm": asdict(encoder.timm) if encoder.timm else None,
    }
    tensors = {name: t.contiguous() for name, t in encoder.transformer.state_dict().items()}
    return save(tensors, {RECORD: json.dumps(record, sort_keys=True)})


def save_encoder(encoder: FrozenEncoder, path: Path) -> None:
    """Write `encoder_file`; the save_file of safetensors lets nobody else read what it writes."""
    write_atomically(path, encoder_file(encoder))


def checkpoint_hash(named: str) -> str:
    """SHA-256 of what `open_encoder` would read; of the weights themselves for timm's."""
    if named.startswith("timm:"):
        digest = hashlib.sha256()
        for tensor in open_encoder(named).transformer.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
    return file_hash(resolve_checkpoint(Path(named)))


@dataclass(frozen=True)
class TrainedLearner:
    """A part learner ready to extract with.

    Attributes:
        encoder: The frozen encoder it was learned on.
        learner: The part learner, in evaluation mode.
        image_size: Pixels down and across that images are squashed to.
        hash: SHA-256 over the SHA-256 of both weight files.
    """

    encoder: FrozenEncoder
    learner: PartLearner
    image_size: tuple[int, int]
    hash: str

    @property
    def grid(self) -> tuple[int, int]:
        """Places of a part map, down and across."""
        patch = self.encoder.patch_size
        return self.image_size[0] // patch, self.image_size[1] // patch


def learner_of(state: dict[str, Any], path: Path) -> PartLearner:
    """The part learner of a checkpoint.

    Args:
        state: Content of the checkpoint.
        path: Where it lies, for the message.

    Raises:
        MismatchError: Its shape or tensors do not fit, as those of another version of semmae.
    """
    record = {k: v for k, v in state["architecture"].items() if k != "image_size"}
    # A shape that lacks a field is of a version that made maps in another way.
    if record.keys() != {field.name for field in fields(PartArchitecture)}:
        raise _other_version(path)
    try:
        learner = PartLearner(PartArchitecture(**record))
        learner.load_state_dict(state["model"])
    except RuntimeError as error:
        raise _other_version(path) from error
    return learner


def _other_version(path: Path) -> MismatchError:
    return MismatchError(
        f"the part learner {path} does not fit this semmae: expected the tensors that its version "
        "writes; open it with the version that wrote it, or learn the parts anew with `semmae "
        "stage1 learn-parts` in another --output"
    )


def open_learner(folder: Path) -> TrainedLearner:
    """The part learner in the folder of a ``learn-parts`` run.

    Raises:
        MissingError: There is no such folder, or it holds no part learner.
        SettingError: It holds another kind of run.
        MismatchError: Its tensors do not fit, as those of another version of semmae.
    """
    path = resolve_checkpoint(folder)
    state = load_checkpoint(path)
    if state.get("kind") != "parts":
        raise SettingError(
            f"{folder} holds a run of kind {state.get('kind')!r}: expected a part learner, "
            "the --output of `semmae stage1 learn-parts`"
        )
    encoder_path = path.parent.parent / ENCODER_FILE
    encoder = _encoder_of(load_checkpoint(encoder_path), encoder_path)
    learner = learner_of(state, path).eval().requires_grad_(False)
    height, width = state["architecture"]["image_size"]
    both = hashlib.sha256(f"{file_hash(path)}{file_hash(encoder_path)}".encode()).hexdigest()
    return TrainedLearner(encoder, learner, (height, width), both)


def open_autoencoder(run: Path) -> MaskedAutoencoder:
    """The masked autoencoder in the folder of a pretraining run, in evaluation mode.

    Raises:
        MissingError: There is no such folder, or it holds no checkpoint.
        SettingError: It holds another kind of run.
    """
    state = load_checkpoint(resolve_checkpoint(run))
    if state.get("kind") != "pretraining":
        raise SettingError(
            f"{run} holds {state.get('kind', 'weights of others')!r}: expected the --output of "
            "`semmae stage2 pretrain`"
        )
    record = dict(state["architecture"])
    model = MaskedAutoencoder(
        Architecture.from_record(record), bool(state["options"]["normalise_target"])
    )
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(False)


def parse_reading(blocks: str, kind: Facet, pooled: bool) -> Reading:
    """The reading of ``--blocks``, ``--facet`` and ``--pooled``.

    Args:
        blocks: Numbers parted by commas, from 1, or from the end: ``"-1"``, ``"-4,-1"``.
        kind: What to take of each block.
        pooled: Whether the class token is the mean patch token.

    Raises:
        SettingError: The text holds something else, or a block 0.
    """
    if not re.fullmatch(r"\s*-?[0-9]{1,5}\s*(,\s*-?[0-9]{1,5}\s*)*", blocks):
        raise SettingError(
            f"--blocks is {blocks!r}: expected block numbers parted by commas, such as -1 for the "
            "last or -4,-1"
        )
    return Reading(tuple(int(block) for block in blocks.split(",")), kind, pooled)


OR_OWN = ", or 0 for the encoder's own size"


def parse_image_size(option: int | str, also: str = "") -> tuple[int, int]:
    """The size (H, W) of ``--image-size``, pixels.

    Args:
        option: The side of a square such as 224, or height x width such as ``"224x320"``; numbers
            may come as text.
        also: What else the command takes, for the message; without it 0 is refused.

    Raises:
        SettingError: The text is neither.
    """
    size = parse_sides(option)
    if min(size) < 1 and not (also and str(option).strip() == "0"):
        raise SettingError(
            f"--image-size is {option!r}: expected the pixels of a square such as 224, or height x "
            f"width such as 224x320{also}"
        )
    return size


def image_size_of(
    option: int | str, encoder_size: tuple[int, int], patch_size: int
) -> tuple[int, int]:
    """The size (H, W) that images are brought to, pixels.

    Args:
        option: 0 for the encoder's own size, the side of a square such as 224, or height x width
            such as ``"224x320"``; numbers may come as text.
        encoder_size: (H, W) that the encoder's positions were made for.
        patch_size: Of the encoder.

    Raises:
        SettingError: The text is none of these, or the size no multiple of the patch size.
    """
    size = parse_image_size(option, OR_OWN)
    size = encoder_size if size == (0, 0) else size
    if size[0] % patch_size or size[1] % patch_size:
        raise SettingError(
            f"--image-size is {size[0]} x {size[1]}: expected multiples of the encoder's patch "
            f"size {patch_size}"
        )
    return size
