import pytest
import torch

from semmae.models.decoder import AdaIN, PixelDecoder, StyledLayer


@torch.no_grad()
def test_adain__gives_each_channel_the_styles_mean_and_deviation() -> None:
    torch.manual_seed(0)
    layer = AdaIN(5, 8)
    features, style = 3 + 7 * torch.randn(2, 5, 6, 9), torch.randn(2, 8)
    styled = layer(features, style)
    scale, shift = layer.style(style).chunk(2, dim=1)
    torch.testing.assert_close(styled.mean(dim=(2, 3)), shift, rtol=0, atol=1e-5)
    deviation = styled.std(dim=(2, 3), correction=0)
    torch.testing.assert_close(deviation, (1 + scale).abs(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_adain__forgets_the_features_own_scale_in_evaluation_too() -> None:
    torch.manual_seed(0)
    layer, style = AdaIN(5, 8).eval(), torch.randn(2, 8)
    features = torch.randn(2, 5, 6, 9)
    torch.testing.assert_close(
        layer(features, style), layer(10 * features - 4, style), rtol=0, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
@pytest.mark.parametrize("upsamplings", [0, 1, 2, 4])
def test_pixel_decoder__doubles_the_grid(grid: tuple[int, int], upsamplings: int) -> None:
    decoder = PixelDecoder(7, 8, width=16, upsamplings=upsamplings)
    images = decoder(torch.rand(2, 7, *grid).softmax(dim=1), torch.randn(2, 8))
    assert images.shape == (2, 3, grid[0] * 2**upsamplings, grid[1] * 2**upsamplings)


@torch.no_grad()
def test_pixel_decoder__depends_on_maps_and_style_of_its_own_image() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(7, 8, width=16)
    maps, style = torch.rand(2, 7, 4, 4), torch.randn(2, 8)
    before = decoder(maps, style)
    maps[0, 3, 1, 2] += 1
    after = decoder(maps, style)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    torch.testing.assert_close(before[1], after[1])
    style[1] += 1
    last = decoder(maps, style)
    torch.testing.assert_close(last[0], after[0])
    assert not torch.allclose(last[1], after[1], atol=1e-3)


@torch.no_grad()
def test_noise__is_in_training_only() -> None:
    torch.manual_seed(0)
    layer = StyledLayer(7, 16, 8, noise=True)
    assert layer.noise is not None
    layer.noise.fill_(1.0)
    maps, style = torch.rand(2, 7, 4, 4), torch.randn(2, 8)
    assert not torch.equal(layer(maps, style), layer(maps, style))
    layer.eval()
    assert torch.equal(layer(maps, style), layer(maps, style))


def test_noise__is_absent_unless_asked_for() -> None:
    assert not [n for n, _ in PixelDecoder(7, 8).named_parameters() if "noise" in n]
    assert [n for n, _ in PixelDecoder(7, 8, noise=True).named_parameters() if "noise" in n]


def test_pixel_decoder__learns_an_image_from_its_maps() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(3, 8, width=16)
    maps = torch.eye(3)[torch.randint(0, 3, (2, 6, 6))].permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(maps, scale_factor=4.0)
    style = torch.randn(2, 8)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (decoder(maps, style) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
