import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from semmae.benchmarks.pretraining_step import PlainAutoencoder
from semmae.errors import SettingError
from semmae.models.autoencoder import SIZES, Architecture, MaskedAutoencoder
from semmae.models.vision import IMAGENET_MEAN, IMAGENET_STD, normalise, patchify

PATCH = 8
VISIBLE = 5


def tiny(**changes: Any) -> Architecture:
    shape: dict[str, Any] = {
        "image_size": (32, 32),
        "patch_size": PATCH,
        "width": 48,
        "depth": 2,
        "heads": 4,
        "decoder_width": 32,
        "decoder_depth": 2,
        "decoder_heads": 4,
    }
    return Architecture(**{**shape, **changes})


def autoencoder(seed: int = 0, **changes: Any) -> MaskedAutoencoder:
    """A tiny one, all of whose parameters differ from where they start."""
    torch.manual_seed(seed)
    model = MaskedAutoencoder(tiny(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *size, 3), generator=generator, dtype=torch.uint8)


def random_mask(count: int, patches: int = 16, visible: int = VISIBLE, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, patches, generator=generator).argsort(dim=1)
    return torch.ones(count, patches, dtype=torch.bool).scatter(1, order[:, :visible], False)


def pixels_of(images: Tensor) -> Tensor:
    return normalise(images, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))


def slow_loss(model: MaskedAutoencoder, image: Tensor, mask: Tensor) -> float:
    """MAE's way for one image: the sequence is put back in order and decoded whole."""
    encoder, pixels = model.encoder, pixels_of(image[None])
    embedded = encoder.patch_embed(pixels)[0] + encoder.pos_embed[0, 1:]
    first = encoder.cls_token[0] + encoder.pos_embed[0, :1]
    visible = [place for place in range(len(mask)) if not mask[place]]
    tokens = torch.cat([first, embedded[visible]])[None]
    latent = encoder.norm(encoder.blocks(tokens))[0]
    sequence = model.mask_token[0].expand(len(mask), -1).clone()
    for place, token in zip(visible, model.decoder_embed(latent[1:]), strict=True):
        sequence[place] = token
    decoded = torch.cat([model.decoder_embed(latent[:1]), sequence])[None]
    decoded = decoded + model.decoder_pos_embed
    for block in model.decoder_blocks:
        decoded = block(decoded)
    predicted = model.decoder_pred(model.decoder_norm(decoded))[0, 1:]
    losses = []
    for place, patch in enumerate(patchify(pixels, PATCH)[0]):
        if mask[place]:
            mean = patch.sum() / len(patch)
            variance = ((patch - mean) ** 2).sum() / (len(patch) - 1)
            wanted = (patch - mean) / (variance + 1e-6) ** 0.5
            losses.append(((predicted[place] - wanted) ** 2).mean())
    return float(torch.stack(losses).mean())


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_encode__of_all_patches_is_timms_own_encoder(size: tuple[int, int]) -> None:
    model = autoencoder(image_size=size).eval()
    pixels = pixels_of(random_images(3, size))
    patches = patchify(pixels, PATCH)
    everything = torch.arange(patches.shape[1]).expand(3, -1)
    expected = model.encoder.forward_features(pixels)
    # Measured 0 on x86: a matrix product in place of a convolution may round otherwise.
    torch.testing.assert_close(model.encode(patches, everything), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_encode__takes_the_visible_of_the_full_embedding() -> None:
    model = autoencoder().eval()
    pixels, mask = pixels_of(random_images(3)), random_mask(3)
    order = mask.byte().argsort(dim=1, stable=True)
    embedded = model.encoder._pos_embed(model.encoder.patch_embed(pixels))
    rows = [torch.cat([row[:1], row[1:][~m]]) for row, m in zip(embedded, mask, strict=True)]
    expected = model.encoder.norm(model.encoder.blocks(torch.stack(rows)))
    encoded = model.encode(patchify(pixels, PATCH), order[:, :VISIBLE])
    torch.testing.assert_close(encoded, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_encode__gives_the_visible_in_the_order_asked_for() -> None:
    model = autoencoder().eval()
    patches = patchify(pixels_of(random_images(2)), PATCH)
    asked = torch.tensor([[3, 9, 0, 14]] * 2)
    forward, backward = model.encode(patches, asked), model.encode(patches, asked.flip(1))
    torch.testing.assert_close(forward[:, 1:], backward[:, 1:].flip(1), rtol=0, atol=2e-5)
    torch.testing.assert_close(forward[:, 0], backward[:, 0], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 64)])
def test_loss__is_that_of_the_plain_formulas(size: tuple[int, int]) -> None:
    model = autoencoder(image_size=size).eval()
    images, mask = random_images(3, size), random_mask(3)
    losses = model(images, mask, VISIBLE)
    assert losses.dtype == torch.float32
    expected = [slow_loss(model, *pair) for pair in zip(images, mask, strict=True)]
    # Measured 1e-7.
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loss__of_plain_pixels_is_their_squared_error() -> None:
    model = autoencoder().eval()
    model.normalise_target = False
    images, mask = random_images(2), random_mask(2)
    order = mask.byte().argsort(dim=1, stable=True)
    patches = patchify(pixels_of(images), PATCH)
    predicted = model.decode(model.encode(patches, order[:, :VISIBLE]), order, VISIBLE)
    for image, loss in enumerate(model(images, mask, VISIBLE)):
        wanted = patches[image][mask[image]]
        assert float(loss) == pytest.approx(float((predicted[image] - wanted).square().mean()))


@torch.no_grad()
def test_encode__never_sees_masked_patches() -> None:
    model = autoencoder().eval()
    images, mask = random_images(2), random_mask(2)
    order = mask.byte().argsort(dim=1, stable=True)
    patches = patchify(pixels_of(images), PATCH)

    def predicted(seen: Tensor) -> Tensor:
        return model.decode(model.encode(seen, order[:, :VISIBLE]), order, VISIBLE)

    before = predicted(patches)
    assert torch.equal(before, predicted(patches.masked_fill(mask[..., None], float("nan"))))
    other = patches.clone()
    other[0, order[0, 0]] += 1
    after = predicted(other)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1])


@torch.no_grad()
def test_loss__does_not_mix_images() -> None:
    model = autoencoder().eval()
    images, mask = random_images(4), random_mask(4)
    together = model(images, mask, VISIBLE)
    turned = model(images.flip(0), mask.flip(0), VISIBLE).flip(0)
    torch.testing.assert_close(together, turned)
    torch.testing.assert_close(together[:1], model(images[:1], mask[:1], VISIBLE))


def test_loss__has_gradients_for_all_but_the_positions() -> None:
    model = autoencoder()
    model(random_images(2), random_mask(2), VISIBLE).sum().backward()
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without == {"encoder.pos_embed"}
    assert not model.encoder.pos_embed.requires_grad


def test_positions__are_no_part_of_decoder_checkpoints_but_of_the_encoders() -> None:
    names = set(autoencoder().state_dict())
    assert "encoder.pos_embed" in names
    assert not names & {"decoder_pos_embed", "mean", "std"}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("patch_size", [4, 8, 14, 16])
def test_sizes__fit_every_patch_size(name: str, patch_size: int) -> None:
    for rows, columns in ((14, 14), (3, 7)):
        size = (rows * patch_size, columns * patch_size)
        shape = Architecture(image_size=size, patch_size=patch_size, **SIZES[name])
        assert shape.grid == (rows, columns)
        assert Architecture.from_record(shape.to_record()) == shape
        assert shape.width % shape.heads == shape.decoder_width % shape.decoder_heads == 0


@pytest.mark.parametrize("patch_size", [4, 8, 14, 16])
def test_forward__takes_every_patch_size(patch_size: int) -> None:
    size = (2 * patch_size, 3 * patch_size)
    model = autoencoder(image_size=size, patch_size=patch_size)
    assert model(random_images(2, size), random_mask(2, 6, 2), 2).shape == (2,)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": (32, 36)}, ("32 x 36", "8")),
        ({"image_size": (0, 32)}, ("0 x 32", "8")),
        ({"patch_size": 0}, ("patch_size", "0")),
        ({"width": 50}, ("width", "50", "4")),
        ({"width": 48, "heads": 5}, ("width", "48", "5")),
        ({"decoder_width": 30}, ("decoder_width", "30", "4")),
        ({"heads": 0}, ("heads", "0")),
        ({"depth": 0}, ("depth", "0")),
    ],
)
def test_architecture__refuses_what_does_not_fit(
    changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    with pytest.raises(SettingError) as caught:
        tiny(**changes)
    assert all(word in str(caught.value) for word in told)


@pytest.mark.parametrize("normalise_target", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (64, 16)])
def test_reconstruct__leaves_visible_patches(size: tuple[int, int], normalise_target: bool) -> None:
    model = autoencoder(image_size=size).eval()
    model.normalise_target = normalise_target
    images, mask = random_images(2, size), random_mask(2)
    made = model.reconstruct(images, mask, VISIBLE)
    assert made.shape == (2, *size, 3)
    assert made.dtype == torch.float32
    assert 0 <= made.min() <= made.max() <= 1
    true, rebuilt = (patchify(pixels.permute(0, 3, 1, 2), PATCH) for pixels in (images / 255, made))
    torch.testing.assert_close(rebuilt[~mask], true[~mask], rtol=0, atol=1e-6)
    assert not torch.allclose(rebuilt[mask], true[mask], atol=0.05)


@torch.no_grad()
def test_reconstruct__of_a_perfect_prediction_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = autoencoder().eval()
    images, mask = random_images(2), random_mask(2)
    target = model.target(patchify(pixels_of(images), PATCH))
    perfect = target[mask].reshape(2, 16 - VISIBLE, -1)
    monkeypatch.setattr(model, "decode", lambda *_: perfect)
    assert model(images, mask, VISIBLE).max() == 0
    made = model.reconstruct(images, mask, VISIBLE)
    torch.testing.assert_close(made, images / 255, rtol=0, atol=1e-5)


def test_training__lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny(patch_size=16))
    ramp = torch.linspace(0, 255, 32)
    images = torch.stack(
        [ramp.expand(32, 32), ramp.flip(0).expand(32, 32), ramp[:, None].expand(32, 32)]
    )
    images = images[..., None].expand(-1, -1, -1, 3).byte()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = model(images, random_mask(3, 4, 2, seed=step), 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # Measured 0.01 of the start.
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]


def test_weights__follow_the_seed_and_survive_a_copy() -> None:
    first, second, other = autoencoder(3), autoencoder(3), autoencoder(4)
    images, mask = random_images(2), random_mask(2)
    assert torch.equal(first(images, mask, VISIBLE), second(images, mask, VISIBLE))
    assert not torch.equal(first(images, mask, VISIBLE), other(images, mask, VISIBLE))
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first(images, mask, VISIBLE), other(images, mask, VISIBLE))


@torch.no_grad()
def test_loss__in_bf16_stays_near_that_in_float32() -> None:
    model = autoencoder().eval()
    images, mask = random_images(2), random_mask(2)
    # Measured 5e-4.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images, mask, VISIBLE)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model(images, mask, VISIBLE), rtol=0.01, atol=0)


def full_decode(model: MaskedAutoencoder, tokens: Tensor, order: Tensor, visible: int) -> Tensor:
    """Every block on every token, cut after the last."""
    batch = len(order)
    masked = model.mask_token.expand(batch, order.shape[1] - visible, -1)
    places = model.decoder_pos_embed[:, 1:].expand(batch, -1, -1)
    places = places.gather(1, order[..., None].expand(-1, -1, places.shape[2]))
    first = model.decoder_pos_embed[:, :1].expand(batch, -1, -1)
    decoded = torch.cat([model.decoder_embed(tokens), masked], dim=1)
    decoded = decoded + torch.cat([first, places], dim=1)
    for block in model.decoder_blocks:
        decoded = block(decoded)
    predicted: Tensor = model.decoder_pred(model.decoder_norm(decoded))[:, 1 + visible :]
    return predicted


@pytest.mark.parametrize("fused", [True, False])
def test_decode__asks_the_last_block_only_of_masked_patches_with_equal_gradients(
    fused: bool,
) -> None:
    model = autoencoder().double()
    for block in model.decoder_blocks:
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    order = random_mask(3).byte().argsort(dim=1, stable=True)
    tokens = torch.randn(3, 1 + VISIBLE, 48, dtype=torch.float64)
    weights = torch.randn(3, 16 - VISIBLE, 3 * PATCH**2, dtype=torch.float64)
    found = []
    for decode in (MaskedAutoencoder.decode, full_decode):
        model.zero_grad()
        given = tokens.clone().requires_grad_()
        made = decode(model, given, order, VISIBLE)
        (made * weights).sum().backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([made, given.grad, *grads])
    assert len(found[0]) == len(found[1]) > 30
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-11)


def test_loss__takes_plain_attention_in_bfloat16_on_cpus() -> None:
    model = autoencoder()
    images, mask = random_images(2), random_mask(2)
    for half in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            model(images, mask, VISIBLE)
        blocks = [*model.encoder.blocks, *model.decoder_blocks]
        assert {block.attn.fused_attn for block in blocks} == {not half}


def drawn(images: int, predicted: int) -> Tensor:
    """Which masked patches are predicted."""
    return torch.rand(images, 16 - VISIBLE).argsort(dim=1)[:, :predicted]


def test_loss__of_fewer_predicted_patches_is_their_mean() -> None:
    model, images, mask = autoencoder(), random_images(400), random_mask(400)
    with torch.no_grad():
        whole = model(images, mask, VISIBLE)
        few = model(images, mask, VISIBLE, drawn(400, 4))
        torch.testing.assert_close(model(images, mask, VISIBLE, drawn(400, 16 - VISIBLE)), whole)
    assert not torch.equal(few, whole)
    # Each image's own differs, as the patches do and those that the decoder attends to; their mean
    # over many images does not.
    assert float(few.mean()) == pytest.approx(float(whole.mean()), rel=0.03)


def test_loss__with_blocks_computed_again_is_the_same_with_its_gradients() -> None:
    found = []
    for recomputes in (False, True):
        model = autoencoder()
        model.recomputes = recomputes
        loss = model(random_images(2), random_mask(2), VISIBLE)
        loss.sum().backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_loss__with_blocks_computed_again_keeps_less() -> None:
    kept = []
    for recomputes in (False, True):
        model = autoencoder()
        model.recomputes = recomputes
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_images(8), random_mask(8), VISIBLE)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_patch_losses__are_those_of_the_patches_that_they_name() -> None:
    model, images, mask = autoencoder().eval(), random_images(3), random_mask(3)
    losses, patches = model.patch_losses(images, mask, VISIBLE)
    assert torch.equal(losses.mean(dim=1), model(images, mask, VISIBLE))
    chosen = drawn(3, 4)
    few, named = model.patch_losses(images, mask, VISIBLE, chosen)
    assert torch.equal(named, patches.gather(1, chosen))
    assert few.shape == named.shape == (3, 4)
    for row in range(3):
        assert sorted(patches[row].tolist()) == mask[row].nonzero().flatten().tolist()
        assert set(named[row].tolist()) <= set(patches[row].tolist())
        assert len(set(named[row].tolist())) == 4
    # A change of one masked patch changes what is to be predicted there, and nowhere else.
    side = images.shape[1] // 4
    patch = int(patches[0, 2])
    changed = images.clone()
    top, left = patch // 4 * side, patch % 4 * side
    changed[0, top : top + side, left : left + side] ^= 255
    others, same_patches = model.patch_losses(changed, mask, VISIBLE)
    assert torch.equal(same_patches, patches)
    differs = (others - losses).abs() > 1e-6
    assert differs.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("normalise_target", [True, False])
def test_loss__has_the_gradients_of_the_plain_convolution_and_the_whole_decoder(
    normalise_target: bool,
) -> None:
    ours = autoencoder().double()
    ours.normalise_target = normalise_target
    plain = PlainAutoencoder(ours.architecture, normalise_target).double()
    plain.load_state_dict(ours.state_dict())
    images, mask = random_images(3), random_mask(3)
    found = []
    for model in (ours, plain):
        losses = model(images, mask, VISIBLE)
        (losses * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        found.append([losses, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) > 30
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
