"""A training step of one quantizer: forward, losses, backward."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import harness, peers, pictures
from benchmarks.asked import Asked, Faster, Smaller
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.gates import Nearest, check_close, check_finite, gradient, relative
from xq.quantizers import LFQ, VQ, EMACodebook, GradientCodebook
from xq.quantizers.bits import signs_to_indices

PLAIN = "addmm + embedding"
DECAY = 0.99
# the weights of `Losses.total`; peers get the same
COMMITMENT, CODEBOOK, REGULARIZER = 0.25, 1.0, 0.1
_TOLERANCE = 1e-5
# matrices of tokens x codes in float32 that a softmax with its gradient holds at the worst moment
_MATRICES = 8


class Step(NamedTuple):
    """What a step leaves behind; gradients of the input and of the codes."""

    z: Tensor
    indices: Tensor
    x_grad: Tensor
    codes_grad: Tensor | None = None


def vq_case(n: int, k: int, dim: int, device: str, codebook: str = "learned") -> Case:
    """VQ of n Gaussian vectors; k Gaussian codes, copied into each contender."""
    generator = torch.Generator().manual_seed(0)
    x, codes, pull = (torch.randn(rows, dim, generator=generator).to(device) for rows in (n, k, n))
    x.requires_grad_()

    def check(results: dict[str, Step]) -> dict[str, str]:
        mine = results[XQ]
        truth = Nearest(x, codes)
        truth.check(XQ, mine.indices)
        _check_step(mine, x.detach(), codes, pull, learned=codebook == "learned")
        for name, result in results.items():
            check_finite(name, z=result.z, gradient=result.x_grad)
        shares = {name: truth.hits(r.indices)[0].double().mean() for name, r in results.items()}
        return {name: f"{math.floor(100 * part.item())} % nearest" for name, part in shares.items()}

    # once through the inputs and codes, once for each gradient
    case = Case(check, flops=2.0 * n * k * dim, bytes=4.0 * dim * 2 * (n + k))
    case.add(XQ, lambda: _ours(x, codes, pull, codebook), ours=True)
    case.add(peers.VQP, lambda: _vqp(x, codes, pull, codebook))
    if codebook == "learned":
        case.add(PLAIN, lambda: _plain(x, codes, pull))
    return case


def _check_step(step: Step, x: Tensor, codes: Tensor, pull: Tensor, *, learned: bool) -> None:
    """Output and gradients as the formulas say."""
    chosen = codes[step.indices]
    towards = 2 * (x - chosen) / x.numel()
    check_close(XQ, "z", step.z, chosen, _TOLERANCE)
    check_close(XQ, "the gradient", step.x_grad, pull + COMMITMENT * towards, _TOLERANCE)
    if learned:
        expected = torch.zeros_like(codes).index_add_(0, step.indices, -CODEBOOK * towards)
        if step.codes_grad is None:
            raise Red(f"{XQ}: no gradient reaches the codes")
        check_close(XQ, "the codes' gradient", step.codes_grad, expected, _TOLERANCE)


def _ours(x: Tensor, codes: Tensor, pull: Tensor, codebook: str) -> Callable[[], Step]:
    factory = GradientCodebook if codebook == "learned" else partial(EMACodebook, decay=DECAY)
    module = VQ(codes.shape[1], len(codes), codebook=factory).to(x.device)
    weight: Any = module.codebook.weight
    weight.data.copy_(codes)

    def run() -> Step:
        x.grad = weight.grad = None
        z, indices, losses = module(x)
        ((z * pull).sum() + losses.total()).backward()
        return Step(z.detach(), indices, gradient(x), weight.grad)

    return run


def _vqp(x: Tensor, codes: Tensor, pull: Tensor, codebook: str) -> Callable[[], Step]:
    """`VectorQuantize`, straight through as ours.

    A learned codebook has one error there, whose gradients to codes and inputs weigh the same; its
    weight is the sum of our two.
    """
    learned = codebook == "learned"
    module = peers.vqp().VectorQuantize(
        codes.shape[1],
        len(codes),
        learnable_codebook=learned,
        ema_update=not learned,
        decay=DECAY,
        rotation_trick=False,
        commitment_weight=COMMITMENT + CODEBOOK if learned else COMMITMENT,
    )
    # as in evaluation, and two more matrices for the gradients
    peers.fits(len(x) * len(codes) * (4 + 8 + 4 + 8), x.device.type)
    module = module.to(x.device).train()
    weight = module._codebook.embed
    weight.data.copy_(codes[None])

    def run() -> Step:
        x.grad = weight.grad = None
        z, indices, loss = module(x[None])
        ((z[0] * pull).sum() + loss.sum()).backward()
        return Step(z[0].detach(), indices[0], gradient(x), weight.grad)

    return run


def _plain(x: Tensor, codes: Tensor, pull: Tensor) -> Callable[[], Step]:
    """A VQ as one writes it in a few lines of torch, LlamaGen's in substance."""
    weight = nn.Parameter(codes.clone())

    def run() -> Step:
        x.grad = weight.grad = None
        with torch.no_grad():
            indices = peers.addmm_argmin(x, weight)
        chosen = F.embedding(indices, weight)
        loss = COMMITMENT * F.mse_loss(x, chosen.detach())
        loss = loss + CODEBOOK * F.mse_loss(chosen, x.detach())
        z = x + (chosen - x).detach()
        ((z * pull).sum() + loss).backward()
        return Step(z.detach(), indices, gradient(x), weight.grad)

    return run


def lfq_case(tokens: int, bits: int, device: str) -> Case:
    """LFQ with its entropy penalty."""
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(tokens, bits, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()

    def check(results: dict[str, Step]) -> dict[str, str]:
        mine = results[XQ]
        # channel 0 is the lowest bit of ours, the highest of theirs
        for name, signs in ((XQ, x > 0), (peers.VQP, (x > 0).flip(1))):
            if name in results and not torch.equal(results[name].indices, signs_to_indices(signs)):
                raise Red(f"{name}: the bits of the indices are not the signs of the channels")
        for name, result in results.items():
            check_finite(name, z=result.z, gradient=result.x_grad)
        off = {name: relative(r.x_grad - pull, mine.x_grad - pull) for name, r in results.items()}
        return {name: f"off by {v:.0e}" for name, v in off.items() if name != XQ}

    case = Case(check, flops=3.0 * 2 * tokens * 2**bits, bytes=4.0 * x.numel() * 2)
    case.add(XQ, lambda: _our_lfq(x, pull), ours=True)
    case.add(peers.VQP, lambda: _vqp_lfq(x, pull))
    return case


def _our_lfq(x: Tensor, pull: Tensor) -> Callable[[], Step]:
    module = LFQ(x.shape[1])

    def run() -> Step:
        x.grad = None
        z, indices, losses = module(x)
        ((z * pull).sum() + losses.total()).backward()
        return Step(z.detach(), indices, gradient(x))

    return run


def _vqp_lfq(x: Tensor, pull: Tensor) -> Callable[[], Step]:
    """`LFQ` at our temperature; its entropies floor probabilities at 1e-5, ours are exact."""
    bits = x.shape[1]
    peers.fits(_MATRICES * 4.0 * len(x) * 2**bits, x.device.type)
    module = peers.vqp().LFQ(
        dim=bits,
        codebook_size=2**bits,
        commitment_loss_weight=COMMITMENT,
        entropy_loss_weight=REGULARIZER,
    )
    module = module.to(x.device).train()

    def run() -> Step:
        x.grad = None
        z, indices, loss = module(x[None], inv_temperature=1.0)
        ((z[0] * pull).sum() + loss).backward()
        return Step(z[0].detach(), indices[0], gradient(x))

    return run


LARGE, WIDE = (8192, 16384, 32), (4096, 8192, 256)
TOKENS = {"cpu": 4096, "cuda": 65536}


def specs(device: str, quick: bool) -> list[Spec]:
    """VQ in two sizes, its codes learned or averaged; LFQ in two."""
    if quick:
        return [_vq((64, 48, 8), "learned"), _vq((64, 48, 8), "EMA"), _lfq(64, 6)]
    return [
        *(_vq(sizes, codebook) for sizes in (LARGE, WIDE) for codebook in ("learned", "EMA")),
        _lfq(4096, 14),
        _lfq(TOKENS[device], 18),
    ]


def _vq(sizes: tuple[int, int, int], codebook: str) -> Spec:
    n, k, dim = sizes
    arguments = {"n": n, "k": k, "dim": dim, "codebook": codebook}
    return Spec(_vq_name(sizes, codebook), vq_case, arguments, {"n": 32, "k": 32}, seconds=12)


def _vq_name(sizes: tuple[int, int, int], codebook: str) -> str:
    return "VQ {} x {} x {}, ".format(*sizes) + codebook


def _lfq(tokens: int, bits: int) -> Spec:
    arguments = {"tokens": tokens, "bits": bits}
    return Spec(_lfq_name(tokens, bits), lfq_case, arguments, {"tokens": 8, "bits": 4}, seconds=8)


def _lfq_name(tokens: int, bits: int) -> str:
    return f"LFQ 2^{bits}, {tokens} tokens"


_ASKED_CPU: list[Asked] = [
    Faster(_vq_name(LARGE, "learned"), 30, peers.VQP),
    Faster(_vq_name(LARGE, "EMA"), 30, peers.VQP),
    Faster(_vq_name(WIDE, "learned"), 5, peers.VQP),
    Faster(_vq_name(WIDE, "EMA"), 5, peers.VQP),
    Faster(_lfq_name(4096, 14), 200, peers.VQP),
    Smaller(_lfq_name(TOKENS["cpu"], 18), 256 << 20),
]


def draw(document: dict[str, Any]) -> Figure:
    """A bar for each contender."""
    return pictures.bars(document)


BENCHMARK = harness.Benchmark(
    "step",
    "Training step of one quantizer: forward, losses and backward, float32",
    specs,
    {"cpu": _ASKED_CPU, "cuda": [Smaller(_lfq_name(TOKENS["cuda"], 18), 1 << 30)]},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.step import main as importable

    sys.exit(importable())
