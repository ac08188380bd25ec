import copy
import re

import pytest
import torch
from torch import nn

from xq.quantizers import (
    VQ,
    EMACodebook,
    Losses,
    ProductQuantizer,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    fit,
    passthrough,
    rotation_trick,
    straight_through,
)
from xq.testing import check_quantizer


class TernaryQuantizer(Quantizer):
    """Rounds each channel to -1, 0 or 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.codebook_size, self.shrink = dim, 3**dim, 0.5

    def bound(self, x):
        return x.tanh()

    def quantize(self, u, depth=None):
        z = u.round().clamp(-1, 1)  # inside a residual, u may leave the domain
        return Quantized(z, ((z + 1).long() * self.powers(u)).sum(-1), fit(u, z))

    def dequantize(self, indices):
        return (indices[..., None] // self.powers(indices) % 3 - 1).float()

    def powers(self, like):
        return 3 ** torch.arange(self.dim, device=like.device)


class WithConfig(TernaryQuantizer):
    """The same, and it can be saved."""

    def config(self):
        return {"dim": self.dim}


@pytest.mark.parametrize("leaf", [TernaryQuantizer, WithConfig])
def test_the_example_leaf_passes(leaf):
    check_quantizer(leaf(5), torch.randn(3, 7, 5), classes=[leaf])


@pytest.mark.parametrize("leaf", [TernaryQuantizer, WithConfig])
def test_the_example_leaf_composes_at_once(leaf):
    quantizer = ProductQuantizer(ResidualQuantizer(leaf(5), depth=3), P=2)
    check_quantizer(quantizer, torch.randn(3, 7, 10), classes=[leaf])
    assert quantizer(torch.randn(3, 7, 10)).indices.shape == (3, 7, 2, 3)


def test_the_example_leaf_refines_inside_a_residual():
    quantizer = ResidualQuantizer(TernaryQuantizer(5), depth=3)
    x = torch.randn(100, 5)
    partials = quantizer.partials(quantizer.encode(x))
    errors = [(quantizer.bound(x) - z).square().mean().item() for z in partials]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


@pytest.mark.parametrize(
    "quantizer",
    [
        VQ(4, 9, codebook=EMACodebook),
        VQ(4, 9, estimator=rotation_trick),
        ResidualQuantizer(VQ(4, 9), multiscale=(1, 2, 3)),
    ],
    ids=["ema", "rotation", "pyramid"],
)
def test_the_quantizer_is_left_as_it_was(quantizer):
    quantizer.train()
    before = copy.deepcopy(quantizer)
    check_quantizer(quantizer, torch.randn(2, 3, 3, 4))
    assert quantizer.training
    for mine, theirs in zip(quantizer.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is None
    for mine, theirs in zip(quantizer.buffers(), before.buffers(), strict=True):
        assert torch.equal(mine, theirs)


class Scaled(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(1.01 * z, indices, losses)


class InexactDecode(TernaryQuantizer):
    def dequantize(self, indices):
        return super().dequantize(indices) + 1e-6


class Narrow(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(z, indices.int(), losses)


class KeepsAnAxis(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(z, indices[..., None], losses)


class CountsFromOne(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(z, indices + self.codebook_size // 2, losses)


class Negative(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(z, indices - self.codebook_size // 2, losses)


class UndefinedRegularizer(TernaryQuantizer):
    def quantize(self, u, depth=None):
        q = super().quantize(u)
        bad = torch.tensor(float("nan")) if self.training else torch.zeros(())
        return q._replace(losses=q.losses._replace(regularizer=bad))


class LossPerToken(TernaryQuantizer):
    def quantize(self, u, depth=None):
        q = super().quantize(u)
        return q._replace(losses=q.losses._replace(commitment=(u - q.z).square().mean(-1)))


class NegativeEntropy(TernaryQuantizer):
    def quantize(self, u, depth=None):
        q = super().quantize(u)
        return q._replace(losses=q.losses._replace(regularizer=-u.square().mean()))


class LearnsInEncode(TernaryQuantizer):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("mean", torch.zeros(dim), persistent=False)

    def quantize(self, u, depth=None):
        if self.training:
            self.mean.lerp_(u.detach().flatten(0, -2).mean(0), 0.1)
        return super().quantize(u)


class Undecided(TernaryQuantizer):
    def quantize(self, u, depth=None):
        return super().quantize(u + torch.randn_like(u))


class Twice(TernaryQuantizer):
    def estimate(self, u, z):
        return straight_through(2 * u, z)

    @property
    def estimators(self):
        return straight_through


class OwnEstimator(TernaryQuantizer):
    def quantize(self, u, depth=None):
        z, indices, losses = super().quantize(u)
        return Quantized(u + (z - u).detach(), indices, losses)


class PassesThrough(OwnEstimator):
    def estimate(self, u, z):
        return passthrough(u, z)

    @property
    def estimators(self):
        return passthrough


class Noisy(TernaryQuantizer):
    """Draws in training with gradients."""

    noisy = True

    def quantize(self, u, depth=None):
        draws = self.training and torch.is_grad_enabled()
        return super().quantize(u + torch.randn_like(u) if draws else u)


class DrawsWithoutGradients(Noisy):
    def quantize(self, u, depth=None):
        return TernaryQuantizer.quantize(self, u + torch.randn_like(u) if self.training else u)


class DrawsInSilence(Noisy):
    noisy = False


class InfiniteSlope(TernaryQuantizer):
    def bound(self, x):
        return (x - x).abs().sqrt() + x.tanh()


class Learned(TernaryQuantizer):
    """Ternary codes of a learned size."""

    def __init__(self, dim):
        super().__init__(dim)
        self.size = nn.Parameter(torch.full((dim,), 0.7))

    def quantize(self, u, depth=None):
        z, indices, _ = super().quantize(u / self.size.to(u.dtype))
        z = z * self.size.to(u.dtype)
        return Quantized(z, indices, fit(u, z))

    def dequantize(self, indices):
        return super().dequantize(indices) * self.size.float()


class Idle(Learned):
    def __init__(self, dim):
        super().__init__(dim)
        self.spare = nn.Parameter(torch.zeros(dim))


class Halved(Learned):
    """Lets `.half()` round what it searches by."""

    _apply = nn.Module._apply


class LossInTrainingOnly(TernaryQuantizer):
    def quantize(self, u, depth=None):
        q = super().quantize(u)
        losses = q.losses if torch.is_grad_enabled() else Losses(*(0 * t for t in q.losses))
        return q._replace(losses=losses)


class NoTokensNoMean(TernaryQuantizer):
    def quantize(self, u, depth=None):
        q = super().quantize(u)
        return q._replace(losses=q.losses._replace(commitment=(u - q.z).square().mean()))


class AnotherChoice(TernaryQuantizer):
    def choose(self, u):
        q = self.quantize(u)
        return q._replace(z=2 * q.z)


class TwoPartials(TernaryQuantizer):
    def dequantize_steps(self, indices):
        yield self.dequantize(indices) / 2
        yield self.dequantize(indices)


class ForgetsTheDepth(ResidualQuantizer):
    def quantize(self, u, depth=None):
        return super().quantize(u, None)


class WrongPrefix(ResidualQuantizer):
    def dequantize_steps(self, indices):
        *_, last = super().dequantize_steps(indices)
        yield from (last for _ in range(indices.shape[-1]))


class ForgetfulConfig(TernaryQuantizer):
    def __init__(self, dim=5, levels=3):
        super().__init__(dim)
        self.levels = levels

    def config(self):
        return {"dim": self.dim, **({} if self.levels == 4 else {"levels": 4})}


BROKEN = [
    (Scaled, "decode gives the z of forward, bit for bit"),
    (InexactDecode, "decode gives the z of forward, bit for bit"),
    (Narrow, "indices are int64"),
    (KeepsAnAxis, "indices: token shape, then code_shape"),
    (CountsFromOne, "indices are below codebook_size"),
    (Negative, "indices are not negative"),
    (UndefinedRegularizer, "regularizer is a finite scalar"),
    (LossPerToken, "commitment is a finite scalar"),
    (NegativeEntropy, "regularizer is not negative"),
    (LearnsInEncode, "encode, decode and no_grad passes change nothing"),
    (Undecided, "encode gives the indices of forward"),
    (DrawsWithoutGradients, "encode gives the indices of forward"),
    (DrawsInSilence, "encode gives the indices of forward"),
    (Twice, "the gradient of z is that of bound, once"),
    (OwnEstimator, "quantize gives its input no gradient through z"),
    (InfiniteSlope, "the gradient of z is finite"),
    (Idle, "spare receives a gradient"),
    (Halved, "float16 modules give float32's indices"),
    (LossInTrainingOnly, "commitment has one value, with gradients and without"),
    (NoTokensNoMean, "an empty batch has no loss"),
    (AnotherChoice, "choose gives the z of quantize"),
    (TwoPartials, "partials has one entry a step"),
    (ForgetfulConfig, "config() rebuilds it"),
]


@pytest.mark.parametrize(("leaf", "promise"), BROKEN, ids=[leaf.__name__ for leaf, _ in BROKEN])
def test_a_broken_leaf_is_caught(leaf, promise):
    with pytest.raises(AssertionError, match="broken promise: .*" + re.escape(promise)):
        check_quantizer(leaf(5), torch.randn(20, 7, 5))


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (ForgetsTheDepth, "depth=d gives the d-th partial"),
        (WrongPrefix, "decode takes prefixes"),
    ],
)
def test_a_broken_composite_is_caught(broken, promise):
    with pytest.raises(AssertionError, match=f"broken promise: {promise}"):
        check_quantizer(broken(TernaryQuantizer(5), depth=3), torch.randn(3, 7, 5))


@pytest.mark.parametrize("leaf", [Learned, Noisy, PassesThrough])
def test_what_the_broken_ones_are_made_of_is_sound(leaf):
    check_quantizer(leaf(5), torch.randn(20, 7, 5))
