import copy

import pytest
import torch
import torch.nn.functional as F

from xq.losses.discriminators.layers import LocalBatchNorm, SpectralConv1d


def naive_batch_norm(x: torch.Tensor, sizes: list[int], layer: LocalBatchNorm) -> torch.Tensor:
    results = []
    for part in x.split(sizes):
        mean = part.mean((0, 2), keepdim=True)
        variance = (part - mean).square().mean((0, 2), keepdim=True)
        normed = (part - mean) / (variance + 1e-6).sqrt()
        results.append(normed * layer.weight[:, None] + layer.bias[:, None])
    return torch.cat(results)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(2, [2]), (8, [8]), (9, [5, 4]), (11, [6, 5]), (16, [8, 8]), (17, [6, 6, 5])],
)
def test_local_batch_norm_equals_the_naive_one(batch, sizes):
    layer = LocalBatchNorm(3).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(batch, 3, 7, dtype=torch.float64, requires_grad=True)
    actual, expected = layer(x), naive_batch_norm(x, sizes, layer)
    torch.testing.assert_close(actual, expected)
    wanted, weights = [x, layer.weight, layer.bias], torch.randn_like(x)
    for got, right in zip(
        torch.autograd.grad((actual * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_local_batch_norm_has_no_running_statistics():
    layer = LocalBatchNorm(3)
    x = torch.randn(4, 3, 7) * 5 + 2
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("kernel", [1, 9])
def test_spectral_convolution_divides_by_the_largest_singular_value(kernel):
    layer = SpectralConv1d(6, 5, kernel).double()
    x = torch.randn(2, 6, 11, dtype=torch.float64)
    for _ in range(200):
        layer(x)
    layer.eval()
    largest = torch.linalg.svdvals(layer.weight_orig.flatten(1))[0]
    pad = kernel // 2
    around = torch.cat([x[..., 11 - pad :], x, x[..., :pad]], dim=-1)
    expected = F.conv1d(around, layer.weight_orig / largest, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_spectral_convolution_starts_near_its_norm():
    layer = SpectralConv1d(64, 64, 9).eval()
    largest = torch.linalg.svdvals(layer.weight_orig.flatten(1))[0]
    found = layer.weight_u @ layer.weight_orig.flatten(1) @ layer.weight_v
    assert 0.95 * largest < found <= largest * (1 + 1e-5)
    bound = (64 * 9) ** -0.5
    assert layer.weight_orig.abs().max() <= bound
    assert abs(layer.weight_orig.std() - bound / 3**0.5) < 0.05 * bound


def test_spectral_gradient_goes_through_the_norm():
    layer = SpectralConv1d(3, 2, 1).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def of_weight(weight, x):
        twin = copy.deepcopy(layer)
        return torch.func.functional_call(twin, {"weight_orig": weight}, (x,))

    weight = layer.weight_orig.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_weight, (weight, x))
    # the weight's length does not matter, so neither does a step along it
    (gradient,) = torch.autograd.grad(of_weight(weight, x).square().sum(), weight)
    assert abs((gradient * weight).sum()) < 1e-12


def test_power_iteration_only_in_training():
    layer = SpectralConv1d(6, 5, 9)
    x, before = torch.randn(2, 6, 11), copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)
    layer.train()(x)
    assert not torch.equal(layer.weight_u, before["weight_u"])
    assert not torch.equal(layer.weight_v, before["weight_v"])
    assert torch.equal(layer.weight_orig, before["weight_orig"])


def test_two_calls_before_one_backward_pass():
    layer = SpectralConv1d(6, 5, 9)
    real, fake = torch.randn(2, 2, 6, 11)
    first = layer(real)
    (layer(fake).sum() - first.square().sum()).backward()
    assert layer.weight_orig.grad.isfinite().all()


def test_spectral_convolution_under_autocast():
    layer = SpectralConv1d(16, 8, 9)
    twin, x = copy.deepcopy(layer), torch.randn(2, 16, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = layer(x)
    torch.testing.assert_close(halved.float(), twin(x), atol=3e-2, rtol=0)
    # the singular vectors know nothing of it
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), atol=0, rtol=0)


def test_a_weight_of_zeros_stays_finite():
    layer = SpectralConv1d(3, 2, 1)
    torch.nn.init.zeros_(layer.weight_orig)
    x = torch.randn(2, 3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight_orig.grad.isfinite().all()
    assert x.grad.isfinite().all()
