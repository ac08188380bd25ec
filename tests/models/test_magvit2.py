import copy
import json

import pytest
import torch

from xq.models import MAGVIT2Decoder, MAGVIT2Encoder
from xq.models.magvit2 import AdaptiveNorm, DepthToSpace

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1}


@pytest.mark.parametrize(
    ("sizes", "image", "grid"),
    [
        pytest.param({}, (2, 3, 8, 12), (4, 6), id="B2-H8-W12"),
        pytest.param({"multipliers": (1,)}, (1, 3, 5, 7), (5, 7), id="one-level-H5-W7"),
        pytest.param({"multipliers": (2, 1, 3)}, (2, 3, 8, 4), (2, 1), id="three-levels"),
        pytest.param({"image_channels": 1}, (2, 1, 6, 6), (3, 3), id="grey"),
        pytest.param({"blocks": 3}, (1, 3, 4, 4), (2, 2), id="3-blocks"),
    ],
)
def test_shapes(sizes, image, grid):
    encoder, decoder = MAGVIT2Encoder(5, **SMALL | sizes), MAGVIT2Decoder(5, **SMALL | sizes)
    tokens = encoder(torch.randn(image))
    assert tokens.shape == (image[0], *grid, 5)
    assert decoder(tokens).shape == image
    assert encoder.stride == decoder.stride == image[2] // grid[0]


def test_empty_batch():
    encoder, decoder = MAGVIT2Encoder(5, **SMALL), MAGVIT2Decoder(5, **SMALL)
    assert decoder(encoder(torch.randn(0, 3, 4, 4))).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("cls", [MAGVIT2Encoder, MAGVIT2Decoder])
def test_config_round_trip(cls):
    module = cls(5, channels=8, multipliers=(1, 3), blocks=3, image_channels=2)
    config = module.config()
    again = cls(**json.loads(json.dumps(config)))
    assert again.config() == config
    assert [p.shape for p in again.parameters()] == [p.shape for p in module.parameters()]


@pytest.mark.parametrize("cls", [MAGVIT2Encoder, MAGVIT2Decoder])
def test_deepcopy_computes_the_same(cls):
    module = cls(5, **SMALL)
    x = torch.randn((1, 3, 4, 4) if cls is MAGVIT2Encoder else (1, 2, 2, 5))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_every_parameter_learns():
    encoder, decoder = MAGVIT2Encoder(5, **SMALL), MAGVIT2Decoder(5, **SMALL)
    images = torch.randn(2, 3, 8, 8)
    decoder(encoder(images)).square().mean().backward()
    for module in (encoder, decoder):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().sum() > 0, key


def test_last_layer_is_the_last_convolution():
    decoder = MAGVIT2Decoder(5, **SMALL)
    assert decoder.last_layer is decoder.conv_out.weight


def test_a_token_moves_pixels_far_away():
    decoder = MAGVIT2Decoder(5, channels=8, multipliers=(1, 1), blocks=1)
    tokens = torch.randn(1, 32, 32, 5)
    moved = tokens.clone()
    moved[0, 0, 0] += 1
    # only by way of the statistics: no convolution reaches that far
    assert (decoder(tokens) - decoder(moved))[0, :, -8:, -8:].abs().max() > 0


def test_adaptive_norm_has_the_statistics_of_the_style():
    adaptive = AdaptiveNorm(3, 4)
    with torch.no_grad():
        adaptive.gamma.weight.copy_(torch.eye(4, 3))
        adaptive.beta.weight.copy_(torch.eye(4, 3))
        for linear in (adaptive.gamma, adaptive.beta):
            linear.bias.zero_()
    # four channels are normalized one by one, the fourth gets scale and shift zero
    style, x = torch.randn(2, 3, 3, 5) * 2 + 1, torch.randn(2, 4, 6, 7)
    y = adaptive(x, style)
    torch.testing.assert_close(y[:, :3].mean((2, 3)), style.mean((2, 3)), atol=1e-5, rtol=0)
    deviation = y[:, :3].flatten(2).std(-1, unbiased=False)
    torch.testing.assert_close(deviation, style.flatten(2).std(-1), atol=1e-4, rtol=0)
    assert not y[:, 3].any()


def test_constant_style_has_no_infinite_gradient():
    adaptive, style = AdaptiveNorm(3, 4), torch.ones(1, 3, 2, 2, requires_grad=True)
    adaptive(torch.randn(1, 4, 2, 2), style).square().sum().backward()
    assert style.grad is not None
    assert style.grad.isfinite().all()


def test_depth_becomes_space():
    upsample = DepthToSpace(2)
    x = torch.randn(1, 2, 3, 4)
    depth, made = upsample.conv(x), upsample(x)
    for channel in range(2):
        for pixel in range(4):
            row, column = divmod(pixel, 2)
            assert torch.equal(made[:, channel, row::2, column::2], depth[:, 4 * channel + pixel])


def test_images_whose_size_the_stride_does_not_divide():
    with pytest.raises(ValueError, match=r"MAGVIT2Encoder needs .* its stride 2, got \(8, 5\)"):
        MAGVIT2Encoder(5, **SMALL)(torch.zeros(1, 3, 8, 5))


def test_channel_first_tokens():
    with pytest.raises(ValueError, match=r"MAGVIT2Decoder expects channel-last tokens .* \(1, 5,"):
        MAGVIT2Decoder(5, **SMALL)(torch.zeros(1, 5, 2, 2))


def test_a_single_token():
    message = r"MAGVIT2Decoder needs two tokens or more, .* got shape \(1, 1, 1, 5\); encode a"
    with pytest.raises(ValueError, match=message):
        MAGVIT2Decoder(5, **SMALL)(torch.zeros(1, 1, 1, 5))


@pytest.mark.parametrize("cls", [MAGVIT2Encoder, MAGVIT2Decoder])
@pytest.mark.parametrize("argument", ["dim", "channels", "blocks", "image_channels"])
@pytest.mark.parametrize("value", [0, -2])
def test_bad_sizes(cls, argument, value):
    message = f"{cls.__name__} needs `{argument}` to be a positive integer, got {value}"
    with pytest.raises(ValueError, match=message):
        cls(**{"dim": 5, argument: value})


@pytest.mark.parametrize("cls", [MAGVIT2Encoder, MAGVIT2Decoder])
def test_bad_multipliers(cls):
    message = rf"{cls.__name__} needs `multipliers` to be positive integers, .* got \(1, 0\)"
    with pytest.raises(ValueError, match=message):
        cls(5, multipliers=(1, 0))
