"""Adversarial losses, LeCam and the adaptive weight against XQ-GAN's, which are LlamaGen's too.

Deliberate difference: its non-saturating losses have the arguments of binary cross-entropy swapped.
Its discriminator gets no gradient from generated images then, and its generator the gradient of the
hinge; ours are what the name promises.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import assert_gradient, assert_values, below, leaf, load

from xq.losses import LeCam, adaptive_weight, discriminator_loss, generator_loss, ramp

NUMBERS = load("xqgan_gan_losses")


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator(kind):
    numbers = below(NUMBERS, f"discriminator.{kind}")
    real, fake = leaf(NUMBERS["real"]), leaf(NUMBERS["fake"])
    loss = discriminator_loss(real, fake, kind)
    loss.backward()
    assert_values(loss, numbers["value"])
    assert_gradient(real.grad, numbers["grad.real"])
    assert_gradient(fake.grad, numbers["grad.fake"])


def test_hinge_generator():
    numbers = below(NUMBERS, "generator.hinge")
    fake = leaf(NUMBERS["fake"])
    loss = generator_loss(fake)
    loss.backward()
    assert_values(loss, numbers["value"])
    assert_gradient(fake.grad, numbers["grad.fake"])


def test_non_saturating_is_what_it_should_be():
    real, fake = leaf(NUMBERS["real"]), leaf(NUMBERS["fake"])
    of_discriminator = discriminator_loss(real, fake, "non_saturating")
    of_generator = generator_loss(fake, "non_saturating")
    assert_values(of_discriminator, NUMBERS["intended.discriminator"])
    assert_values(of_generator, NUMBERS["intended.generator"])
    by_own = torch.autograd.grad(of_generator, fake)[0]
    of_discriminator.backward()
    # -log sigmoid has the gradient sigmoid - 1
    assert_gradient(by_own, (NUMBERS["fake"].sigmoid() - 1) / fake.numel())
    assert_gradient(real.grad, (NUMBERS["real"].sigmoid() - 1) / (2 * real.numel()))
    assert_gradient(fake.grad, NUMBERS["fake"].sigmoid() / (2 * fake.numel()))


def test_non_saturating_as_released():
    """With arguments swapped: logits as the target, ones and zeros as the logits."""
    real, fake = leaf(NUMBERS["real"]), leaf(NUMBERS["fake"])
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    swapped = F.binary_cross_entropy_with_logits
    of_discriminator = (swapped(ones, real) + swapped(zeros, fake)) / 2
    of_generator = swapped(ones, fake)
    for name, loss in (("discriminator", of_discriminator), ("generator", of_generator)):
        assert_values(loss, NUMBERS[f"{name}.non_saturating.value"])
    assert not NUMBERS["discriminator.non_saturating.grad.fake"].any()
    # hence these are lines: -real / 2 and a constant, and -fake and a constant
    assert_gradient(-ones / (2 * real.numel()), NUMBERS["discriminator.non_saturating.grad.real"])
    by_fake = NUMBERS["generator.non_saturating.grad.fake"]
    assert_gradient(torch.autograd.grad(generator_loss(fake, "hinge"), fake)[0], by_fake)
    right = discriminator_loss(real, fake, "non_saturating")
    assert (right - NUMBERS["discriminator.non_saturating.value"]).abs() > 1e-3
    assert torch.autograd.grad(right, fake)[0].min() > 0


def test_lecam_step_by_step():
    loss = LeCam(decay=0.999)
    steps = sum(key.endswith("reg") for key in below(NUMBERS, "lecam"))
    assert steps == 4
    for i in range(steps):
        numbers = below(NUMBERS, f"lecam.{i}")
        assert_values(loss(numbers["real"], numbers["fake"]), numbers["reg"])
        assert_values(loss.real_mean, numbers["ema_real"], atol=1e-8)
        assert_values(loss.fake_mean, numbers["ema_fake"], atol=1e-8)


def test_lecam_that_forgets_faster():
    numbers = below(NUMBERS, "lecam_fast")
    loss = LeCam(decay=0.9)
    assert_values(loss(numbers["real"], numbers["fake"]), numbers["reg"])
    assert_values(loss.real_mean, numbers["ema_real"], atol=1e-8)
    assert_values(loss.fake_mean, numbers["ema_fake"], atol=1e-8)


def test_adaptive_weight():
    numbers = below(NUMBERS, "adaptive")
    last = leaf(numbers["last_weight"])
    made = F.linear(numbers["h"], last)
    reconstruction = F.mse_loss(made, numbers["target"])
    adversarial = generator_loss(made[:, :3])
    assert_values(reconstruction, numbers["nll"])
    assert_values(adversarial, numbers["g_loss"])
    assert_values(adaptive_weight(reconstruction, adversarial, last), numbers["d_weight"])


def test_the_start():
    """Its weight is 0 before the step named as the start, and whole from it on."""
    assert [0.5 * ramp(step, 10) for step in (9, 10)] == [0.0, 0.5]
