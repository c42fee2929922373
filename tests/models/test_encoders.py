from functools import partial
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from semmae.errors import MissingError, SettingError
from semmae.models.encoders import FrozenEncoder, Tokens, timm_encoder, untrained
from semmae.models.readings import Facet, Reading
from semmae.models.vision import normalise, sincos_positions

HEADS = 3
REGISTERS: dict[str, Any] = {"reg_tokens": 2, "no_embed_class": True}
NO_CLASS: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize(
    ("patches", "sizes"),
    [(1, [128, 22]), (576, [128, 22]), (784, [69, 69, 12]), (4096, [2] * 75), (10**4, [1] * 150)],
)
def test_tokens__are_split_into_fewer_images_of_finer_grids(patches: int, sizes: list[int]) -> None:
    images = torch.arange(150.0)
    tokens = Tokens(images[:, None], images[:, None, None].expand(-1, patches, 1), images)
    split = list(tokens.split())
    assert [len(some.patches) for some in split] == sizes
    assert torch.equal(torch.cat([some.attention for some in split]), images)


def frozen(seed: int = 0, **changes: Any) -> FrozenEncoder:
    """A tiny encoder with every tensor away from where it starts."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": HEADS,
        "num_classes": 0,
        "dynamic_img_size": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    model = VisionTransformer(**{**shape, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return FrozenEncoder(model, name="tiny")


def random_images(size: tuple[int, int] = (32, 32), count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, *size, 3), generator=generator, dtype=torch.uint8)


def plain_attention(encoder: FrozenEncoder, images: Tensor) -> Tensor:
    """The softmax of the last block's attention (B, A, N, N), hooked out of timm's plain code."""
    seen: list[Tensor] = []
    layer = encoder.transformer.blocks[-1].attn
    layer.fused_attn = False
    hook = layer.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        encoder.transformer.forward_features(normalise(images, encoder.mean, encoder.std))
    hook.remove()
    layer.fused_attn = True
    return seen[0]


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("changes", [{}, REGISTERS, {"qk_norm": True}], ids=str)
def test_attention__is_that_of_timms_plain_code(
    changes: dict[str, Any], size: tuple[int, int]
) -> None:
    encoder, images = frozen(**changes), random_images(size)
    whole = plain_attention(encoder, images)[:, :, 0]
    prefix = encoder.transformer.num_prefix_tokens
    attention = encoder(images).attention
    assert attention.shape == (2, HEADS, size[0] * size[1] // 64)
    torch.testing.assert_close(attention, whole[..., prefix:], rtol=0, atol=1e-6)
    over_all = attention.sum(dim=2) + whole[..., :prefix].sum(dim=2)
    torch.testing.assert_close(over_all, torch.ones(2, HEADS), rtol=0, atol=1e-5)
    assert (attention.sum(dim=2) < 1).all()


def test_encoder__stays_in_evaluation_mode() -> None:
    encoder = frozen(proj_drop_rate=0.5, drop_path_rate=0.5).train()
    outer = nn.Sequential(encoder)
    outer.train()
    assert not any(module.training for module in encoder.modules())
    images = random_images()
    assert torch.equal(encoder(images).patches, encoder(images).patches)


def test_encoder__has_no_gradients_and_keeps_no_hooks() -> None:
    encoder = frozen()
    tokens = encoder(random_images())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(t.requires_grad for t in (tokens.class_token, tokens.patches, tokens.attention))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_features__send_gradients_to_the_pixels_alone(kind: Facet) -> None:
    plain, images = frozen(), random_images()
    encoder = FrozenEncoder(plain.transformer, reading=Reading((1, -1), kind))
    pixels = normalise(images, encoder.mean, encoder.std).requires_grad_()
    tokens = encoder.features(pixels)
    for name in ("class_token", "patches", "attention"):
        assert torch.allclose(getattr(tokens, name), getattr(encoder(images), name), atol=1e-6)
    tokens.patches.square().mean().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (16, 40), (40, 16)])
def test_encoder__resamples_positions_for_other_sizes(size: tuple[int, int]) -> None:
    encoder, images = frozen(), random_images(size)
    grid = [size[0] // 8, size[1] // 8]
    resampled = resample_abs_pos_embed(encoder.transformer.pos_embed, grid)
    fixed = frozen(img_size=size).transformer
    weights = {**encoder.transformer.state_dict(), "pos_embed": resampled}
    fixed.load_state_dict(weights)
    expected = fixed.forward_features(normalise(images, encoder.mean, encoder.std))
    tokens = encoder(images)
    torch.testing.assert_close(tokens.class_token, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], rtol=0, atol=1e-5)
    assert encoder.native_size == (32, 32)


@pytest.mark.parametrize(
    ("size", "grid"), [((224, 224), (14, 14)), ((448, 448), (28, 28)), ((224, 320), (14, 20))]
)
def test_encoder__grid_follows_the_image_row_by_row(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    encoder, images = frozen(img_size=224, patch_size=16, depth=1), random_images(size, 1)
    before = encoder(images)
    assert before.patches.shape == (1, grid[0] * grid[1], 48)
    assert before.attention.shape == (1, HEADS, grid[0] * grid[1])
    row, column = grid[0] - 3, grid[1] - 2
    images[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 0
    moved = (encoder(images).patches - before.patches).abs().sum(dim=2)
    assert int(moved.argmax()) == row * grid[1] + column


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (224, 322), (70, 70)])
def test_encoder__takes_registers_and_patches_of_14(size: tuple[int, int]) -> None:
    shape = {**REGISTERS, "reg_tokens": 4, "patch_size": 14, "init_values": 1e-5}
    encoder, images = frozen(img_size=70, **shape), random_images(size, 1)
    tokens = encoder(images)
    count = size[0] // 14 * (size[1] // 14)
    assert tokens.patches.shape == (1, count, 48)
    assert tokens.attention.shape == (1, HEADS, count)
    expected = encoder.transformer.forward_features(normalise(images, encoder.mean, encoder.std))
    torch.testing.assert_close(tokens.class_token, expected[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.patches, expected[:, 5:], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, REGISTERS, NO_CLASS], ids=str)
def test_encoder__native_size_needs_no_resampling(changes: dict[str, Any]) -> None:
    encoder, images = frozen(**changes), random_images()
    fixed = frozen(**changes, dynamic_img_size=False).transformer
    expected = fixed.forward_features(normalise(images, encoder.mean, encoder.std))
    assert torch.equal(encoder(images).patches, expected[:, fixed.num_prefix_tokens :])


@pytest.mark.parametrize("kind", ["tokens", "keys"])
@pytest.mark.parametrize("changes", [{}, REGISTERS, NO_CLASS], ids=str)
def test_encoder__bfloat16_stays_near_float32(changes: dict[str, Any], kind: Facet) -> None:
    encoder, images = frozen(**changes), random_images(count=8)
    encoder = FrozenEncoder(encoder.transformer, reading=Reading(kind=kind))
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        near = encoder(images)
    for name in ("class_token", "patches", "attention"):
        true, found = getattr(exact, name), getattr(near, name).float()
        error = (found - true).norm() / true.norm()
        # Measured: 0.3 to 1.3 %, where one rounding to 8 bits is 0.2 %.
        assert error < 0.03, name
        assert error > 0 or encoder.transformer.cls_token is None, name


def test_encoder__pools_where_there_is_no_class_token() -> None:
    encoder = frozen(**NO_CLASS)
    tokens = encoder(random_images((32, 48)))
    torch.testing.assert_close(tokens.class_token, tokens.patches.mean(dim=1))
    torch.testing.assert_close(tokens.attention, torch.full((2, HEADS, 24), 1 / 24))


def test_encoder__tells_its_shape() -> None:
    encoder = frozen(img_size=(32, 48))
    shape = (encoder.width, encoder.heads, encoder.patch_size, encoder.native_size)
    assert shape == (48, HEADS, 8, (32, 48))
    assert encoder.patch_width == 48


def test_timm_encoder__is_timms_network() -> None:
    torch.manual_seed(0)
    encoder = timm_encoder("test_vit", pretrained=False)
    config = timm.get_pretrained_cfg("test_vit")
    assert encoder.mean.tolist() == pytest.approx(config.mean)
    assert encoder.name == "timm:test_vit"
    images = random_images((160, 160), 1)
    expected = encoder.transformer(normalise(images, encoder.mean, encoder.std))
    torch.testing.assert_close(encoder(images).class_token, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("zzz", "timm.list_models"),
        ("vit_small_patch16_224.nonsense", "vit_small_patch16_224.dino"),
        ("test_resnet", "vit_small_patch16_224.dino"),
        ("test_vit_relpos", "no plain vision transformer"),
    ],
)
def test_timm_encoder__refuses_what_is_no_vision_transformer(name: str, told: str) -> None:
    with pytest.raises(SettingError) as caught:
        timm_encoder(name, pretrained=False)
    message = str(caught.value)
    assert name in message
    assert told in message
    assert "\n" not in message
    assert "Error" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("not in the cache and the hub is out of reach"),
        OfflineModeIsEnabled("offline"),
        ConnectionError("no route"),
        OSError("disk"),
        TimeoutError("slow"),
        RuntimeError("the hub said no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_timm_encoder__says_that_weights_cannot_be_had(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(MissingError) as caught:
        timm_encoder("vit_small_patch16_224.dino")
    assert "timm:vit_small_patch16_224.dino" in str(caught.value)
    assert type(error).__name__ in str(caught.value)


@pytest.mark.parametrize("changes", [{}, REGISTERS, NO_CLASS, {"init_values": 1e-5}], ids=str)
def test_untrained__has_the_shapes_but_no_weight_of_the_trained(changes: dict[str, Any]) -> None:
    encoder = frozen(**changes)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fresh = untrained(encoder, 0)
    ours, theirs = encoder.state_dict(), fresh.state_dict()
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert [name for name in ours if torch.equal(ours[name], theirs[name])] == []
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.items())
    assert not {t.data_ptr() for t in ours.values()} & {t.data_ptr() for t in theirs.values()}
    assert torch.equal(fresh.mean, encoder.mean)
    assert fresh.name == "untrained tiny"


def test_untrained__follows_its_seed_alone() -> None:
    encoder = frozen()
    torch.manual_seed(1)
    first = untrained(encoder, 7).state_dict()
    untouched = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(untouched, torch.rand(3))
    again = untrained(frozen(4), 7).state_dict()
    other = untrained(encoder, 8).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if tensor.std() > 0]
    assert len(drawn) > 8
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("changes", [{}, NO_CLASS], ids=str)
def test_untrained__keeps_fixed_positions(changes: dict[str, Any]) -> None:
    encoder = frozen(**changes)
    positions = encoder.transformer.pos_embed
    fixed = sincos_positions(48, (4, 4))[:, -positions.shape[1] :]
    positions.data.copy_(fixed)
    assert torch.equal(untrained(encoder, 0).transformer.pos_embed, fixed)


def test_untrained__runs_beside_the_trained() -> None:
    encoder, images = frozen(), random_images()
    before = encoder(images)
    fresh = untrained(encoder, 0)
    assert not torch.allclose(fresh(images).patches, before.patches, atol=1e-2)
    assert torch.equal(encoder(images).attention, before.attention)
