"""SimVQ, the diversity and the orthogonality loss against vector-quantize-pytorch.

Deliberate differences:
- Its SimVQ weighs the commitment by 0.25 and has one loss; ours are apart. Its residual of SimVQs
  has a loss a step, which compares a code with the residual of its step: the value is that of our
  sums, the gradient to earlier codebooks is not.
- Each step of its residuals has its own straight-through, as in `test_vector_quantize_pytorch`.
- Its diversity loss takes a softmax of negative distances, not of their squares, and is minus a
  mean of entropies: for each place in the sequence that over samples. Our batch is all tokens. Its
  gradient is that of codes which the averages have moved meanwhile, so it is not compared.
- Its learned codes have one loss that moves both sides.
"""

import math
from functools import partial

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

from xq.quantizers import VQ, ResidualQuantizer, SimCodebook, orthogonality, rotation_trick
from xq.quantizers.entropy import batch_entropy


@pytest.mark.parametrize("rotated", [False, True])
def test_simvq(rotated):
    numbers = load("vqp_simvq_rotated" if rotated else "vqp_simvq")
    options = {"estimator": rotation_trick} if rotated else {}
    quantizer = VQ(8, 32, codebook=SimCodebook, **options)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = quantizer(x)
    assert_indices(quantizer, x, indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["decoded"])
    assert_values(losses.total(commitment=0.25, codebook=1.0), numbers["loss"])

    value, loss = (z * numbers["cotangent"]).sum(), losses.total()
    assert_gradient(gradients(value, x)["input"], numbers["grad.z.input"])
    assert_gradient(gradients(loss, x)["input"], numbers["grad.loss.input"])
    # with the rotation trick the value of z has no gradient to the codes there
    total = loss if rotated else value + loss
    (name, expected) = next(iter(below(numbers, "grad.total").items()))
    assert_gradient(gradients(total, x, quantizer)[name], expected)


def test_residual_simvq():
    numbers = load("vqp_residual_simvq")
    quantizer = ResidualQuantizer(VQ(8, 16, codebook=SimCodebook), 3)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = quantizer(x)
    assert_indices(quantizer, x, indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["decoded"])
    assert_values(losses.total(commitment=0.25, codebook=1.0), numbers["losses"].mean())
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(3 * through, numbers["grad.z.input"])

    # their losses: each step by itself
    sums = [torch.zeros_like(x), *quantizer.partials(indices)]
    parts = []
    for k, step in enumerate(quantizer.steps):
        rest, code = x - sums[k].detach(), step.dequantize(indices[..., k])
        parts.append(F.mse_loss(code, rest.detach()) + 0.25 * F.mse_loss(rest, code.detach()))
    assert_values(torch.stack(parts), numbers["losses"])
    loss = torch.stack(parts).sum()
    assert_gradient(gradients(loss, x)["input"], numbers["grad.loss.input"])


def test_diversity():
    numbers = load("vqp_diversity")
    quantizer = VQ(8, 32, entropy_temperature=1.0)
    load_codes(quantizer, numbers)
    x = numbers["input"]
    p = (-torch.cdist(x, numbers["codes"])).softmax(-1)
    of_place = partial(batch_entropy, even=1 / 32, maximum=math.log(32), across_processes=False)
    entropy = torch.stack([of_place(mass, mass.sum()) for mass in p.sum(0)]).mean()
    assert_values(-entropy, numbers["diversity"])
    commitment = quantizer(x).losses.commitment
    assert_values(commitment, numbers["commitment"])
    assert_values(0.25 * commitment - 0.5 * entropy, numbers["loss"])
    assert abs(quantizer.entropy(x).batch - entropy) > 1e-3


def test_orthogonality_of_learned_codes():
    numbers = load("vqp_orthogonal")
    quantizer = VQ(8, 32)
    load_codes(quantizer, numbers)
    x = leaf(numbers["input"])
    _, _, losses = quantizer(x)
    orthogonal = orthogonality(quantizer.codebook.codes())
    assert_values(orthogonal, numbers["orthogonal"])
    loss = 0.25 * losses.commitment + 10 * orthogonal
    assert_values(loss, numbers["loss"])
    assert_gradient(gradients(loss, x)["input"], numbers["grad.loss.input"])
    # there the value of z has no gradient to the codes
    loss = loss + 0.25 * losses.codebook
    found = gradients(loss, x, quantizer)["codebook.weight"]
    assert_gradient(found, numbers["grad.total.codes"])


def test_orthogonality_of_several_codebooks():
    numbers = load("vqp_orthogonal_loss")
    ours = torch.stack([orthogonality(codes) for codes in numbers["codes"]]).mean()
    assert_values(ours, numbers["loss"])


def load_codes(quantizer, numbers):
    with torch.no_grad():
        quantizer.codebook.weight.copy_(numbers["codes"])
