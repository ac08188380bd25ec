"""GumbelVQ against torch's own Gumbel-softmax."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xq.quantizers import GumbelVQ, ProductQuantizer, ResidualQuantizer


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_values_and_gradients_equal_those_of_gumbel_softmax(hard: bool, temperature: float) -> None:
    quantizer = GumbelVQ(5, 13, temperature=temperature, hard=hard)
    tensors = (quantizer.scores.weight, quantizer.scores.bias, quantizer.codebook.weight)
    x = torch.randn(3, 7, 5, requires_grad=True)
    torch.manual_seed(1)
    z, indices, losses = quantizer(x)
    torch.manual_seed(1)
    scores = F.linear(x, *tensors[:2])
    weights = F.gumbel_softmax(scores, temperature, hard=hard)
    want = weights @ tensors[2]
    assert torch.equal(indices, weights.argmax(-1))
    torch.testing.assert_close(z, want)
    log_p = scores.log_softmax(-1)
    even = torch.full_like(log_p, -math.log(13)).flatten(0, -2)
    divergence = F.kl_div(even, log_p.flatten(0, -2), log_target=True, reduction="batchmean")
    torch.testing.assert_close(losses.regularizer, divergence)
    assert losses.commitment == losses.codebook == 0

    cotangent = torch.randn_like(z)
    found = torch.autograd.grad((z * cotangent).sum() + losses.regularizer, (x, *tensors))
    wanted = torch.autograd.grad((want * cotangent).sum() + divergence, (x, *tensors))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_hard_choice_decodes_bit_for_bit_in_training() -> None:
    quantizer = GumbelVQ(5, 13, hard=True)
    z, indices, _ = quantizer(torch.randn(40, 5))
    assert torch.equal(quantizer.decode(indices), z)


@pytest.mark.parametrize("how", ["eval", "no_grad", "encode"])
def test_no_noise_outside_training(how: str) -> None:
    quantizer = GumbelVQ(5, 13)
    x = torch.randn(40, 5)
    best = F.linear(x, quantizer.scores.weight, quantizer.scores.bias).argmax(-1)
    if how == "encode":
        assert torch.equal(quantizer.encode(x), best)
        return
    quantizer.train(how != "eval")
    with torch.set_grad_enabled(how == "eval"):
        z, indices, losses = quantizer(x)
    assert torch.equal(indices, best)
    assert torch.equal(quantizer.decode(indices), z)
    assert losses.regularizer == 0


def test_eval_mode_has_the_gradient_of_the_soft_choice() -> None:
    quantizer = GumbelVQ(5, 13, temperature=0.7).eval()
    x = torch.randn(4, 5, requires_grad=True)
    (found,) = torch.autograd.grad(quantizer(x).z.sum(), x)
    scores = F.linear(x, quantizer.scores.weight, quantizer.scores.bias)
    soft = (scores / 0.7).softmax(-1) @ quantizer.codebook.weight.detach()
    (wanted,) = torch.autograd.grad(soft.sum(), x)
    torch.testing.assert_close(found, wanted)


def test_the_temperature_may_follow_a_schedule() -> None:
    quantizer = GumbelVQ(5, 13)
    x = torch.randn(30, 5)
    quantizer.temperature = 1e-4
    z, indices, _ = quantizer(x)
    torch.testing.assert_close(z, quantizer.decode(indices))
    quantizer.temperature = 1e6
    mean = quantizer.codebook.weight.mean(0)
    torch.testing.assert_close(quantizer(x).z, mean.expand(30, 5), rtol=1e-4, atol=1e-4)
    assert quantizer.config()["temperature"] == 1e6


def test_indices_are_drawn_by_the_softmax_of_the_scores() -> None:
    quantizer = GumbelVQ(3, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 3)
    p = F.linear(x, quantizer.scores.weight, quantizer.scores.bias).softmax(-1)[0]
    drawn = quantizer(x.expand(50_000, 3)).indices.bincount(minlength=6) / 50_000
    spread = (p * (1 - p) / 50_000).sqrt()
    assert ((drawn - p).abs() < 4 * spread).all()


def test_a_generator_makes_it_repeatable_and_leaves_torchs_alone() -> None:
    x = torch.randn(20, 5)
    quantizer = GumbelVQ(5, 13, generator=torch.Generator().manual_seed(3))
    twins = copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))
    before = torch.get_rng_state()
    first = quantizer(x).z
    assert not torch.equal(quantizer(x).z, first)
    for twin in twins:
        assert torch.equal(twin(x).z, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_draws_the_same_noise_again() -> None:
    plain = GumbelVQ(5, 13)
    again = copy.deepcopy(plain)
    x = torch.randn(20, 5)
    grads = []
    for run in (plain, lambda x: checkpoint(again, x, use_reentrant=False)):
        torch.manual_seed(2)
        run(x).z.square().sum().backward()
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
        grads.append(one.grad)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("options", [{"depth": 2}, {"multiscale": (1, 2)}])
def test_it_is_no_step_of_a_residual(options: dict) -> None:
    with pytest.raises(ValueError, match=r"cannot have GumbelVQ as a step: .*once a step"):
        ResidualQuantizer(GumbelVQ(5, 13), **options)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_do_not_fit(temperature: float) -> None:
    with pytest.raises(
        ValueError, match=f"GumbelVQ needs a temperature above 0, got {temperature}"
    ):
        GumbelVQ(5, 13, temperature=temperature)


def test_copies_start_apart() -> None:
    one, two = ProductQuantizer(GumbelVQ(8, 500), P=2).branches
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert not torch.equal(a, b)
    assert 0.9 < one.codebook.weight.std() < 1.1
