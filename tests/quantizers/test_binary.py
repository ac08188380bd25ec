"""LFQ and BSQ: signs, bits and their integers."""

import math

import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import BSQ, LFQ, indices_to_signs, signs_to_indices


@pytest.mark.parametrize("dim", [1, 7, 18, 62])
def test_bits_round_trip_exactly(dim: int) -> None:
    signs = torch.rand(200, dim) > 0.5
    indices = signs_to_indices(signs)
    assert torch.equal(indices_to_signs(indices, dim), signs)
    assert indices.min() >= 0


def test_bit_i_is_channel_i() -> None:
    assert signs_to_indices(torch.tensor([True, False, False, True])) == 9


@pytest.mark.parametrize("leaf", [LFQ(5), LFQ(5, bound="tanh"), BSQ(5)], ids=["lfq", "tanh", "bsq"])
def test_codes_are_the_signs_and_zero_counts_as_negative(leaf: LFQ | BSQ) -> None:
    x = torch.tensor([[1.0, -2.0, 0.0, -0.0, 3.0]])
    z, indices, _ = leaf(x)
    size = 1.0 if isinstance(leaf, LFQ) else 1 / math.sqrt(5)
    assert torch.equal(z, size * torch.tensor([[1.0, -1.0, -1.0, -1.0, 1.0]]))
    assert indices.tolist() == [0b10001]


def test_the_sign_code_is_the_nearest_of_all() -> None:
    leaf = BSQ(6)
    x = torch.randn(50, 6)
    codes = leaf.decode(torch.arange(64))
    nearest = torch.cdist(F.normalize(x, dim=-1), codes).argmin(-1)
    assert torch.equal(leaf.encode(x), nearest)


def test_gradient_passes_through_the_bound() -> None:
    for leaf, bound in (
        (BSQ(4), lambda x: F.normalize(x, dim=-1)),
        (LFQ(4, bound="tanh"), torch.tanh),
    ):
        x = torch.randn(3, 4, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        weight = torch.randn(3, 4)
        (leaf(x).z * weight).sum().backward()
        (bound(y) * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_commitment_is_the_error_to_the_code() -> None:
    leaf = LFQ(4, bound="tanh")
    x = torch.randn(3, 4)
    losses = leaf(x).losses
    torch.testing.assert_close(losses.commitment, F.mse_loss(x.tanh(), x.sign()))
    assert losses.codebook == 0


@pytest.mark.parametrize("dim", [63, 64, 0])
def test_more_codes_than_int64_holds_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"needs 1 to 62 channels.*got dim={dim}"):
        LFQ(dim)


def test_more_than_24_channels_ask_for_groups() -> None:
    with pytest.raises(ValueError, match=r"BSQ: the entropy over 2\*\*36 codes.*group_size"):
        BSQ(36)
    assert BSQ(36, group_size=18)(torch.randn(2, 36)).losses.regularizer > 0
    assert BSQ(36, regularize=False)(torch.randn(2, 36)).losses.regularizer == 0


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"LFQ knows the bounds.*bound='relu'"):
        LFQ(4, bound="relu")
    with pytest.raises(ValueError, match="BSQ needs a positive temperature, got 0"):
        BSQ(4, temperature=0.0)
