"""The ramp, and a loop in which nothing of the discriminator is computed before it starts."""

import pytest
import torch
from torch import Tensor, nn

from xq.losses import adaptive_weight, discriminator_loss, generator_loss, ramp


def test_a_step():
    assert [ramp(step, 3) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert ramp(0) == 1


def test_a_rise():
    values = [ramp(step, 2, 3) for step in range(8)]
    assert values == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    # whether it is on is whether it is true
    assert [bool(value) for value in values] == [step >= 2 for step in range(8)]


def test_bad_input():
    with pytest.raises(ValueError, match="ramp needs length >= 0 steps, got -1"):
        ramp(1, 1, -1)


class Counting(nn.Linear):
    """Counts its forward passes, and backward passes through what it gave."""

    forwards = backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits = super().forward(x)
        logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1


def test_nothing_is_computed_before_the_start():
    decoder, discriminator = nn.Linear(4, 4), Counting(4, 1)
    x = torch.randn(5, 4)
    found = []
    for step in range(6):
        made = decoder(x)
        loss = reconstruction = (made - x).square().mean()
        if share := ramp(step, start=4, length=1):
            adversarial = generator_loss(discriminator(made))
            weight = share * adaptive_weight(reconstruction, adversarial, decoder.weight)
            loss = loss + weight * adversarial
        loss.backward()
        if ramp(step, start=2):
            discriminator.zero_grad()
            discriminator_loss(discriminator(x), discriminator(made.detach())).backward()
        found.append((discriminator.forwards, discriminator.backwards))
        discriminator.forwards = discriminator.backwards = 0
        assert (discriminator.weight.grad is None) == (step < 2)
    # two of its own, then the generator's, of which the weight takes a further backward
    assert found == [(0, 0)] * 2 + [(2, 2)] * 2 + [(3, 4)] * 2
