"""Losses and discriminators, forward and backward, beside the packages that people use."""

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import harness, peers, pictures
from benchmarks.cases import XQ, Case, Spec
from benchmarks.gates import check_close, check_finite, gradient
from xq.losses import (
    LPIPS,
    DiffAug,
    DINODiscriminator,
    DiscriminatorLoss,
    LeCam,
    PatchGAN,
    StyleGANDiscriminator,
    adaptive_weight,
    code_entropy,
    codebook_loss,
    contrastive_loss,
    entropy_loss,
    generator_loss,
    l1,
    l2,
    r1,
)
from xq.losses.trunks import NETS, Trunk

LPIPS_PACKAGE, PLAIN = "lpips", "plain torch"
BATCH, SIDE = 4, 256
VIT = "vit_small_patch16_224.dino"
_TOLERANCE = 1e-4


class Pass(NamedTuple):
    """What a pass leaves behind."""

    loss: Tensor
    grad: Tensor


def lpips_case(net: str, batch: int, side: int, device: str) -> Case:
    """LPIPS of a reconstruction, and its gradient, with random weights."""
    target = _images(batch, side, device)
    image = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    trunk, heads = _random_trunk(net)

    def check(results: dict[str, Pass]) -> dict[str, str]:
        mine, said = results[XQ], {}
        check_finite(XQ, loss=mine.loss, gradient=mine.grad)
        if LPIPS_PACKAGE in results:
            theirs = results[LPIPS_PACKAGE]
            check_close(XQ, "the distance", mine.loss, theirs.loss, _TOLERANCE)
            off = check_close(XQ, "the gradient", mine.grad, theirs.grad, _TOLERANCE)
            said[LPIPS_PACKAGE] = f"off by {off:.0e}"
        return said

    case = Case(check)
    case.add(XQ, lambda: _passes(_our_lpips(net, trunk, heads, device), image, target), ours=True)
    case.add(LPIPS_PACKAGE, lambda: _passes(_their_lpips(net, trunk, heads, device), image, target))
    return case


def _random_trunk(net: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a trunk by torchvision's names, and of the heads by those of lpips."""
    generator = torch.Generator().manual_seed(0)
    trunk = {}
    for name, empty in Trunk(net).named_buffers():
        deviation = (2 / max(empty[0].numel(), 1)) ** 0.5 if name.endswith("weight") else 0.1
        trunk[name] = deviation * torch.randn(empty.shape, generator=generator)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for i, channels in enumerate(NETS[net].channels)
    }
    return trunk, heads


def _our_lpips(net: str, trunk: Any, heads: Any, device: str) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "trunk.safetensors", Path(folder) / "heads.pth"
        save_file(trunk, paths[0])
        torch.save(heads, paths[1])
        return LPIPS(net, weights=paths[0], heads=paths[1]).to(device)


def _their_lpips(net: str, trunk: Any, heads: Any, device: str) -> Callable[..., Tensor]:
    peers.needs("lpips", "lpips")
    import lpips

    with warnings.catch_warnings():
        # of torchvision, about how lpips calls it
        warnings.simplefilter("ignore", UserWarning)
        module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    state = module.state_dict()
    for name in state:
        start, _, rest = name.partition(".")
        if start == "net":
            state[name] = trunk["features." + rest.partition(".")[2]]
        elif start in ("lins", *(f"lin{i}" for i in range(len(heads)))):
            state[name] = heads[name if start != "lins" else f"lin{rest}"]
    module.load_state_dict(state)
    module = module.requires_grad_(False).eval().to(device)
    return lambda image, target: module(image, target).mean()


def discriminator_case(kind: str, batch: int, side: int, device: str) -> Case:
    """The discriminator's step: real and generated images, hinge, gradients of its parameters."""
    torch.manual_seed(0)
    module = _discriminator(kind, side).to(device)
    real, fake = _images(batch, side, device), _images(batch, side, device)
    loss = DiscriminatorLoss()
    last = [p for p in module.parameters() if p.requires_grad][-1]

    def run() -> Pass:
        module.zero_grad()
        value = loss(module(real), module(fake))
        value.backward()
        return Pass(value.detach(), gradient(last))

    case = Case(_finite)
    case.add(XQ, lambda: run, ours=True)
    return case


def _discriminator(kind: str, side: int) -> nn.Module:
    if kind == "PatchGAN":
        return PatchGAN()
    if kind == "StyleGAN":
        # a trial run need not fill 512 channels
        return StyleGANDiscriminator(side, max_channels=512 if side == SIDE else 16)
    peers.needs("timm", "timm")
    import timm

    # of any weights; as large as the images, up to its own
    size = min(side, 224)
    vit = timm.create_model(VIT, pretrained=False, num_classes=0, img_size=size)
    return DINODiscriminator(vit, size=size)


def image_case(kind: str, batch: int, side: int, device: str) -> Case:
    """What is computed of reconstructed images, with their gradient."""
    torch.manual_seed(0)
    target = _images(batch, side, device)
    image = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "L1": l1,
        "L2": l2,
        "DiffAug": lambda x, _: augment(x, 0.5).square().mean(),
        "R1": lambda x, _: r1(x, judge(x)),
        "adaptive weight": _weighted,
    }
    augment, judge = DiffAug(), PatchGAN().to(device)
    case = Case(_finite)
    case.add(XQ, lambda: _passes(functions[kind], image, target), ours=True)
    return case


def _weighted(image: Tensor, target: Tensor) -> Tensor:
    layer = torch.eye(3, device=image.device)[..., None, None].requires_grad_()
    image = F.conv2d(image, layer)
    pixels, adversarial = l2(image, target), generator_loss(image.flatten(1))
    return pixels + adaptive_weight(pixels, adversarial, layer) * adversarial


def token_case(kind: str, tokens: int, codes: int, device: str) -> Case:
    """What is computed of tokens or logits, with the gradient."""
    torch.manual_seed(0)
    x, z = (torch.randn(tokens, codes, device=device) for _ in range(2))
    lecam = LeCam().to(device)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "codebook loss": codebook_loss,
        "entropy loss": lambda x, _: entropy_loss(x, code_entropy),
        "hinge with LeCam": lambda x, z: DiscriminatorLoss()(x, z) + lecam(x, z),
    }
    case = Case(_finite)
    case.add(XQ, lambda: _passes(functions[kind], x.requires_grad_(), z), ours=True)
    return case


def contrast_case(batch: int, dim: int, device: str) -> Case:
    """CLIP's loss, whose logits we make a block at a time."""
    torch.manual_seed(0)
    x, z = (torch.randn(batch, dim, device=device) for _ in range(2))
    x.requires_grad_()

    def plain(x: Tensor, z: Tensor) -> Tensor:
        logits = F.normalize(x, dim=-1) @ F.normalize(z, dim=-1).T / 0.07
        labels = torch.arange(len(x), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def check(results: dict[str, Pass]) -> dict[str, str]:
        mine, theirs = results[XQ], results[PLAIN]
        check_close(XQ, "the loss", mine.loss, theirs.loss, _TOLERANCE)
        off = check_close(XQ, "the gradient", mine.grad, theirs.grad, _TOLERANCE)
        return {PLAIN: f"off by {off:.0e}"}

    case = Case(check)
    case.add(XQ, lambda: _passes(contrastive_loss, x, z), ours=True)
    case.add(PLAIN, lambda: _passes(plain, x, z))
    return case


def _images(batch: int, side: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, 3, side, side, generator=generator) * 2 - 1).to(device)


def _passes(loss: Callable[..., Tensor], x: Tensor, target: Tensor) -> Callable[[], Pass]:
    return partial(_passed, loss, x, target)


def _passed(loss: Callable[..., Tensor], x: Tensor, target: Tensor) -> Pass:
    x.grad = None
    value = loss(x, target)
    value.backward()
    return Pass(value.detach(), gradient(x))


def _finite(results: dict[str, Pass]) -> dict[str, str]:
    for name, result in results.items():
        check_finite(name, loss=result.loss, gradient=result.grad)
    return {}


def specs(device: str, quick: bool) -> list[Spec]:
    """Losses of images, discriminators, losses of tokens."""
    batch, side = (2, 64) if quick else (BATCH, SIDE)
    sizes, tiny = {"batch": batch, "side": side}, {"batch": 2, "side": 64}
    tokens, few = (64, 16) if quick else (1024, 4096), {"tokens": 8, "codes": 8}
    contrast = {"batch": 16, "dim": 8} if quick else {"batch": 1024, "dim": 768}
    found = [
        Spec(f"LPIPS {net}", lpips_case, {"net": net, **sizes}, tiny, seconds=30)
        for net in (("alex",) if quick else ("vgg", "alex", "squeeze"))
    ]
    for kind in ("PatchGAN", "DINO v1 ViT-S/16", "StyleGAN"):
        found.append(Spec(f"{kind}, its step", discriminator_case, {"kind": kind, **sizes}, tiny))
    for kind in ("L1", "L2", "DiffAug", "R1", "adaptive weight"):
        found.append(Spec(kind, image_case, {"kind": kind, **sizes}, tiny, seconds=4))
    for kind in ("codebook loss", "entropy loss", "hinge with LeCam"):
        size = {"kind": kind, "tokens": tokens[0], "codes": tokens[1]}
        found.append(Spec(f"{kind} {tokens[0]} x {tokens[1]}", token_case, size, few, seconds=4))
    name = "contrast {batch} x {dim}".format(**contrast)
    return [*found, Spec(name, contrast_case, contrast, {"batch": 4}, seconds=4)]


def draw(document: dict[str, Any]) -> Figure:
    """A bar for each contender."""
    return pictures.bars(document)


BENCHMARK = harness.Benchmark(
    "losses",
    f"Losses and discriminators at {BATCH} images of {SIDE} x {SIDE}: forward and backward",
    specs,
    {},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.losses import main as importable

    sys.exit(importable())
