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
    u = torch.stack([torch.zeros(5), 1e-12 * base, base, base, base])
    z = torch.stack([base, base, torch.zeros(5), -base, -2 * base])
    u.requires_grad_()
    out = rotation_trick(u, z)
    assert torch.equal(out, z)
    out.sum().backward()
    assert torch.equal(u.grad, torch.ones_like(u)), "straight through"


def test_the_rotation_trick_equals_scaling_where_both_point_alike() -> None:
    u = torch.randn(4, 5, requires_grad=True)
    rotation_trick(u, 3 * u.detach()).sum().backward()
    torch.testing.assert_close(u.grad, torch.full_like(u, 3.0))
