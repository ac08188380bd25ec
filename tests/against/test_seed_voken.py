"""IBQ against SEED-Voken's own code.

Deliberate differences:
- The error of `z` with its gradient, the third part of their quantization loss, is left to the
  caller, who has `z`.
- Its beta weighs the codebook term. Here each term has its own weight.
- It adds EPS within the logarithm of the batch entropy; our entropies are exact.
- Its indices are flat; ours keep the grid.
"""

import math

import torch
import torch.nn.functional as F
from golden import (
    EPS,
    assert_gradient,
    assert_indices,
    assert_values,
    gradients,
    leaf,
    load,
    load_state,
)

from xq.quantizers import IBQ, VQ, ChannelFirst

BETA = 0.25
ENTROPY_WEIGHT = 0.05


def test_index_propagation():
    numbers, quantizer = load("ibq"), IBQ(8, 32)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    scores = x.movedim(1, -1) @ quantizer.codebook.weight.t()
    assert (scores.topk(2).values.diff(dim=-1).abs() > 1e-5).all()
    assert torch.equal(indices.flatten(), numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices).movedim(-1, 1), numbers["decoded"])

    value = (z * numbers["cotangent"]).sum()
    through = gradients(value, x, quantizer)
    assert_gradient(through["input"], numbers["grad.z.input"])
    assert_gradient(through["codebook.weight"], numbers["grad.z.codebook"])

    entropy = quantizer.entropy(x.movedim(1, -1))
    shifted = 32 * EPS
    assert_values(entropy.per_token, numbers["per_token"])
    assert_values(entropy.batch, numbers["batch"], atol=shifted)
    assert_values(losses.regularizer, entropy.per_token + math.log(32) - entropy.batch)
    assert_values(losses.regularizer - math.log(32), numbers["entropy_loss"], atol=shifted)

    loss = losses.total(commitment=1.0, codebook=BETA, regularizer=0.0) + F.mse_loss(z, x)
    assert_values(loss, numbers["quant_loss"])
    found = gradients(loss + ENTROPY_WEIGHT * losses.regularizer, x, quantizer)
    # what they add in the logarithm moves the gradient of rare codes
    assert_gradient(found["input"], numbers["grad.loss.input"], tolerance=5e-4)
    assert_gradient(found["codebook.weight"], numbers["grad.loss.codebook"], tolerance=5e-4)


def test_search_by_angle():
    """Its baseline: searches by angle, and fits vectors as they are."""
    numbers, quantizer = load("ibq_cosine"), VQ(8, 32, metric="cosine")
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, numbers["z"])
    loss = losses.total(commitment=1.0, codebook=BETA)
    assert_values(loss, numbers["loss"])
    found = gradients(loss, x, quantizer)
    assert_gradient(found["input"], numbers["grad.loss.input"])
    assert_gradient(found["codebook.weight"], numbers["grad.loss.codebook"])
