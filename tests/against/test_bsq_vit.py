"""BSQ against bsq-vit's BinarySphericalQuantizer.

Deliberate differences:
- Bit i of our index is channel i; theirs is the other way around, within groups too.
- Its caller normalizes the input, here `bound` does; without `l2_norm` its codes are LFQ's.
- It multiplies by 1 / sqrt(dim) after the straight-through, so its gradient is that much smaller.
- Its commitment is a sum over channels, ours a mean.
- It divides its entropy penalty by the inverse temperature; we return the parts and one penalty.
- "analytical" takes the batch entropy of single bits, whatever the group size.
- It adds 1e-8 to probabilities within the logarithm; our entropies are exact.
- Above 24 bits its own indices lose their low bits in a float32 sum; its group indices are right.
"""

import math
from typing import NamedTuple

import pytest
import torch
from golden import assert_gradient, assert_indices, assert_values, gradients, leaf, load

from xq.quantizers import BSQ, LFQ, ChannelFirst, indices_to_signs, signs_to_indices

ADDED = 1e-8


class Case(NamedTuple):
    quantizer: BSQ | LFQ
    group: int
    beta: float = 0.25
    gamma0: float = 1.0
    gamma: float = 1.0
    zeta: float = 1.0


CASES = {
    "bsq_vit_d18_bits": Case(BSQ(18, group_size=1), 1, beta=0.0),
    "bsq_vit_d18_group9": Case(
        BSQ(18, group_size=9, temperature=1 / 10), 9, gamma0=0.5, gamma=2.0, zeta=0.1
    ),
    "bsq_vit_d18_group9_analytical": Case(BSQ(18, group_size=1), 9),
    "bsq_vit_d36_group12": Case(BSQ(36, group_size=12), 12),
    "bsq_vit_d8_group4_cube": Case(LFQ(8, group_size=4, temperature=1 / 2), 4),
}


@pytest.fixture(params=CASES)
def case(request):
    return load(request.param), CASES[request.param]


def channel_first(case) -> bool:
    return isinstance(case.quantizer, LFQ)


def last(numbers, case):
    """Channel-last."""
    return numbers.movedim(1, -1) if channel_first(case) else numbers


def in_their_order(indices, dim, group):
    """Indices of groups of bits, the first channel of each group highest."""
    signs = indices_to_signs(indices, dim).unflatten(-1, (dim // group, group))
    return signs_to_indices(signs.flip(-1))


def in_our_order(indices, group):
    signs = indices_to_signs(indices, group).flip(-1)
    return signs_to_indices(signs.flatten(-2))


def test_forward(case):
    numbers, case = case
    quantizer, dim = case.quantizer, case.quantizer.dim
    wrapped = ChannelFirst(quantizer) if channel_first(case) else quantizer
    z, indices, losses = wrapped(numbers["input"])
    assert_values(z, numbers["z"])
    expected = in_our_order(numbers["group_indices"], case.group)
    assert_indices(quantizer, last(numbers["input"], case), indices, expected)
    assert torch.equal(in_their_order(indices, dim, case.group), numbers["group_indices"])
    if dim <= 24:
        assert torch.equal(in_their_order(indices, dim, dim)[..., 0], numbers["indices"])

    entropy = quantizer.entropy(quantizer.bound(last(numbers["input"], case)))
    added = 2e-5 + ADDED * 2**case.group * (dim // case.group)
    assert_values(entropy.per_token, numbers["per_token"], atol=added)
    assert_values(entropy.batch, numbers["batch"], atol=added)
    assert_values(losses.regularizer, entropy.per_token - entropy.batch + dim * math.log(2))
    assert_values(their_loss(case, losses, entropy), numbers["loss"])


def their_loss(case, losses, entropy):
    penalty = case.gamma0 * entropy.per_token - case.gamma * entropy.batch
    commitment = case.quantizer.dim * losses.commitment
    return case.beta * commitment + case.zeta * case.quantizer.temperature * penalty


def test_gradients(case):
    """With respect to the normalized input, which is what it differentiates."""
    numbers, case = case
    quantizer = case.quantizer
    x = leaf(numbers["input"])
    u = last(x, case)
    q = quantizer.quantize(u)
    z = quantizer.estimate(u, q.z)
    through = gradients((z * last(numbers["cotangent"], case)).sum(), x)["input"]
    assert_gradient(quantizer.scale * through, numbers["grad.z"])
    loss = their_loss(case, q.losses, quantizer.entropy(u))
    assert_gradient(gradients(loss, x)["input"], numbers["grad.loss"])
