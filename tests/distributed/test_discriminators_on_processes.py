"""Discriminators under DistributedDataParallel: gradients of two processes are those of one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xq.losses import DINODiscriminator, PatchGAN, StyleGANDiscriminator

pytestmark = pytest.mark.distributed

NAMES = ("patchgan", "patchgan of batches", "stylegan", "dino")


class Patches(nn.Module):
    """What a discriminator sees of a ViT, without the time that timm takes to start."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.patch_embed.patch_size, self.patch_embed.img_size = (4, 4), (16, 16)
        self.embed_dim = 8
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)))

    def forward_intermediates(self, images, indices, return_prefix_tokens=False, **options):
        features = [self.patch_embed(images).flatten(2).mT]
        for block in self.blocks:
            features.append(block(features[-1]))
        # the first block is the embedding
        return [features[i + 1] for i in indices]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "patchgan":
        return PatchGAN(channels=4, depth=1, norm="group")
    if name == "patchgan of batches":
        return PatchGAN(channels=4, depth=1)
    if name == "stylegan":
        return StyleGANDiscriminator(16, max_channels=4)
    return DINODiscriminator(Patches(), depths=(0, 2), size=16, norm="group")


def redraw_(model: nn.Module, seed: int) -> None:
    """Other vectors of spectral normalization."""
    torch.manual_seed(seed)
    for key, buffer in model.named_buffers():
        if key.endswith(("weight_u", "weight_v")):
            buffer.copy_(F.normalize(torch.randn_like(buffer), dim=0))


def gradients(model: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> Any:
    """Of a hinge loss, in a second step."""
    for _ in range(2):
        model.zero_grad()
        # two forward passes before one backward pass
        loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
        loss.backward()
    return {key.removeprefix("module."): p.grad for key, p in model.named_parameters()}


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 4, 3, 16, 16, generator=generator) * 2 - 1


def on_a_process(rank, join):
    """Gradients and state of each, two images a process, and how many constants are sent around."""
    join()
    parts, found = images()[:, 2 * rank : 2 * rank + 2], {}
    for name in NAMES:
        model = build(name)
        redraw_(model, rank)
        wrapped = DistributedDataParallel(model)
        found[name] = gradients(wrapped, *parts), model.state_dict()
        if name == "dino":
            sent = {id(buffer) for buffer in wrapped.modules_buffers}
            constants = [id(buffer) in sent for buffer in model.vit.buffers()]
            found["constants"] = len(constants), sum(constants)
    return found


@pytest.fixture(scope="module")
def both(on_processes):
    return on_processes(on_a_process)


@pytest.mark.parametrize("name", ["patchgan", "stylegan", "dino"])
def test_two_processes_equal_one(both, name):
    (first, state), (second, _) = (found[name] for found in both)
    model = build(name)
    # the vectors of the first process are everyone's
    redraw_(model, 0)
    expected = gradients(model, *images())
    assert set(first) == set(expected)
    for key, gradient in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(state, model.state_dict())


def test_batch_norm_of_each_process(both):
    (first, _), (second, _) = (found["patchgan of batches"] for found in both)
    for key, gradient in first.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, second[key])


def test_constants_are_not_sent_around(both):
    for found in both:
        constants, sent = found["constants"]
        assert constants == 6
        assert sent == 0
