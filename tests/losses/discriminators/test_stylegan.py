import copy
import json

import pytest
import torch
import torch.nn.functional as F
from discriminator_checks import golden_shapes, shapes

from xq.config import build, describe
from xq.losses import StyleGANDiscriminator
from xq.losses.discriminators.stylegan import binomial_blur


def naive_blur(x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, with indices that are reflected."""
    height, width = x.shape[2:]
    result = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for down, weight in ((-1, 1), (0, 2), (1, 1)):
                for right, other in ((-1, 1), (0, 2), (1, 1)):
                    r, c = abs(row + down), abs(column + right)
                    r, c = min(r, 2 * (height - 1) - r), min(c, 2 * (width - 1) - c)
                    result[:, :, row, column] += weight * other / 16 * x[:, :, r, c]
    return result


def naive(model: StyleGANDiscriminator, images: torch.Tensor) -> torch.Tensor:
    """Without modules."""
    state = dict(model.named_parameters())

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    x = leaky(conv(images, "blocks.0", padding=1))
    i = 2
    while x.shape[2] > 4:
        rest = conv(x[:, :, ::2, ::2], f"blocks.{i}.conv_res")
        x = leaky(conv(x, f"blocks.{i}.net.0", padding=1))
        x = naive_blur(leaky(conv(x, f"blocks.{i}.net.2", padding=1)))
        x = (conv(x, f"blocks.{i}.downsample.1", padding=1, stride=2) + rest) / 2**0.5
        i += 1
    x = leaky(conv(x, "final_conv.0", padding=1)).flatten(1)
    x = leaky(x @ state["final_linear.0.weight"].T + state["final_linear.0.bias"])
    return x @ state["final_linear.2.weight"].T + state["final_linear.2.bias"]


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (16, 3)])
def test_equals_the_naive_one(side, channels):
    model = StyleGANDiscriminator(side, image_channels=channels, max_channels=3).double()
    images = torch.randn(2, channels, side, side, dtype=torch.float64, requires_grad=True)
    actual, expected = model(images), naive(model, images)
    torch.testing.assert_close(actual, expected)
    wanted = [images, *model.parameters()]
    for got, right in zip(
        torch.autograd.grad(actual.sum(), wanted),
        torch.autograd.grad(expected.sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_blur_of_odd_sizes():
    x = torch.randn(2, 3, 5, 2)
    torch.testing.assert_close(binomial_blur(x), naive_blur(x))
    ones = torch.ones(1, 1, 7, 4)
    assert torch.equal(binomial_blur(ones), ones)


def test_defaults_are_the_original_ones():
    with torch.device("meta"):
        model = StyleGANDiscriminator()
        assert model(torch.empty(2, 3, 256, 256)).shape == (2, 1)
    assert sum(p.numel() for p in model.parameters()) == 36_500_225
    # the original has the three numbers of its blur there too
    assert shapes(model) == golden_shapes("stylegan.")


@pytest.mark.parametrize(("side", "widths"), [(64, [256, 512]), (1024, [16, 32, 64, 128, 256])])
def test_channels(side, widths):
    with torch.device("meta"):
        model = StyleGANDiscriminator(side)
    found = [block.conv_res.in_channels for block in model.blocks[2:]]
    assert found[: len(widths)] == widths
    assert set(found[len(widths) :]) == {512}


def test_starts_as_convolutions_do():
    model = StyleGANDiscriminator(32, max_channels=64)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            bound = fan_in**-0.5
            assert module.weight.abs().max() <= bound
            assert abs(module.weight.std().item() - bound / 3**0.5) < 0.1 * bound


@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_finite_at_extremes(scale):
    model = StyleGANDiscriminator(8, max_channels=4)
    images = torch.randn(2, 3, 8, 8).mul(scale).requires_grad_()
    logits = model(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert images.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradcheck():
    model = StyleGANDiscriminator(8, image_channels=1, max_channels=2).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (images,))
    # for R1
    assert torch.autograd.gradgradcheck(model, (images,))


def test_autocast():
    model = StyleGANDiscriminator(16, max_channels=8)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    torch.testing.assert_close(logits.float(), expected, atol=2e-2, rtol=0)
    logits.float().sum().backward()
    assert images.grad.isfinite().all()


def test_config_round_trip():
    model = StyleGANDiscriminator(16, image_channels=1, max_channels=8)
    again = build(json.loads(json.dumps(describe(model))))
    assert isinstance(again, StyleGANDiscriminator)
    assert again.config() == model.config()
    assert shapes(again) == shapes(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 4}, "a power of two from 8 to 1024, got 4; resize"),
        ({"image_size": 48}, "a power of two from 8 to 1024, got 48; resize"),
        ({"image_size": 16, "max_channels": 0}, "`max_channels` to be a positive integer, got 0"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StyleGANDiscriminator(**arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 16, 17), r"for images of 16 x 16 pixels, got \(16, 17\); resize"),
        (torch.zeros(2, 3, 8, 8), r"for images of 16 x 16 pixels, got \(8, 8\); resize"),
        (torch.zeros(2, 4, 16, 16), r"expects images \(b, 3, H, W\), got shape \(2, 4, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.long), "expects floating-point images"),
    ],
    ids=["odd", "small", "channels", "integers"],
)
def test_refuses_images(images, message):
    with pytest.raises(ValueError, match=message):
        StyleGANDiscriminator(16, max_channels=2)(images)


@pytest.mark.compile
def test_compiles():
    torch._dynamo.reset()
    model = StyleGANDiscriminator(16, max_channels=4)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 16, 16)
    logits, expected = compiled(images), model(images)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    expected.sum().backward()
    for got, right in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, right.grad)
