"""One fit for all steps of a residual equals the fits of its steps."""

import pytest
import torch
from torch import Tensor

from xq.quantizers import LFQ, VQ, ProductQuantizer, Quantized, ResidualQuantizer, fit
from xq.quantizers.running_fit import NoFit, RunningFit

SHAPES = [(4,), (5, 4), (3, 2, 4), (3, 2, 3, 4), (0, 4)]


def sums(shape: tuple[int, ...], steps: int = 4) -> tuple[Tensor, list[Tensor]]:
    u = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return u, [torch.randn_like(u, requires_grad=True) for _ in range(steps)]


def check(u: Tensor, z: list[Tensor], keep: Tensor | None) -> None:
    running = RunningFit(u, keep)
    for one in z:
        running.add(one)
    got = running.terms()
    fits = [fit(u, one, None if keep is None else keep[k]) for k, one in enumerate(z)]
    want = (
        torch.stack([f.commitment for f in fits]).mean(),
        torch.stack([f.codebook for f in fits]).mean(),
    )
    torch.testing.assert_close(got, want)
    # one number with two gradients
    assert torch.equal(got[0], got[1])
    for a, b, inputs in zip(got, want, ((u,), z), strict=True):
        ours = torch.autograd.grad(a, inputs, retain_graph=True)
        theirs = torch.autograd.grad(b, inputs)
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(got[0], z, allow_unused=True) == (None,) * len(z)
    assert torch.autograd.grad(got[1], u, allow_unused=True) == (None,)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fits_of_all_steps(shape: tuple[int, ...]) -> None:
    check(*sums(shape), None)


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_equals_the_fits_of_the_samples_kept(shape: tuple[int, ...]) -> None:
    u, z = sums(shape)
    depth = 1 + torch.arange(len(u)) % 3
    # the last step is kept by no sample at all
    check(u, z, torch.arange(4)[:, None] < depth)


def test_second_derivatives_are_exact_too() -> None:
    u, z = sums((3, 4))

    def commitment(u: Tensor) -> Tensor:
        running = RunningFit(u, None)
        for one in z:
            running.add(one)
        return running.terms()[0]

    assert torch.autograd.gradcheck(commitment, u)
    assert torch.autograd.gradgradcheck(commitment, u)


def test_stands_in_with_zeros() -> None:
    u, z = sums((3, 4))
    nobody = NoFit(u)
    nobody.add(z[0])
    assert nobody.terms() == (0, 0)


@pytest.mark.parametrize("keep", [None, torch.tensor([True, False, True])])
def test_a_fit_is_the_mean_squared_error_seen_from_both_sides(keep: Tensor | None) -> None:
    u, (z, *_) = sums((3, 2, 4))
    losses = fit(u, z, keep)
    chosen = slice(None) if keep is None else keep
    want = (u[chosen] - z[chosen]).square().mean()
    torch.testing.assert_close(losses.commitment, want)
    torch.testing.assert_close(losses.codebook, want)
    (both,) = torch.autograd.grad(want, u)
    (to_u,) = torch.autograd.grad(losses.commitment, u)
    (to_z,) = torch.autograd.grad(losses.codebook, z)
    torch.testing.assert_close(to_u, both)
    torch.testing.assert_close(to_z, -both)
    assert fit(u, z, keep, learned=False).codebook == 0


def test_nobody_kept_is_no_loss() -> None:
    u, (z, *_) = sums((3, 4))
    assert fit(u, z, torch.zeros(3, dtype=torch.bool)).total() == 0


class Doubled(VQ):
    """Writes `quantize` alone: a regularizer of its own, with a gradient to the input."""

    def quantize(self, u: Tensor, depth: object = None) -> Quantized:
        z, indices, losses = super().quantize(u)
        return Quantized(2 * z, indices, losses._replace(regularizer=u.square().mean()))


class Renamed(Doubled):
    """Changes nothing."""


@pytest.mark.parametrize("leaf", [Doubled, Renamed])
def test_a_quantize_of_ones_own_is_not_passed_by(leaf: type[VQ]) -> None:
    assert not VQ(4, 8).regularizes
    assert LFQ(4).regularizes
    assert not LFQ(4, regularize=False).regularizes
    assert leaf(4, 8).regularizes
    quantizer = ResidualQuantizer(ProductQuantizer(leaf(4, 8), P=2), depth=2)
    x = torch.randn(5, 8, requires_grad=True)
    _z, _indices, losses = quantizer(x)
    step = quantizer.steps[0]
    assert torch.equal(step.choose(x).z, step.quantize(x).z)
    (got,) = torch.autograd.grad(losses.regularizer, x)
    rest = x - step.quantize(x).z
    torch.testing.assert_close(losses.regularizer, (x.square() + rest.square()).mean() / 2)
    torch.testing.assert_close(got, (x + rest) / x.numel())
