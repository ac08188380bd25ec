"""Masked against vector-quantize-pytorch's `mask=`."""

from functools import partial

import torch
from golden import assert_gradient, assert_indices, assert_values, gradients, leaf, load, load_state

from xq.quantizers import VQ, EMACodebook, Masked

BETA = 0.25


def test_a_masked_training_step():
    numbers = load("vqp_mask")
    vq = VQ(8, 32, codebook=partial(EMACodebook, decay=0.8, revive=0.0))
    numbers["state.codebook.step"] = torch.zeros((), dtype=vq.codebook.step.dtype)
    load_state(vq, numbers)
    masked, mask = Masked(vq), numbers["mask"]
    assert_values(masked.decode(numbers["eval.indices"]), numbers["eval.z"])
    found = masked.encode(numbers["input"], mask=mask)
    assert_indices(vq, numbers["input"][mask], found[mask], numbers["eval.indices"][mask])
    x = leaf(numbers["input"])
    z, indices, losses = masked(x, mask=mask)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(masked.decode(numbers["indices"]), numbers["z"])
    assert_values(BETA * losses.commitment, numbers["losses"])
    assert_gradient(gradients((z * numbers["cotangent"]).sum(), x)["input"], numbers["grad.z"])
    assert_gradient(gradients(BETA * losses.commitment, x)["input"], numbers["grad.loss"])
    assert_values(vq.codebook.count, numbers["after.codebook.count"])
    assert_values(vq.codebook.total, numbers["after.codebook.total"])
