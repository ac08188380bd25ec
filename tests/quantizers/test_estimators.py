"""Estimators: the value of the code, the gradient of something smooth."""

import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import rotation_trick, straight_through


@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
def test_the_value_is_the_codes_bit_for_bit(estimator) -> None:
    u, z = torch.randn(2, 500, 7)
    assert torch.equal(estimator(u.requires_grad_(), z), z)


def test_the_rotation_trick_turns_and_scales_as_the_input_must_be() -> None:
    u = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(6, 5, dtype=torch.float64)
    upstream = torch.randn_like(z)
    (rotation_trick(u, z) * upstream).sum().backward()
    for i in range(6):
        a, b = F.normalize(u[i].detach(), dim=0), F.normalize(z[i], dim=0)
        between = F.normalize(a + b, dim=0)
        eye = torch.eye(5, dtype=torch.float64)
        turn = eye - 2 * torch.outer(between, between) + 2 * torch.outer(b, a)
        turn = turn * z[i].norm() / u[i].detach().norm()
        torch.testing.assert_close(turn @ u[i].detach(), z[i])
        torch.testing.assert_close(u.grad[i], turn.T @ upstream[i])


def test_the_rotation_trick_is_safe_where_no_rotation_is_defined() -> None:
    base = torch.randn(5)
    zero, tiny = torch.zeros(5), 1e-12 * base
    cases = [
        (zero, base),
        (tiny, base),
        (base, zero),
        (base, tiny),
        (zero, zero),
        (tiny, -tiny),
        (base, -base),
        (base, -2 * base),
        (base, -base + 1e-6 * torch.randn(5)),
    ]
    u, z = (torch.stack(column) for column in zip(*cases, strict=True))
    u.requires_grad_()
    out = rotation_trick(u, z)
    assert torch.equal(out, z)
    out.sum().backward()
    assert torch.equal(u.grad, torch.ones_like(u)), "straight through"


@pytest.mark.parametrize("off", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1])
def test_the_rotation_trick_keeps_lengths_however_near_to_opposite(off) -> None:
    u = F.normalize(torch.randn(200, 5), dim=-1)
    z = -3 * F.normalize(u + off * torch.randn(200, 5), dim=-1)
    upstream = torch.randn(200, 5)
    u.requires_grad_()
    (gradient,) = torch.autograd.grad((rotation_trick(u, z) * upstream).sum(), u)
    turned = (gradient - upstream).norm(dim=-1) > 1e-6
    # a rotation, and three times as long; or straight through
    want = upstream.norm(dim=-1) * torch.where(turned, 3.0, 1.0)
    torch.testing.assert_close(gradient.norm(dim=-1), want, rtol=1e-3, atol=0)


def test_the_rotation_trick_equals_scaling_where_both_point_alike() -> None:
    u = torch.randn(4, 5, requires_grad=True)
    rotation_trick(u, 3 * u.detach()).sum().backward()
    torch.testing.assert_close(u.grad, torch.full_like(u, 3.0))
