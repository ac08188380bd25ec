"""Adversarial losses over two processes are those of the joint batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sync import CountReductions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xq.losses import (
    DiscriminatorLoss,
    GeneratorLoss,
    LeCam,
    PatchGAN,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1,
)
from xq.losses.adversarial import KINDS

pytestmark = pytest.mark.distributed

# how many of the eight images each process has
SPLITS = {"halves": (4, 4), "uneven": (3, 5)}
STEPS = 3


def logits(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    drawn = torch.randn(steps, 2, 8, 1, 3, 3, generator=generator)
    return [(real + 0.5, fake - 0.5) for real, fake in drawn]


def lecam_of(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    loss, values = LeCam(0.7), []
    with CountReductions() as learning:
        for real, fake in parts:
            values.append(loss(real.requires_grad_(), fake))
    real, fake = parts[-1]
    gradient = torch.autograd.grad(values[-1], real)[0]
    with CountReductions() as silent:
        with torch.no_grad():
            loss(real, fake)
        loss.eval()(real, fake)
    return {
        "state": dict(loss.state_dict()),
        "values": torch.stack(values).detach(),
        "gradient": gradient,
        "calls": (learning.calls, silent.calls),
    }


def plain_losses(real: Tensor, fake: Tensor) -> Tensor:
    """Of each kind, which is a mean over what it is given."""
    of_d = [DiscriminatorLoss(kind)(real, fake) for kind in KINDS]
    return torch.stack(of_d + [GeneratorLoss(kind)(fake) for kind in KINDS])


class Generator(nn.Module):
    """Makes images, and is judged by a fixed discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 48)
        self.judge = PatchGAN(channels=4, depth=1, norm="group").requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.last(self.first(x).tanh()).view(-1, 3, 4, 4)
        return made, self.judge(nn.functional.interpolate(made, scale_factor=2))


def generator_step(wrap: Callable[[nn.Module], Any], x: Tensor, scale: float) -> dict[str, Any]:
    """One step with the adaptive weight; `scale` makes uneven batches count as they should."""
    torch.manual_seed(7)
    plain = Generator()
    net = wrap(plain)
    made, judged = net(x)
    target = x.mean(1)[:, None, None, None]
    reconstruction = scale * (made - target).square().mean()
    adversarial = scale * generator_loss(judged)
    with CountReductions() as count:
        weight = adaptive_weight(reconstruction, adversarial, plain.last.weight)
    untouched = all(p.grad is None for p in plain.parameters())
    with CountReductions() as none:
        own = adaptive_weight(
            reconstruction, adversarial, plain.last.weight, across_processes=False
        )
    (reconstruction + weight * adversarial).backward()
    return {
        "weight": weight,
        "own": own,
        "calls": (count.calls, none.calls),
        "untouched": untouched,
        "gradients": [p.grad for p in (*plain.first.parameters(), *plain.last.parameters())],
    }


def discriminator_step(wrap: Callable[[nn.Module], Any], images: Tensor, scale: float) -> list:
    """One step with R1, whose backward goes through the first one."""
    torch.manual_seed(8)
    plain = PatchGAN(channels=4, depth=1, norm="group")
    net = wrap(plain)
    real, fake = images.clone().requires_grad_(), images.flip(-1) / 2
    judged, made = net(real), net(fake)
    (scale * (discriminator_loss(judged, made, "vanilla") + 10 * r1(real, judged))).backward()
    return [p.grad for p in plain.parameters()]


def inputs() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(9))


def pictures() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(10))


def work(rank: int, join: Callable[[], None]) -> dict[Any, Any]:
    join()
    out: dict[Any, Any] = {}
    for split, sizes in SPLITS.items():
        parts = [tuple(x.split(sizes)[rank].clone() for x in pair) for pair in logits()]
        scale = 2 * sizes[rank] / 8
        out["plain", split] = plain_losses(*parts[0])
        out["lecam", split] = lecam_of(parts)
        part, images = inputs().split(sizes)[rank], pictures().split(sizes)[rank]
        out["generator", split] = generator_step(DistributedDataParallel, part, scale)
        out["discriminator", split] = discriminator_step(DistributedDataParallel, images, scale)
    return out


@pytest.fixture(scope="module")
def both(on_processes) -> list[dict[Any, Any]]:
    """What each of the two processes found."""
    return on_processes(work)


def joint(found: list[Tensor], split: str) -> Tensor:
    """The mean of what each process found, by how many images it has."""
    return sum(x * n / 8 for x, n in zip(found, SPLITS[split], strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_losses_are_means(both, split):
    found = [process["plain", split] for process in both]
    torch.testing.assert_close(joint(found, split), plain_losses(*logits()[0]))


@pytest.mark.parametrize("split", SPLITS)
def test_lecam_follows_the_joint_batch(both, split):
    want = lecam_of([tuple(x.clone() for x in pair) for pair in logits()])
    found = [process["lecam", split] for process in both]
    for mine in found:
        torch.testing.assert_close(mine["state"], want["state"])
        # one a training step, and none in what does not learn
        assert mine["calls"] == (STEPS, 0)
    assert found[0]["state"] == found[1]["state"]
    values = joint([mine["values"] for mine in found], split)
    torch.testing.assert_close(values, want["values"])
    by_real = [mine["gradient"] * n / 8 for mine, n in zip(found, SPLITS[split], strict=True)]
    torch.testing.assert_close(torch.cat(by_real), want["gradient"])


@pytest.mark.parametrize("split", SPLITS)
def test_the_adaptive_weight_is_that_of_the_joint_batch(both, split):
    want = generator_step(copy.copy, inputs(), 1.0)
    assert 0 < want["weight"] < 1e4
    for process in both:
        mine = process["generator", split]
        torch.testing.assert_close(mine["weight"], want["weight"], rtol=1e-4, atol=0)
        assert mine["calls"] == (1, 0)
        # data parallelism has not seen it: what it averages is the gradient of the total alone
        assert mine["untouched"]
        torch.testing.assert_close(mine["gradients"], want["gradients"], rtol=1e-4, atol=1e-6)
    owns = [process["generator", split]["own"] for process in both]
    assert abs(owns[0] - owns[1]) > 1e-3 * owns[0]
    assert want["own"] == want["weight"]


@pytest.mark.parametrize("split", SPLITS)
def test_r1_under_data_parallelism(both, split):
    want = discriminator_step(copy.copy, pictures(), 1.0)
    for process in both:
        torch.testing.assert_close(process["discriminator", split], want, rtol=1e-4, atol=1e-6)
