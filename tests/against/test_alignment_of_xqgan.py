"""The contrastive loss against XQ-GAN's, and its schedule of the temperature.

Deliberate differences: its scale multiplies logits, ours is one over the temperature; it leaves out
the first samples of each process, ours those that `keep` names.
"""

import pytest
import torch
from golden import assert_gradient, assert_values, below, leaf, load

from xq.losses import contrastive_loss, cooling_temperature


@pytest.mark.parametrize("case", ["raw_scale1", "norm_scale1", "norm_scale50"])
def test_value_and_gradients(case):
    numbers = below(load("xqgan_alignment"), case)
    teacher, student = leaf(numbers["teacher"]), leaf(numbers["student"])
    temperature = 1 / numbers["scale"]
    loss = contrastive_loss(teacher, student, temperature=temperature, normalize=False)
    assert_values(loss, numbers["loss"])
    loss.backward()
    assert_gradient(teacher.grad, numbers["grad_teacher"])
    assert_gradient(student.grad, numbers["grad_student"])
    # its normalized features have length 1 already
    again = contrastive_loss(3 * teacher, 2 * student, temperature=temperature)
    assert (case == "raw_scale1") != torch.isclose(again, loss, atol=2e-5).item()


def test_the_temperature_cools_as_there():
    rows = load("xqgan_alignment")["schedule"].tolist()
    assert len(rows) == 14
    for epoch, first, scale in rows:
        temperature = cooling_temperature(epoch / 200, start=1 / first)
        assert 1 / temperature == pytest.approx(scale, rel=1e-6)
