from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from semmae.errors import SettingError
from semmae.models.encoders import FrozenEncoder, untrained
from semmae.models.readings import DEFAULT_READING, Facet, Reading
from semmae.models.vision import normalise

WIDTH, HEADS, DEPTH = 48, 3, 3
SHAPES: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg"},
    {"qk_norm": True, "qkv_bias": False},
]
FACETS: list[Facet] = ["tokens", "keys", "queries", "values"]


def frozen(reading: Reading = DEFAULT_READING, **changes: Any) -> FrozenEncoder:
    """A tiny encoder with every tensor away from where it starts."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **changes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return FrozenEncoder(model, name="tiny", reading=reading)


def random_images(size: tuple[int, int] = (24, 40)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, *size, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def by_hand(encoder: FrozenEncoder, images: Tensor, block: int, kind: Facet) -> Tensor:
    """Patch features of one block (from 1), walking through the network, head by head."""
    model = encoder.transformer
    after = model.patch_embed(normalise(images, encoder.mean, encoder.std))
    after = before = model.norm_pre(model._pos_embed(after))
    for layer in model.blocks[:block]:
        before, after = after, layer(after)
    if kind == "tokens":
        return model.fc_norm(model.norm(after))[:, model.num_prefix_tokens :]  # type: ignore[no-any-return]
    layer = model.blocks[block - 1]
    start, heads = ["queries", "keys", "values"].index(kind) * WIDTH, []
    for first in range(start, start + WIDTH, WIDTH // HEADS):
        rows = slice(first, first + WIDTH // HEADS)
        head = F.linear(layer.norm1(before), layer.attn.qkv.weight[rows])
        if layer.attn.qkv.bias is not None:
            head = head + layer.attn.qkv.bias[rows]
        if kind != "values":
            head = (layer.attn.q_norm if kind == "queries" else layer.attn.k_norm)(head)
        heads.append(head)
    return torch.cat(heads, dim=2)[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("blocks", [(-1,), (1,), (2, 3), (-1, 1)], ids=str)
@pytest.mark.parametrize("kind", FACETS)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_reading__is_that_of_a_walk_through_the_network(
    changes: dict[str, Any], kind: Facet, blocks: tuple[int, ...]
) -> None:
    encoder, images = frozen(Reading(blocks, kind), **changes), random_images()
    numbers = [block if block > 0 else DEPTH + 1 + block for block in blocks]
    expected = [by_hand(encoder, images, number, kind) for number in numbers]
    patches = encoder(images).patches
    assert patches.shape == (2, 15, encoder.patch_width)
    torch.testing.assert_close(patches, torch.cat(expected, dim=2), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES[:3], ids=str)
def test_reading__tokens_are_those_of_get_intermediate_layers(changes: dict[str, Any]) -> None:
    encoder, images = frozen(Reading((1, 2, 3)), **changes), random_images()
    pixels = normalise(images, encoder.mean, encoder.std)
    layers = encoder.transformer.get_intermediate_layers(pixels, [0, 1, 2], norm=True)
    torch.testing.assert_close(encoder(images).patches, torch.cat(layers, dim=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reading", [Reading((1,)), Reading((2, -1), "values")], ids=str)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_reading__leaves_class_token_and_attention_alone(
    changes: dict[str, Any], reading: Reading
) -> None:
    images = random_images()
    plain, read = frozen(**changes)(images), frozen(reading, **changes)(images)
    assert read.class_token.shape == (2, WIDTH)
    assert torch.equal(read.class_token, plain.class_token)
    assert torch.equal(read.attention, plain.attention)
    assert not torch.allclose(read.patches[..., :WIDTH], plain.patches, atol=1e-2)


@pytest.mark.parametrize("reading", [Reading(), Reading((1, 2), "keys")], ids=str)
@pytest.mark.parametrize("changes", [*SHAPES[:3], SHAPES[5]], ids=str)
def test_reading__pooled_is_the_mean_of_the_last_blocks_patches(
    changes: dict[str, Any], reading: Reading
) -> None:
    images = random_images()
    plain = frozen(**changes)(images)
    pooled = frozen(Reading(reading.blocks, reading.kind, pooled=True), **changes)(images)
    torch.testing.assert_close(pooled.class_token, plain.patches.mean(dim=1))
    assert torch.equal(pooled.attention, plain.attention)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES[3:5], ids=str)
def test_encoder__norm_behind_the_pooling_is_the_final_norm(changes: dict[str, Any]) -> None:
    encoder, images = frozen(Reading(pooled=True), **changes), random_images()
    expected = encoder.transformer(normalise(images, encoder.mean, encoder.std))
    tokens = encoder(images)
    torch.testing.assert_close(tokens.class_token, expected, rtol=0, atol=1e-5)
    norm = encoder.transformer.fc_norm
    unscaled = (tokens.patches - norm.bias) / norm.weight
    torch.testing.assert_close(unscaled.mean(dim=2), torch.zeros(2, 15), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        unscaled.std(dim=2, correction=0), torch.ones(2, 15), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("kind", FACETS)
def test_reading__facets_keep_no_more_memory_than_they_need(kind: Facet) -> None:
    patches = frozen(Reading(kind=kind))(random_images()).patches
    with_class_token = 2 * (15 + 1) * WIDTH * patches.element_size()
    assert patches.untyped_storage().nbytes() <= with_class_token


def test_reading__leaves_no_hook_behind_when_the_network_fails() -> None:
    encoder = frozen(Reading((1, -1), "keys"))
    with pytest.raises(AssertionError):
        encoder(random_images((30, 30)))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())


@pytest.mark.parametrize("blocks", [(4,), (-4,), (1, 9)], ids=str)
def test_reading__blocks_that_are_not_there_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"3 blocks: expected 1 to 3, or -3 to -1"):
        frozen(Reading(blocks))


@pytest.mark.parametrize("blocks", [(3, -1), (2, 2)], ids=str)
def test_reading__a_block_named_twice_is_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="twice"):
        frozen(Reading(blocks))


@pytest.mark.parametrize("blocks", [(), (0,), (-1, 0)], ids=str)
def test_reading__no_block_and_block_0_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="numbered from 1"):
        Reading(blocks)


def test_reading__an_unknown_facet_is_refused() -> None:
    with pytest.raises(SettingError, match="tokens, keys, queries, values"):
        Reading(kind="heads")  # type: ignore[arg-type]


def test_untrained__is_read_the_same_way() -> None:
    reading = Reading((2, 3), "keys", pooled=True)
    encoder = frozen(reading)
    fresh = untrained(encoder, 0)
    assert fresh.reading == reading
    assert fresh(random_images()).patches.shape == encoder(random_images()).patches.shape
