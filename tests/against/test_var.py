"""Multi-scale VQ against VAR's VectorQuantizer2.

Deliberate difference: VAR returns one loss, beta times commitment plus codebook term; ours are
apart and unweighted.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import (
    assert_gradient,
    assert_indices,
    assert_values,
    below,
    gradients,
    leaf,
    load,
    load_state,
)

from xq.quantizers import VQ, ChannelFirst, Pyramid, Refine, ResidualQuantizer

BETA = 0.25
CASES = {
    "var_eucl": {"scales": (1, 2, 3, 4), "refinements": 4, "codes": 64},
    "var_znorm": {"scales": (1, 2, 3, 4), "refinements": 4, "codes": 64, "metric": "cosine"},
    "var_share4": {"scales": (1, 2, 3, 4, 5, 6), "refinements": 4, "codes": 32},
    "var_share0": {"scales": (1, 2, 4), "refinements": 3, "codes": 32},
    "var_noresi": {"scales": (1, 2, 4), "refinements": 0, "codes": 32},
}


def build(scales, refinements, codes, metric="euclidean") -> ResidualQuantizer:
    grid = Pyramid(scales, [Refine(8) for _ in range(refinements)])
    return ResidualQuantizer(VQ(8, codes, metric=metric), multiscale=grid, shared=True)


@pytest.fixture(params=CASES)
def case(request):
    numbers, quantizer = load(request.param), build(**CASES[request.param])
    load_state(quantizer, numbers)
    return numbers, quantizer


def test_forward_and_gradients(case):
    numbers, quantizer = case
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, numbers["z"])
    loss = losses.total(commitment=BETA)
    assert_values(loss, numbers["loss"])

    # straight through: the cotangent reaches the input as it is, and no parameter
    through = gradients((z * numbers["cotangent"]).sum(), x, quantizer)
    assert_gradient(through.pop("input"), numbers["cotangent"])
    assert not any(gradient.any() for gradient in through.values())
    actual = gradients(loss, x, quantizer)
    assert actual.keys() == below(numbers, "grad").keys()
    for name, gradient in actual.items():
        other = numbers["cotangent"] if name == "input" else 0.0
        assert_gradient(gradient, numbers[f"grad.{name}"], other)


@torch.no_grad()
def test_decode_and_partials(case):
    numbers, quantizer = case
    wrapped = ChannelFirst(quantizer)
    assert_values(torch.stack(list(wrapped.partials(numbers["indices"]))), numbers["partials"])
    assert_values(wrapped.decode(numbers["indices"]), numbers["z"])


@torch.no_grad()
def test_inputs_of_a_generator(case):
    numbers, quantizer = case
    partials = list(ChannelFirst(quantizer).partials(numbers["indices"]))
    inputs = [
        F.interpolate(z, grid, mode="area").flatten(2).mT
        for z, grid in zip(partials, quantizer.grids[1:], strict=False)
    ]
    assert_values(torch.cat(inputs, dim=1), numbers["teacher_forcing"])
