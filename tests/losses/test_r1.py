"""R1 against penalties known in closed form, and through second derivatives."""

import copy

import pytest
import torch
from torch import Tensor, nn

from xq.config import build, describe
from xq.losses import R1, DiscriminatorLoss, PatchGAN, r1

WIDE = {"dtype": torch.float64}


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 2, 4, 5, generator=generator, **WIDE).requires_grad_()


def small() -> nn.Sequential:
    """Smooth, so that all its derivatives are there; two patches an image."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d((1, 2)), nn.Conv2d(3, 1, 1)).double()


def test_a_linear_discriminator():
    x = images()
    weight = torch.randn(x[0].numel(), **WIDE, requires_grad=True)
    penalty = r1(x, x.flatten(1) @ weight)
    torch.testing.assert_close(penalty, weight.square().sum() / 2)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, weight.detach())


def test_a_quadratic_discriminator():
    """Of x.A x the gradient is (A + A^T) x."""
    x, a = images(), torch.randn(40, 40, **WIDE, requires_grad=True)
    rows = x.flatten(1)
    penalty = R1()(x, (rows @ a * rows).sum(1))
    want = (rows @ (a + a.t())).square().sum(1).mean() / 2
    torch.testing.assert_close(penalty, want)
    by_a = [torch.autograd.grad(loss, a)[0] for loss in (penalty, want)]
    torch.testing.assert_close(*by_a)


def test_a_mean_over_images_of_what_each_gives():
    x, net = images(), small()
    each = []
    for one in x.detach().unbind():
        one = one[None].requires_grad_()
        (gradient,) = torch.autograd.grad(net(one).mean(), one)
        each.append(gradient.square().sum() / 2)
    torch.testing.assert_close(r1(x, net(x)), torch.stack(each).mean())


def test_several_logits_count_as_their_mean():
    x = images()
    one = x.flatten(1).sum(1)
    torch.testing.assert_close(r1(x, one[:, None].expand(-1, 7)), r1(x, one))


def test_gradcheck_of_first_and_second_order():
    x, net = images(2), small()
    names = [name for name, _ in net.named_parameters()]

    def penalty(*weights: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,))
        return r1(x, logits)

    weights = tuple(w.detach().clone().requires_grad_() for w in net.parameters())
    # all but the last bias, which moves no gradient by an image
    assert torch.autograd.gradcheck(penalty, weights)
    assert torch.autograd.gradgradcheck(penalty, weights)


def test_beside_the_loss_of_one_forward():
    """The penalty shares the logits of the discriminator's loss, and adds its own gradient."""
    torch.manual_seed(1)
    net = PatchGAN(channels=4, depth=2, norm="group").double()
    real, fake = torch.randn(2, 2, 3, 16, 16, **WIDE).requires_grad_().unbind()
    logits = net(real)
    (DiscriminatorLoss("vanilla")(logits, net(fake)) + 10 * r1(real, logits)).backward()
    found = [p.grad.clone() for p in net.parameters()]

    net.zero_grad()
    DiscriminatorLoss("vanilla")(net(real), net(fake)).backward()
    (10 * r1(real, net(real))).backward()
    want = [p.grad for p in net.parameters()]
    torch.testing.assert_close(found, want)


def test_descending_it_flattens_the_discriminator():
    torch.manual_seed(2)
    x, net = images(), small()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    penalties = []
    for _ in range(20):
        loss = r1(x, net(x))
        penalties.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert penalties[-1] < 0.2 * penalties[0]


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size):
    x = images().detach().float().requires_grad_()
    weight = torch.full((40,), size, requires_grad=True)
    penalty = r1(x, x.flatten(1) @ weight + size)
    penalty.backward()
    assert penalty.isfinite()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(penalty.item(), 40 * 1e8 / 2)


def test_bfloat16_autocast():
    x, net = images().detach().float().requires_grad_(), small().float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
        penalty = r1(x, logits)
    assert logits.dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    penalty.backward()
    torch.testing.assert_close(penalty, r1(x, net(x)), rtol=0.05, atol=0)


def test_images_in_half_precision_are_squared_in_float32():
    """A gradient of 2000 has no square in float16."""
    x = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    penalty = r1(x, (x * 2000).sum(1))
    assert penalty.dtype == torch.float32
    assert penalty == 3 * 2000**2 / 2


def test_nan_is_not_hidden():
    x = images()
    logits = x.flatten(1).sum(1)
    bad = torch.tensor([1.0, float("nan"), 1.0], **WIDE)
    assert r1(x, logits * bad).isnan()


def test_a_flat_discriminator():
    x, net = images(), small()
    nn.init.zeros_(net[-1].weight)
    penalty = r1(x, net(x))
    assert penalty == 0
    penalty.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.compile
def test_a_compiled_discriminator_says_no():
    torch._dynamo.reset()
    net = small()
    graph = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        r1(x, graph(x)).backward()
    # the one that is not compiled has the same weights
    r1(x, copy.copy(graph._orig_mod)(x)).backward()
    assert net[0].weight.grad.abs().max() > 0


def test_config():
    assert describe(build(describe(R1()))) == {"class": "R1"}
    assert not R1().state_dict()


def test_bad_input():
    net = small()
    x = images()
    with pytest.raises(ValueError, match=r"call images\.requires_grad_\(\) before"):
        r1(x.detach(), net(x.detach()))
    with torch.no_grad():
        logits = net(x)
    with pytest.raises(ValueError, match=r"logits without a graph: .* do not detach"):
        r1(x, logits)
    late = x.detach()
    logits = net(late)
    with pytest.raises(ValueError, match="logits that do not depend on these images"):
        r1(late.requires_grad_(), logits)
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 5\) and logits of shape \(2, 1, 1, 2\)"):
        r1(x, net(x)[:2])
    with pytest.raises(ValueError, match=r"one image or more .* shape \(0, 2, 4, 5\)"):
        r1(x[:0], net(x)[:0])
    with pytest.raises(ValueError, match=r"logits of shape \(\)"):
        r1(x, net(x).mean())
