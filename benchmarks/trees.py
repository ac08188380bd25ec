"""The paper's nests, forward and backward, against the loop that VAR and XQ-GAN write."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import harness, peers, pictures
from benchmarks.asked import Asked, Faster
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.gates import Nearest, check_close, check_finite, gradient
from benchmarks.var_loop import VARLoop
from xq.quantizers import (
    BSQ,
    VQ,
    EMACodebook,
    ProductQuantizer,
    Pyramid,
    Refine,
    ResidualQuantizer,
)

LOOP = "VAR-style loop"
SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)
BRANCHES, REFINEMENTS = 2, 4
# the weights of `Losses.total`
COMMITMENT, CODEBOOK, REGULARIZER = 0.25, 1.0, 0.1
_Z, _GRADIENT = 1e-5, 1e-4
# two codes equally near may change places, and then all finer scales differ: draw again
_DRAWS, _DRAWN_BATCH = 8, 2


class Pass(NamedTuple):
    """What a pass leaves behind."""

    z: Tensor
    indices: Tensor
    x_grad: Tensor


def msvr_case(k: int, batch: int, device: str, scales: Sequence[int] = SCALES) -> Case:
    """Multi-scale VQ of 32 channels a branch (MSVR10P2 in the paper)."""
    torch.manual_seed(0)
    product = _product(VQ(32, k), scales)
    for name, parameter in product.named_parameters():
        if name.endswith("codebook.weight"):
            nn.init.normal_(parameter, std=0.5)
    rows = sum(s * s for s in scales) * batch * BRANCHES
    return _pyramid_case(product.to(device), batch, device, 2.0 * rows * k * 32)


def msbr_case(entropy: bool, batch: int, device: str, scales: Sequence[int] = SCALES) -> Case:
    """Multi-scale BSQ of 12 bits a branch (MSBR10P2 in the paper)."""
    torch.manual_seed(0)
    product = _product(BSQ(12, regularize=entropy), scales)
    return _pyramid_case(product.to(device), batch, device, 0.0, entropy=entropy)


def _product(leaf: VQ | BSQ, scales: Sequence[int]) -> ProductQuantizer:
    # with fewer scales than these, some would idle
    refine = [Refine(leaf.dim) for _ in range(min(REFINEMENTS, len(scales)))]
    pyramid = Pyramid(scales, refine)
    return ProductQuantizer(ResidualQuantizer(leaf, multiscale=pyramid, shared=True), P=BRANCHES)


def _pyramid_case(
    product: ProductQuantizer, batch: int, device: str, search: float, *, entropy: bool = False
) -> Case:
    loop = VARLoop(product, entropy=entropy).to(device)
    side = product.grids[-1][0]
    x, pull = _drawn(product, batch, device, 0)

    def check(results: dict[str, Pass]) -> dict[str, str]:
        for name, result in results.items():
            check_finite(name, z=result.z, gradient=result.x_grad)
        _check_alike(product, loop, device)
        same = (results[LOOP].indices == results[XQ].indices).double().mean().item()
        return {LOOP: f"{int(1000 * same) / 10:g} % same"}

    # the search of all scales, and the refinements with the gradients of both sides
    refined = 3 * 2.0 * 9 * (product.dim // BRANCHES) * product.dim * batch * side**2
    flops = search + refined * len(product.scales)
    case = Case(check, flops=flops, bytes=4.0 * 4 * x.numel())
    case.add(XQ, lambda: partial(_ours, product, x, pull), ours=True)
    case.add(LOOP, lambda: partial(_theirs, loop, x, pull))
    return case


def _drawn(product: ProductQuantizer, batch: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """An input and a gradient for `z`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *product.grids[-1], product.dim)
    x, pull = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return x.requires_grad_(), pull


def _ours(product: ProductQuantizer, x: Tensor, pull: Tensor) -> Pass:
    product.zero_grad()
    x.grad = None
    z, indices, losses = product(x)
    ((z * pull).sum() + losses.total()).backward()
    return Pass(z.detach(), indices, gradient(x))


def _theirs(loop: VARLoop, x: Tensor, pull: Tensor) -> Pass:
    loop.zero_grad()
    x.grad = None
    z, indices, commitment, codebook, entropy = loop(x)
    loss = COMMITMENT * commitment + CODEBOOK * codebook + REGULARIZER * entropy
    ((z * pull).sum() + loss).backward()
    return Pass(z.detach(), indices, gradient(x))


def _check_alike(product: ProductQuantizer, loop: VARLoop, device: str) -> None:
    """Outputs and all gradients agree, on the first draw without a tie."""
    others = []
    for seed in range(_DRAWS):
        x, pull = _drawn(product, _DRAWN_BATCH, device, seed)
        ours, theirs = _ours(product, x, pull), _theirs(loop, x, pull)
        others.append((ours.indices != theirs.indices).double().mean().item())
        if others[-1] == 0:
            check_close(XQ, "z", ours.z, theirs.z, _Z)
            check_close(XQ, "the gradient", ours.x_grad, theirs.x_grad, _GRADIENT)
            for name, pair in _parameters(product, loop).items():
                mine, copied = map(gradient, pair)
                check_close(XQ, f"the gradient of {name}", mine, copied, _GRADIENT)
            return
    raise Red(
        f"{XQ} has other indices than the loop in each of {_DRAWS} draws, at least "
        f"{100 * min(others):.2g} % of them"
    )


def _parameters(product: ProductQuantizer, loop: VARLoop) -> dict[str, tuple[Any, Any]]:
    """Each parameter of ours beside its copy."""
    pairs = {}
    mine: Any
    other: Any
    for p, (mine, other) in enumerate(zip(product.branches, loop.branches, strict=True)):
        if isinstance(mine.steps[0], VQ):
            pairs[f"codes_{p}"] = (mine.steps[0].codebook.weight, other.codes.weight)
        for i, (refine, conv) in enumerate(zip(mine.grid.refine, other.refine, strict=True)):
            pairs[f"weight_{p}_{i}"] = (refine.weight, conv.weight)
            pairs[f"bias_{p}_{i}"] = (refine.bias, conv.bias)
    return pairs


def residual_case(tokens: int, depth: int, k: int, dim: int, device: str) -> Case:
    """A flat residual of averaged codebooks, beside vector-quantize-pytorch's."""
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(tokens, dim, generator=generator).to(device) for _ in range(2))
    # smaller from step to step, as trained codes are
    codes = [torch.randn(k, dim, generator=generator) * 0.7 * 0.9**i for i in range(depth)]
    codes = [table.to(device) for table in codes]
    x.requires_grad_()

    def check(results: dict[str, Pass]) -> dict[str, str]:
        mine = results[XQ]
        rest = x.detach()
        for i, table in enumerate(codes):
            Nearest(rest, table).check(f"{XQ}, step {i}", mine.indices[:, i])
            rest = rest - table[mine.indices[:, i]]
        check_finite(XQ, gradient=mine.x_grad)
        check_close(XQ, "z", mine.z, x.detach() - rest, _Z)
        rows = {name: (r.indices == mine.indices).all(1) for name, r in results.items()}
        shares = {name: same.double().mean().item() for name, same in rows.items() if name != XQ}
        return {name: f"{int(1000 * part) / 10:g} % same" for name, part in shares.items()}

    case = Case(check, flops=2.0 * tokens * depth * k * dim, bytes=4.0 * 4 * x.numel())
    case.add(XQ, lambda: _our_residual(x, pull, codes), ours=True)
    case.add(peers.VQP, lambda: _vqp_residual(x, pull, codes))
    return case


def _our_residual(x: Tensor, pull: Tensor, codes: list[Tensor]) -> Callable[[], Pass]:
    k, dim = codes[0].shape
    leaf = VQ(dim, k, codebook=partial(EMACodebook, decay=0.99))
    module = ResidualQuantizer(leaf, depth=len(codes)).to(x.device)
    step: Any
    for step, table in zip(module.steps, codes, strict=True):
        step.codebook.weight.copy_(table)

    def run() -> Pass:
        x.grad = None
        z, indices, losses = module(x)
        ((z * pull).sum() + losses.total()).backward()
        return Pass(z.detach(), indices, gradient(x))

    return run


def _vqp_residual(x: Tensor, pull: Tensor, codes: list[Tensor]) -> Callable[[], Pass]:
    """`ResidualVQ`, which passes the gradient of `z` on once a step where ours does once."""
    k, dim = codes[0].shape
    module = peers.vqp().ResidualVQ(
        dim=dim,
        num_quantizers=len(codes),
        codebook_size=k,
        decay=0.99,
        rotation_trick=False,
        commitment_weight=COMMITMENT / len(codes),
    )
    module = module.to(x.device).train()
    for layer, table in zip(module.layers, codes, strict=True):
        layer.codebook = table

    def run() -> Pass:
        x.grad = None
        z, indices, losses = module(x[None])
        ((z[0] * pull).sum() + losses.sum()).backward()
        return Pass(z[0].detach(), indices[0], gradient(x))

    return run


def specs(device: str, quick: bool) -> list[Spec]:
    """Both nests, each in two forms, and a flat residual."""
    if quick:
        small = {"batch": 2, "scales": (1, 2, 3)}
        return [
            Spec("MSVR3P2, K = 64", msvr_case, {"k": 64, **small}, {}),
            Spec("MSBR3P2", msbr_case, {"entropy": False, **small}, {}),
            Spec("MSBR3P2 with entropy", msbr_case, {"entropy": True, **small}, {}),
            Spec("RQ", residual_case, {"tokens": 32, "depth": 3, "k": 16, "dim": 8}, {}),
        ]
    flat = {"tokens": 4096, "depth": 8, "k": 1024, "dim": 64}
    few, tiny = {"batch": 8}, {"batch": 1, "scales": (1, 2)}
    return [
        *(
            Spec(_msvr_name(k), msvr_case, {"k": k, **few}, {"k": 64, **tiny}, seconds=12)
            for k in (4096, 16384)
        ),
        *(
            Spec(_msbr_name(on), msbr_case, {"entropy": on, **few}, tiny, seconds=10)
            for on in (False, True)
        ),
        Spec("RQ 8 x 1024 x 64, 4096 tokens, EMA", residual_case, flat, {"tokens": 8, "k": 16}),
    ]


def _msvr_name(k: int) -> str:
    return f"MSVR10P2, K = {k}, batch 8"


def _msbr_name(entropy: bool) -> str:
    return "MSBR10P2, batch 8" + (", entropy" if entropy else "")


_ASKED_CPU: list[Asked] = [
    Faster(_msvr_name(16384), 2, LOOP),
    Faster(_msvr_name(4096), 1.55, LOOP),
    Faster(_msbr_name(False), 1.4, LOOP),
    Faster(_msbr_name(True), 2, LOOP),
]


def draw(document: dict[str, Any]) -> Figure:
    """A bar for each contender."""
    return pictures.bars(document)


BENCHMARK = harness.Benchmark(
    "trees",
    "The paper's nests of quantizers, forward and backward, float32",
    specs,
    {"cpu": _ASKED_CPU},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.trees import main as importable

    sys.exit(importable())
