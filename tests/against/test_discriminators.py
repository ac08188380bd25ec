"""Discriminators against XQ-GAN's own outputs; `__origin__` in each data file says what it holds.

Deliberate differences:
- Its DINO runs with the tanh form of GELU, ours with the one of timm; here it gets the former.
- Its blur is a part of the saved state, ours is not.
"""

import pytest
import torch
from golden import below, leaf, load
from hashed import fill_hashed_, hashed_images

from xq.losses import DiffAug
from xq.losses.diffaug import gaussian_blur
from xq.losses.discriminators import DINODiscriminator, PatchGAN, StyleGANDiscriminator
from xq.losses.discriminators.dino import _head
from xq.losses.discriminators.layers import LocalBatchNorm
from xq.losses.discriminators.stylegan import binomial_blur


def close(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    """Equal within a share of the largest entry."""
    torch.testing.assert_close(actual, expected, atol=share * expected.abs().max().item(), rtol=0)


def test_patchgan():
    numbers = load("xqgan_patchgan")
    model = PatchGAN(channels=8)
    model.load_state_dict(below(numbers, "state"))
    images = leaf(numbers["images"])
    logits = model(images)
    close(logits, numbers["logits"])
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    close(gradient[..., ::4, ::4], numbers["gradient"])
    state, after = model.state_dict(), below(numbers, "after")
    assert len(after) == 9
    for key, expected in after.items():
        close(state[key].float(), expected.float())
    close(model.eval()(images), numbers["logits_then"])


def test_stylegan():
    numbers = load("xqgan_stylegan")
    model = StyleGANDiscriminator(16)
    fill_hashed_(model)
    images = leaf(hashed_images("sg_in16", (2, 3, 16, 16)))
    logits = model(images)
    close(logits, numbers["logits"], 2e-6)
    close(*torch.autograd.grad(logits.sum(), images), numbers["gradient"], 2e-6)


def test_blur_of_stylegan():
    numbers = load("xqgan_stylegan")
    close(binomial_blur(numbers["blur_input"]), numbers["blurred"])


@pytest.mark.parametrize(
    ("name", "probability", "cutout"),
    [("full", 1.0, 0.2), ("half", 0.5, 0.2), ("no_cutout", 1.0, 0.0)],
)
def test_diffaug(name, probability, cutout):
    numbers = load("xqgan_diffaug")
    generator = torch.Generator().manual_seed(5)
    augment = DiffAug(probability, cutout=cutout, generator=generator)
    images = leaf(numbers["images"])
    augmented = augment(images)
    close(augmented, numbers[name])
    if name == "full":
        close(*torch.autograd.grad(augmented.square().sum(), images), numbers["gradient"])


def test_diffaug_draws_what_the_original_draws():
    numbers = load("xqgan_diffaug")
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3, generator=generator), numbers["gates"])
    assert torch.equal(torch.rand(7, 3, 1, 1, generator=generator), numbers["draws"])


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.1])
def test_blur_of_diffaug(strength):
    numbers = load("xqgan_diffaug")
    close(gaussian_blur(numbers["images"], strength), numbers[f"blurred_{strength}"])


def test_a_head():
    numbers = load("xqgan_dino_head")
    head = _head(16, "batch")
    head.load_state_dict(below(numbers, "state"))
    close(head.eval()(numbers["features"]), numbers["logits_eval"], 2e-6)
    close(head.train()(numbers["features"]), numbers["logits_train"], 2e-6)
    state, after = head.state_dict(), below(numbers, "after")
    assert len(after) == 6
    for key, expected in after.items():
        close(state[key], expected)
    close(LocalBatchNorm(16)(numbers["features"]), numbers["normed"])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_dino(norm):
    timm = pytest.importorskip("timm")
    numbers = load(f"xqgan_dino_{norm}")
    vit = timm.models.VisionTransformer(
        img_size=224, embed_dim=32, depth=12, num_heads=2, num_classes=0, act_layer="gelu_tanh"
    )
    fill_hashed_(vit, "dino.")
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.bias[32:64] = 0
    model = DINODiscriminator(vit, norm=norm)
    model.load_state_dict(below(load("xqgan_dino_heads"), "state"))

    images = leaf(hashed_images("dino64", (4, 3, 64, 64)))
    # the random vectors make singular values near zero, and large logits
    close(model.eval()(images), numbers["logits_eval"], 5e-6)
    logits = model.train()(images)
    close(logits, numbers["logits_train"], 5e-6)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    close(gradient[..., ::4, ::4], numbers["gradient"], 2e-5)

    with torch.no_grad():
        features = model.vit((model._sized(images) - model.shift) / model.scale)
        for i, feature in enumerate(features):
            close(feature[:2, :2], numbers[f"features_{i}"], 5e-6)
        if "logits_256" in numbers:
            larger = hashed_images("dino256", (2, 3, 256, 256))
            close(model.eval()(larger), numbers["logits_256"], 5e-6)
