"""`semmae init`: a commented ``semmae.toml`` for a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import SettingError
from ..pipeline.sources import list_images
from ..storage.files import write_atomically

TEMPLATE = """\
# Settings that the semmae commands share.  A flag overrides what stands here; a command's own table
# overrides [shared].  Every flag is a key: `semmae stage2 pretrain --help` lists them.

[shared]
data = {data}  # {images} training images
encoder = {encoder}  # frozen encoder: timm:<name>, a weight file, or the folder of a run
learner = {learner}  # where learn-parts writes and extract-parts reads
parts = {parts}  # part store: where extract-parts writes and pretrain reads

[stage1.learn-parts]
output = {learner}
# num-parts = 6  # parts beside the background
# epochs = 5
{small_learn}
[stage1.extract-parts]
output = {parts}
# workers = 0  # Ray actors, one GPU (or CPU) each; 0 works in the command's own process
# cache-images = 256  # keep the images too, at this short side: pretraining can read them there

[stage2.pretrain]
output = {run}
# masking = "semantic"  # or random (plain MAE), block, green, attention, shuffled
# images = "data"  # or "cache", the images that the part store keeps
# size = "base"  # micro, tiny, small, base, large, huge
# patch-size = 16
# image-size = 224  # or "224x320", height x width
# start = "mae_pretrain_full.pth"  # weights to begin from; by default none
# epochs = 800
# micro-batch = 256  # most images that a device computes at once: less where memory is short
{batch}
[eval.knn]
checkpoint = {run}
output = {results}

[eval.linear]
checkpoint = {run}
output = {results}
{small_linear}
[parts.show]
output = {part_picture}

[masks.show]
output = {mask_picture}
"""

DEFAULT_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class InitialiseOptions:
    """Settings of `initialise`."""

    data: Annotated[str, "Images: a folder, Parquet or tars, or a URL."]
    encoder: Annotated[str, "Frozen encoder to learn parts on."] = "timm:vit_small_patch16_224.dino"
    work: Annotated[Path, "Folder that learner, store, run and results go to."] = Path("work")
    output: Annotated[Path, "Settings file to write."] = Path("semmae.toml")


def _quoted(value: object) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def initialise(options: InitialiseOptions) -> Path:
    """Write the settings file; returns its path.

    Raises:
        SettingError: There is one already.
        MissingError: There are no images at ``data``.
    """
    if options.output.exists():
        raise SettingError(f"{options.output} exists: edit it, or remove it first")
    images = len(list_images(options.data, "train"))
    work = options.work
    batch = f"# batch-size = {DEFAULT_BATCH}\n"
    small_learn = small_linear = ""
    if images < 8 * DEFAULT_BATCH:
        fitting = 1 << max((images // 8).bit_length() - 1, 0)
        batch = f"batch-size = {fitting}  # the paper's 4096 is for ImageNet's 1.28 million\n"
        if fitting < 64:
            small_learn = f"batch-size = {fitting}\n"
        if images < 1024:
            small_linear = f"batch-size = {max(fitting, 2)}\n"
    text = TEMPLATE.format(
        data=_quoted(options.data),
        images=images,
        encoder=_quoted(options.encoder),
        learner=_quoted(work / "learner"),
        parts=_quoted(work / "parts"),
        run=_quoted(work / "run"),
        results=_quoted(work / "results"),
        part_picture=_quoted(work / "parts.png"),
        mask_picture=_quoted(work / "masks.png"),
        batch=batch,
        small_learn=small_learn,
        small_linear=small_linear,
    )
    write_atomically(options.output, text.encode())
    return options.output
