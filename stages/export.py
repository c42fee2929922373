"""`semmae export`: checkpoints as timm and MAE's own code load them.

    OUTPUT/model.safetensors    timm: the encoder's weights, by timm's names
    OUTPUT/config.json          its shape and preprocessing; written last

    OUTPUT.pth                  mae: {"model": encoder and decoder by MAE's names, "epoch": int}

Nothing that is there already is replaced.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from torch import Tensor, nn

from ..errors import SettingError
from ..models.autoencoder import SIZES, MaskedAutoencoder
from ..models.encoders import FrozenEncoder
from ..models.warm_start import take_decoder, take_encoder
from ..storage.checkpoints import weight_file
from ..storage.files import write_atomically
from .networks import Weights, encoder_file, image_size_of, open_encoder, open_start

GlobalPool = Literal["token", "avg"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The files of timm's layout of a local model."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Settings of `export`."""

    checkpoint: Annotated[str, "What to export: the folder of a run, or a weight file."]
    output: Annotated[Path, "timm: folder to write; mae: file to write, *.pth or *.pt."]
    format: Annotated[
        Literal["timm", "mae"],
        "timm: the encoder, for timm.create_model; mae: encoder and decoder, as MAE's training "
        "files hold them.",
    ] = "timm"
    weights: Annotated[
        Weights, "Of a run: trained: those of its last step; ema: their average, if it kept one."
    ] = "trained"
    image_size: Annotated[
        str,
        "Pixels that positions are made for, 224 or 224x320 (height x width); 0: the checkpoint's.",
    ] = "0"
    global_pool: Annotated[
        GlobalPool | None,
        "timm: sum up an image by the class token or the mean patch token; by default as the "
        "encoder was trained.",
    ] = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SettingError: Format, output and pooling contradict each other.
        """
        if self.format == "timm":
            if self.output.is_file():
                raise SettingError(f"{self.output} is a file: name a folder as --output")
            return
        if self.global_pool is not None:
            raise SettingError("--global-pool belongs to --format timm: MAE's files do not say it")
        if self.output.suffix not in (".pth", ".pt") or self.output.is_dir():
            raise SettingError(
                f"--output is {self.output}: expected a file such as mae.pth for --format mae"
            )


def export(options: ExportOptions) -> str:
    """Write a checkpoint in another layout; returns what was written and how to load it.

    Raises:
        SettingError: The checkpoint holds no network of that layout, or the output holds something
            else, which is not replaced.
        MissingError: There is no such checkpoint.
        DamageError: It cannot be read.
    """
    return _export_timm(options) if options.format == "timm" else _export_mae(options)


def _export_timm(options: ExportOptions) -> str:
    """Positions for another size are resampled, as the encoder itself does for such images."""
    encoder = open_encoder(options.checkpoint, weights=options.weights)
    if encoder.timm:
        raise SettingError(
            f"{options.checkpoint} is timm's own {encoder.timm.name}: create_model makes it already"
        )
    size = image_size_of(options.image_size, encoder.native_size, encoder.patch_size)
    encoder.transformer.set_input_size(size)
    config = timm_config(encoder, options.global_pool)
    held = [entry.name for entry in options.output.glob("*") if not entry.name.startswith(".")]
    if held and not {WEIGHTS, CONFIG} & {*held}:
        raise SettingError(
            f"{options.output} is not empty ({', '.join(sorted(held)[:3])}...): name a new or "
            "empty folder as --output"
        )
    _write_new(
        {
            options.output / WEIGHTS: encoder_file(encoder),
            options.output / CONFIG: json.dumps(config, indent=2).encode() + b"\n",
        }
    )
    return (
        f"wrote {options.output}: "
        f'timm.create_model("local-dir:{options.output}", pretrained=True) makes it'
    )


def timm_config(encoder: FrozenEncoder, pooling: GlobalPool | None) -> dict[str, Any]:
    """The ``config.json`` by which timm builds a network and loads the encoder strictly.

    Args:
        encoder: A transformer as `transformer_of` builds it.
        pooling: What timm is to pool; None as the encoder was trained.

    Raises:
        SettingError: The encoder's class token was never trained, and is asked for.
    """
    model, pooling = encoder.transformer, pooling or ("avg" if encoder.pools else "token")
    if pooling == "token" and encoder.pools:
        raise SettingError(
            f"--global-pool is token, and {encoder.name} sums images up by their mean patch token: "
            "drop the flag, or take avg"
        )
    height, width = encoder.native_size
    block = model.blocks[0]
    hidden = block.mlp.fc1.out_features
    ratio = hidden / encoder.width
    if int(encoder.width * ratio) != hidden:  # timm cuts the product to an integer
        ratio = (hidden + 0.5) / encoder.width
    shape = {
        "img_size": [height, width],
        "patch_size": encoder.patch_size,
        "embed_dim": encoder.width,
        "depth": len(model.blocks),
        "num_heads": encoder.heads,
        "mlp_ratio": ratio,
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "global_pool": pooling,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }
    return {
        "architecture": _architecture(encoder),
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": pooling,
        "model_args": shape,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": [round(value, 6) for value in encoder.mean.tolist()],
            "std": [round(value, 6) for value in encoder.std.tolist()],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _architecture(encoder: FrozenEncoder) -> str:
    """The network of timm nearest to an encoder: what differs stands in its ``model_args``."""
    blocks = encoder.transformer.blocks
    if blocks[0].mlp.fc1.out_features == 2 * blocks[0].mlp.fc2.in_features:
        return "vit_giant_patch14_dinov2"  # gated, which no argument in a file can say
    shape = (encoder.width, len(blocks), encoder.heads)
    for size, named in SIZES.items():
        name = f"vit_{size}_patch{encoder.patch_size}_224"
        if shape == (named["width"], named["depth"], named["heads"]) and timm.is_model(name):
            return name
    return "vit_base_patch16_224"


def _export_mae(options: ExportOptions) -> str:
    """Positions for another size are sine-cosine ones, as of a network made for it."""
    start = open_start(options.checkpoint, options.weights)
    if not start.decoder:
        raise SettingError(
            f"{options.checkpoint} holds no decoder: expected a run of `semmae stage2 pretrain` or "
            "a training file of MAE; --format timm takes an encoder alone"
        )
    shape = start.architecture()
    size = image_size_of(options.image_size, shape.image_size, shape.patch_size)
    shape = replace(shape, image_size=size)
    model = MaskedAutoencoder(shape)
    take_encoder(model, start)
    taken, fresh = take_decoder(model, start)
    if not taken:
        raise SettingError(f"{options.checkpoint} has no decoder of MAE's kind: {fresh}")
    content = {"model": mae_weights(model), "epoch": start.epoch, "architecture": shape.to_record()}
    # No "optimizer": MAE's code would resume from it, and an empty one breaks that.
    _write_new({options.output: weight_file(content)})
    return (
        f'wrote {options.output}: MAE\'s code loads its "model"; --start and --checkpoint take it'
    )


def mae_weights(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The tensors of a masked autoencoder by MAE's names, the decoder's positions among them."""
    weights = {name.removeprefix("encoder."): t for name, t in model.state_dict().items()}
    return {**weights, "decoder_pos_embed": model.decoder_pos_embed}


def _write_new(files: Mapping[Path, bytes]) -> None:
    """Write files in order; those that are there with just this content stay.

    Raises:
        SettingError: One is there with another content; then nothing is written.
    """
    for path, data in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != data):
            raise SettingError(
                f"{path} is there and is not this export: remove it, or choose another --output"
            )
    for path, data in files.items():
        if not path.exists():
            write_atomically(path, data)
