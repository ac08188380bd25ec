"""The adaptive weight against gradients written out, and what calling it must leave alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.losses import adaptive_weight, generator_loss
from xq.losses.adaptive_weight import _check
from xq.models import CNNDecoder

SIZES = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}


class Linear(nn.Module):
    """An output `y = h W^T` of few entries."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.last = nn.Linear(5, 6, bias=False, dtype=dtype)
        self.h = torch.randn(3, 5, dtype=dtype)
        self.target = torch.randn(3, 6, dtype=dtype)

    def forward(self) -> Tensor:
        return self.last(self.h)

    def losses(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.target).square().mean(), generator_loss(y)

    def naive(self) -> Tensor:
        """Both gradients by hand."""
        y = self().detach()
        by_y = 2 * (y - self.target) / y.numel(), -torch.ones_like(y) / y.numel()
        reconstruction, adversarial = ((g.t() @ self.h).norm() for g in by_y)
        return (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


def test_value():
    net = Linear()
    weight = adaptive_weight(*net.losses(net()), net.last.weight)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, net.naive())


def test_both_pull_alike():
    torch.manual_seed(3)
    decoder = CNNDecoder(4, **SIZES)
    judge = nn.Conv2d(3, 1, 4, stride=4)
    made = decoder(torch.randn(2, 4, 4, 4))
    losses = made.abs().mean(), generator_loss(judge(made))
    weight = adaptive_weight(*losses, decoder.last_layer)
    assert 0 < weight < 1e4
    pulls = [
        torch.autograd.grad(x, decoder.last_layer, retain_graph=True)[0].norm()
        for x in (losses[0], weight * losses[1])
    ]
    torch.testing.assert_close(*pulls, rtol=2e-2, atol=0)


def test_it_leaves_gradients_and_graphs_alone():
    net = Linear()
    reconstruction, adversarial = net.losses(net())
    weight = adaptive_weight(reconstruction, adversarial, net.last.weight)
    assert net.last.weight.grad is None
    (reconstruction + weight * adversarial).backward()
    want = copy.deepcopy(net)
    want.zero_grad()
    parts = want.losses(want())
    (parts[0] + float(weight) * parts[1]).backward()
    torch.testing.assert_close(net.last.weight.grad, want.last.weight.grad)


def test_what_lies_before_the_last_layer_is_not_walked():
    """Its backward would cost as much as that of the whole decoder."""
    walked = []
    x = torch.randn(2, 5, requires_grad=True)
    hidden = x * 2
    hidden.register_hook(lambda grad: walked.append(grad))
    last = nn.Linear(5, 6)
    y = last(hidden)
    adaptive_weight(y.square().mean(), -y.mean(), last.weight)
    assert not walked
    y.mean().backward()
    assert len(walked) == 1


def test_clamped():
    net = Linear()
    reconstruction, adversarial = net.losses(net())
    weight = adaptive_weight(reconstruction * 1e9, adversarial, net.last.weight)
    assert weight == 1e4
    assert adaptive_weight(reconstruction, adversarial * 1e9, net.last.weight) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_zero(dtype):
    net = Linear(dtype)
    reconstruction, adversarial = net.losses(net())
    last = net.last.weight
    assert adaptive_weight(reconstruction * 0, adversarial, last) == 0
    assert adaptive_weight(reconstruction * 0, adversarial * 0, last) == 0
    weight = adaptive_weight(reconstruction, adversarial * 0, last)
    assert 0 < weight <= 1e4
    total = reconstruction + weight * adversarial * 0
    total.backward()
    assert last.grad.isfinite().all()


def test_nan_is_not_hidden():
    net = Linear()
    reconstruction, adversarial = net.losses(net())
    assert adaptive_weight(reconstruction * math.nan, adversarial, net.last.weight).isnan()
    assert adaptive_weight(reconstruction, adversarial * math.nan, net.last.weight).isnan()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size):
    net = Linear(torch.float32)
    y = net()
    for kind in ("hinge", "vanilla", "non_saturating"):
        adversarial = generator_loss(y + size, kind)
        weight = adaptive_weight(y.square().mean(), adversarial, net.last.weight)
        assert weight.isfinite()
        (weight * adversarial).backward(retain_graph=True)
        assert net.last.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype):
    net = Linear(torch.float32)
    want = net.naive()
    with torch.autocast("cpu", dtype):
        reconstruction, adversarial = net.losses(net())
        weight = adaptive_weight(reconstruction, adversarial, net.last.weight)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, want, rtol=0.02, atol=0)

    cast = copy.deepcopy(net).to(dtype)
    cast.h, cast.target = net.h.to(dtype), net.target.to(dtype)
    weight = adaptive_weight(*cast.losses(cast()), cast.last.weight)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, want, rtol=0.05, atol=0)


def test_scaled_losses():
    """A gradient scaler's factor cancels, but for the 1e-4."""
    net = Linear()
    losses = net.losses(net())
    plain = adaptive_weight(*losses, net.last.weight)
    scaled = adaptive_weight(*(65536 * x for x in losses), net.last.weight)
    torch.testing.assert_close(plain, scaled, rtol=1e-2, atol=0)


def test_under_activation_checkpointing():
    net = Linear()
    x = net.h.clone().requires_grad_()
    plain = adaptive_weight(*net.losses(net.last(x)), net.last.weight)
    y = checkpoint(net.last, x, use_reentrant=False)
    reconstruction, adversarial = net.losses(y)
    weight = adaptive_weight(reconstruction, adversarial, net.last.weight)
    torch.testing.assert_close(weight, plain)
    (reconstruction + weight * adversarial).backward()
    assert x.grad.abs().max() > 0


@pytest.mark.compile
def test_losses_of_a_compiled_network():
    torch._dynamo.reset()
    net = Linear()
    graph = torch.compile(net, fullgraph=True, backend="aot_eager")
    reconstruction, adversarial = net.losses(graph())
    weight = adaptive_weight(reconstruction, adversarial, net.last.weight)
    torch.testing.assert_close(weight, net.naive())
    (reconstruction + weight * adversarial).backward()
    found = net.last.weight.grad.clone()
    net.zero_grad()
    reconstruction, adversarial = net.losses(net())
    (reconstruction + weight * adversarial).backward()
    torch.testing.assert_close(found, net.last.weight.grad)


# torch looks at the gradients of what crosses the break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.compile
def test_inside_a_compiled_step():
    """It breaks the graph there, and computes the same."""
    torch._dynamo.reset()
    net = Linear()

    def step() -> Tensor:
        reconstruction, adversarial = net.losses(net())
        return reconstruction + adversarial * adaptive_weight(
            reconstruction, adversarial, net.last.weight
        )

    want = step()
    found = torch.compile(step, backend="aot_eager")()
    torch.testing.assert_close(found, want)
    by_weight = [torch.autograd.grad(x, net.last.weight)[0] for x in (want, found)]
    torch.testing.assert_close(*by_weight)


@pytest.mark.parametrize(
    ("last_layer", "kind"),
    [([torch.zeros(1)], "list"), (nn.Linear(2, 2), "Linear"), (None, "NoneType")],
    ids=["several", "a module", "none"],
)
def test_what_is_not_one_weight(last_layer, kind):
    match = f"takes one weight as last_layer, got a {kind}; pass a tensor, such as decoder.last_l"
    with pytest.raises(ValueError, match=match):
        _check({}, last_layer)


def test_bad_input():
    net = Linear()
    y = net()
    reconstruction, adversarial = net.losses(y)
    last = net.last.weight
    with pytest.raises(ValueError, match="last_layer that is frozen"):
        adaptive_weight(reconstruction, adversarial, last.detach())
    with pytest.raises(ValueError, match=r"takes a scalar reconstruction_loss, got shape \(3, 6\)"):
        adaptive_weight(y, adversarial, last)
    with pytest.raises(ValueError, match="adversarial_loss without a graph"):
        adaptive_weight(reconstruction, adversarial.detach(), last)
    with torch.no_grad():
        validation = net.losses(net())
    with pytest.raises(ValueError, match="reconstruction_loss without a graph"):
        adaptive_weight(*validation, last)
    other = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="adversarial_loss that does not depend on last_layer"):
        adaptive_weight(reconstruction, other.sum(), last)
    with pytest.raises(ValueError, match="reconstruction_loss that does not depend on last_layer"):
        adaptive_weight(reconstruction, adversarial, other)
