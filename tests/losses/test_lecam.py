"""LeCam: the penalty, and running means that move when they should."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.config import build, describe
from xq.losses import LeCam, lecam


def pairs(steps: int, shape: tuple[int, ...] = (3, 5)) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(shape, generator=generator) for _ in range(2)] for _ in range(steps)]


def naive(real: Tensor, fake: Tensor, real_mean: float, fake_mean: float) -> float:
    """Logit after logit."""
    above = [max(r - fake_mean, 0) ** 2 for r in real.flatten().tolist()]
    below = [max(real_mean - f, 0) ** 2 for f in fake.flatten().tolist()]
    return sum(above) / len(above) + sum(below) / len(below)


def means(module: LeCam) -> tuple[float, float]:
    return module.real_mean.item(), module.fake_mean.item()


def test_values_and_means():
    loss = LeCam(0.8)
    real_mean = fake_mean = 0.0
    for real, fake in pairs(5):
        fake = fake[:2]
        real_mean = 0.8 * real_mean + 0.2 * real.mean().item()
        fake_mean = 0.8 * fake_mean + 0.2 * fake.mean().item()
        # they move before they are used
        assert loss(real, fake).item() == pytest.approx(naive(real, fake, real_mean, fake_mean))
        assert means(loss) == pytest.approx((real_mean, fake_mean))


def test_the_function():
    real, fake = pairs(1)[0]
    found = lecam(real, fake, torch.tensor(0.3), torch.tensor(-0.2))
    assert found.item() == pytest.approx(naive(real, fake, 0.3, -0.2))


def test_one_side_of_each_mean():
    """What lies beyond the other kind's mean already is left alone."""
    zero = torch.zeros(())
    assert lecam(torch.tensor([-2.0]), torch.tensor([2.0]), zero, zero) == 0
    assert lecam(torch.tensor([2.0]), torch.tensor([-2.0]), zero, zero) == 8


def test_gradcheck():
    real, fake = (x.double().requires_grad_() for x in pairs(1)[0])
    mean = [torch.tensor(v, dtype=torch.float64) for v in (0.2, -0.3)]
    assert torch.autograd.gradcheck(lecam, (real, fake, *mean))
    loss = LeCam().eval()
    assert torch.autograd.gradcheck(loss, (real, fake))


def test_no_gradient_through_the_means():
    real, fake = (x.requires_grad_() for x in pairs(1)[0])
    loss = LeCam(0.5)
    loss(real, fake).backward()
    assert not loss.real_mean.requires_grad
    by_real = 2 * (real.detach() - loss.fake_mean).clamp(min=0) / real.numel()
    torch.testing.assert_close(real.grad, by_real)


def test_the_means_move_in_training_with_gradients_alone():
    loss = LeCam(0.9)
    (real, fake), (other, another) = pairs(2)
    loss(real, fake)
    before = means(loss)
    with torch.no_grad():
        loss(other, another)
    assert means(loss) == before
    loss.eval()
    value = loss(other, another)
    assert means(loss) == before
    assert value.item() == pytest.approx(naive(other, another, *before))
    loss.train()
    loss(other, another)
    assert means(loss) != before


def test_not_twice_under_activation_checkpointing():
    real, fake = (x.requires_grad_() for x in pairs(1)[0])
    plain, saving = LeCam(0.9), LeCam(0.9)
    plain(real, fake)
    checkpoint(saving, real, fake, use_reentrant=False).backward()
    assert means(saving) == means(plain)
    assert means(plain) != (0, 0)


def test_saved_and_resumed():
    batches = pairs(6)
    through, first = LeCam(0.9), LeCam(0.9)
    for real, fake in batches:
        through(real, fake)
    for real, fake in batches[:3]:
        first(real, fake)
    assert list(first.state_dict()) == ["real_mean", "fake_mean"]
    second = LeCam(0.9)
    second.load_state_dict(first.state_dict())
    for real, fake in batches[3:]:
        second(real, fake)
    assert means(second) == means(through)
    assert not list(second.parameters())
    second.reset_parameters()
    assert means(second) == (0, 0)


def test_extreme_logits():
    for real, fake in (([1e4, -1e4], [-1e4, 1e4]), ([1e4], [-1e4]), ([-1e4], [1e4])):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = (torch.tensor(v, dtype=dtype).requires_grad_() for v in (real, fake))
            loss = LeCam()(x, y)
            loss.backward()
            assert loss.isfinite()
            assert x.grad.isfinite().all()
            assert y.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    # a module that was cast keeps its means wide, else 0.999 would be rounded to 1
    cast, plain = LeCam().to(dtype), LeCam()
    assert cast.real_mean.dtype == torch.float32
    for real, fake in pairs(3):
        real, fake = real.to(dtype), fake.to(dtype)
        with torch.autocast("cpu", dtype):
            found = cast(real, fake)
        assert found.dtype == torch.float32
        assert torch.equal(found, plain(real.float(), fake.float()))
    assert means(cast) == means(plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_but_does_not_stay(bad):
    (real, fake), (other, another) = pairs(2)
    loss, clean = LeCam(0.5), LeCam(0.5)
    loss(real, fake)
    wrong = other.clone()
    wrong[0, 0] = bad
    value = loss(wrong, another)
    assert value.isfinite() == (bad == -math.inf), "the hinge is flat there"
    clean(real, fake)
    before = clean.real_mean.clone()
    clean(other, another)
    assert torch.equal(loss.real_mean, before)
    assert torch.equal(loss.fake_mean, clean.fake_mean)


@pytest.mark.compile
def test_one_graph():
    torch._dynamo.reset()
    plain = LeCam(0.9)
    module = copy.deepcopy(plain)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    for real, fake in pairs(3):
        x, y = ([t.clone().requires_grad_() for t in (real, fake)] for _ in range(2))
        losses = plain(*x), graph(*y)
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close([t.grad for t in x], [t.grad for t in y])
        torch.testing.assert_close(plain.state_dict(), module.state_dict())
    before = means(module)
    module.eval()
    graph(*pairs(1)[0])
    assert means(module) == before


def test_config_and_copies():
    loss = LeCam(0.7)
    assert isinstance(loss, nn.Module)
    assert describe(build(describe(loss))) == {"class": "LeCam", "decay": 0.7}
    assert "decay=0.7" in repr(loss)


def test_bad_input():
    real, fake = pairs(1)[0]
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"LeCam needs a decay in \[0, 1\), got {decay}"):
            LeCam(decay)
    loss = LeCam()
    with pytest.raises(ValueError, match=r"LeCam takes real logits, .* looks like images"):
        loss(torch.zeros(2, 3, 8, 8), fake)
    with pytest.raises(ValueError, match="LeCam got no fake logits"):
        loss(real, fake[:0])
    with pytest.raises(ValueError, match=r"LeCam takes logits of one shape .* fake \(3, 2\)"):
        loss(real, fake[:, :2])
    assert means(loss) == (0, 0)
