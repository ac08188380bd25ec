import copy
import json

import pytest
import torch
import torch.nn.functional as F
from discriminator_checks import golden_shapes, shapes
from torch import nn

from xq.config import build, describe
from xq.losses import PatchGAN

SMALL = {"channels": 4, "depth": 2}


def naive(model: PatchGAN, images: torch.Tensor) -> torch.Tensor:
    """Without modules; the statistics of the batch for "batch"."""
    state = dict(model.named_parameters())
    strides = [2] * model.depth + [1, 1]
    x, layer = images, 0
    for i, stride in enumerate(strides):
        bias = state.get(f"main.{layer}.bias")
        x = F.conv2d(x, state[f"main.{layer}.weight"], bias, stride, 1)
        layer += 1
        if i == len(strides) - 1:
            return x
        if i > 0:
            weight, bias = (
                state[f"main.{layer}.{name}"][:, None, None] for name in ("weight", "bias")
            )
            axes, shape = (0, 2, 3), x.shape
            if model.norm == "group":
                groups = next(g for g in (32, 16, 8, 4, 2, 1) if x.shape[1] % g == 0)
                x, axes = x.reshape(len(x), groups, -1), (2,)
            mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
            x = ((x - mean) / (variance + 1e-5).sqrt()).reshape(shape) * weight + bias
            layer += 1
        x = torch.where(x > 0, x, 0.2 * x)
        layer += 1
    raise AssertionError


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"channels": 4}, (3, 3, 41, 29)),
        ({"channels": 6, "depth": 1}, (2, 3, 9, 12)),
        ({"channels": 2, "depth": 4, "image_channels": 1}, (2, 1, 64, 51)),
    ],
    ids=["H41-W29", "depth1", "depth4-grey"],
)
def test_equals_the_naive_one(norm, sizes, shape):
    model = PatchGAN(norm=norm, **sizes).double()
    images = torch.rand(shape, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    actual, expected = model(images), naive(model, images)
    torch.testing.assert_close(actual, expected)
    wanted = [images, *model.parameters()]
    weights = torch.randn_like(actual)
    for got, right in zip(
        torch.autograd.grad((actual * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right, atol=1e-9, rtol=1e-6)


def test_defaults_are_the_original_ones():
    with torch.device("meta"):
        model = PatchGAN()
        assert model(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    assert shapes(model) == golden_shapes("patchgan.")


def test_a_logit_sees_70_pixels():
    model = PatchGAN(channels=2, norm="group").eval()
    model.main = nn.Sequential(*(m for m in model.main if not isinstance(m, nn.GroupNorm)))
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images)[0, 0, 6, 6], images)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_starts_as_pix2pix(norm):
    model = PatchGAN(norm=norm)
    for i, module in enumerate(model.main):
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.std().item() - 0.02) < 2e-3
            assert abs(module.weight.mean().item()) < 2e-3
            # a bias before batch normalization would learn nothing
            assert (module.bias is None) == (norm == "batch" and 0 < i < 11)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            assert abs(module.weight.mean().item() - 1) < 1e-2
            assert abs(module.weight.std().item() - 0.02) < 1e-2
            assert not module.bias.any()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_smallest(norm):
    model = PatchGAN(channels=2, depth=2, norm=norm)
    assert model.smallest == 12
    assert model(torch.randn(1, 3, 12, 13)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"at least 12 x 12 pixels, got \(40, 11\)"):
        model(torch.randn(1, 3, 40, 11))


def test_group_norm_judges_each_image_alone():
    model = PatchGAN(norm="group", **SMALL)
    images = torch.randn(3, 3, 20, 20)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_finite_at_extremes(norm, scale):
    model = PatchGAN(norm=norm, **SMALL)
    images = torch.randn(2, 3, 16, 16).mul(scale).requires_grad_()
    logits = model(images)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert images.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradcheck(norm):
    model = PatchGAN(channels=2, depth=1, norm=norm).double()
    images = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (images,))
    # for R1
    assert torch.autograd.gradgradcheck(model, (images,))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_autocast(norm):
    model = PatchGAN(norm=norm, **SMALL)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    torch.testing.assert_close(logits.float(), expected, atol=2e-2, rtol=0)
    logits.float().sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_config_round_trip(norm):
    model = PatchGAN(1, channels=4, depth=2, norm=norm)
    again = build(json.loads(json.dumps(describe(model))))
    assert isinstance(again, PatchGAN)
    assert again.config() == model.config()
    assert shapes(again) == shapes(model)


def test_deepcopy_computes_the_same():
    model = PatchGAN(**SMALL)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "norm='batch' or 'group', got 'layer'"),
        ({"depth": 0}, "`depth` to be a positive integer, got 0"),
        ({"image_channels": -1}, "`image_channels` to be a positive integer, got -1"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchGAN(**arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"expects images \(b, 3, H, W\), got shape \(2, 1, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3), r"move the channels with images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 32, 32), r"add a batch axis with images\[None\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"got torch.uint8; .* images / 127.5 - 1"),
        (torch.zeros(0, 3, 32, 32), "got an empty batch"),
    ],
    ids=["channels", "channel-last", "no-batch", "bytes", "empty"],
)
def test_refuses_images(images, message):
    with pytest.raises(ValueError, match=message):
        PatchGAN(**SMALL)(images)


@pytest.mark.compile
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles(norm, training):
    torch._dynamo.reset()
    model = PatchGAN(norm=norm, **SMALL).train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(compiled(images), model(images))
    torch.testing.assert_close(twin.state_dict(), model.state_dict())
