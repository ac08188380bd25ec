"""Perturbed against XQ-GAN's latent perturbation, given the numbers that it drew.

Deliberate differences: it perturbs the first images of a batch and in eval mode too; ours are drawn
at random, in training alone.
"""

import pytest
import torch
from golden import assert_gradient, assert_values, below, gradients, leaf, load, load_state

from xq.quantizers import VQ, ChannelFirst, Perturbed


@pytest.mark.parametrize("codes", ["unit", "plain"])
@pytest.mark.parametrize("drawn", ["images", "tokens"])
def test_vectors_and_gradient(codes, drawn, monkeypatch):
    numbers = below(load("xqgan_perturbation"), f"{codes}.{drawn}")
    vq = VQ(4, 32, normalize=codes == "unit")
    load_state(vq, numbers)
    alpha, beta, delta = (numbers[name].item() for name in ("alpha", "beta", "delta"))
    perturbed = Perturbed(vq, delta, alpha=alpha, beta=beta)
    first = torch.arange(int(4 * beta))
    prob, rank = (numbers[name].view(4, 3, 3)[first] for name in ("prob", "rank"))
    monkeypatch.setattr(perturbed, "_draw", lambda indices: (first, prob < alpha, rank))

    x = leaf(numbers["input"])
    z, indices, _ = ChannelFirst(perturbed)(x)
    assert_values(z, numbers["z"])
    assert not torch.equal(numbers["z"], numbers["unperturbed"])
    assert_values(ChannelFirst(vq)(x).z, numbers["unperturbed"])
    assert torch.equal(vq.decode(indices).movedim(-1, 1), z)
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, numbers["grad.input"])
