"""VQ against LlamaGen's VectorQuantizer.

Deliberate differences:
- It adds EPS within the logarithm of the batch entropy; ours is exact. A test that needs the
  gradient of theirs computes it here.
- Its commitment loss is already multiplied by beta.
- Its indices are flat; ours keep the grid.
"""

import math

import pytest
import torch
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

from xq.quantizers import VQ, ChannelFirst

BETA = 0.25


@pytest.fixture(params=["llamagen_vq", "llamagen_vq_entropy", "llamagen_vq_unit"])
def case(request):
    numbers = load(request.param)
    # the first has a weight of zero
    temperature = None if request.param == "llamagen_vq" else 0.01
    normalize = "unit" in request.param
    quantizer = VQ(8, 32, normalize=normalize, entropy_temperature=temperature)
    load_state(quantizer, numbers)
    return numbers, quantizer


def soft_entropy(x, codes):
    """Their entropy term: of softmax(-distance / 0.01), a token's own minus that of the mean."""
    distances = (x[..., None, :] - codes).square().sum(-1).flatten(0, -2)
    log_p = (-distances / 0.01).log_softmax(-1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean() + (mean * (mean + EPS).log()).sum()


def test_forward_and_gradients(case):
    numbers, quantizer = case
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices).movedim(-1, 1), numbers["decoded"])
    assert_values(losses.codebook, numbers["vq_loss"])
    assert_values(BETA * losses.commitment, numbers["commit_loss"])

    through = gradients((z * numbers["cotangent"]).sum(), x)
    assert_gradient(through["input"], numbers["grad.z.input"])
    loss = losses.total(commitment=BETA, regularizer=0.0)
    actual = gradients(loss, x, quantizer)["codebook.weight"]
    without = numbers.get("grad.entropy.codebook", 0.0)
    assert_gradient(actual, numbers["grad.loss.codebook"], without)

    if quantizer.regularizes:
        codes = quantizer.dequantize(torch.arange(32))
        entropy = 0.1 * soft_entropy(quantizer.bound(x.movedim(1, -1)), codes)
        assert_values(entropy, numbers["entropy_loss"])
        theirs = gradients(entropy, x, quantizer)
        assert_gradient(theirs["codebook.weight"], numbers["grad.entropy.codebook"])
        ours = losses.regularizer - math.log(32)
        assert_values(0.1 * ours, numbers["entropy_loss"], atol=0.1 * 32 * EPS)
        found = gradients(0.1 * losses.regularizer, x, quantizer)["codebook.weight"]
        assert_gradient(found, numbers["grad.entropy.codebook"], tolerance=5e-3)
        loss = loss + entropy
    assert_gradient(gradients(loss, x)["input"], numbers["grad.loss.input"])
