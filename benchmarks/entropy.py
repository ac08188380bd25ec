"""The entropy of LFQ and BSQ over all their codes, forward and backward."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness, peers, pictures
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.gates import check_close, gradient, relative
from xq.quantizers import BSQ, LFQ
from xq.quantizers.bits import indices_to_signs

SOFTMAX = "full softmax"
KINDS = {"LFQ": LFQ, "BSQ": BSQ}
# how many tokens the full softmax can take along in float64, even with 2^18 codes
_GATE_TOKENS = 32
_TOLERANCE = 1e-5
# matrices of tokens x codes in float32 that a softmax with its gradient holds at the worst moment
_MATRICES = 8

Result = tuple[Tensor, Tensor]


def entropy_case(
    tokens: int, bits: int, device: str, kind: str = "LFQ", group_size: int | None = None
) -> Case:
    """The entropy penalty of Gaussian tokens, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, bits, generator=generator).to(device).requires_grad_()
    module = KINDS[kind](bits, group_size=group_size).to(device)
    groups = bits // (group_size or bits)
    codes = 2 ** (bits // groups)

    def check(results: dict[str, Result]) -> dict[str, str]:
        off = {XQ: _check_terms(module, module.bound(x.detach()[:_GATE_TOKENS]), groups)}
        penalty = module.entropy(module.bound(x)).penalty()
        check_close(XQ, "the penalty", results[XQ][0], penalty, _TOLERANCE)
        for name, result in results.items():
            if name != XQ:
                # theirs may differ, by a floor under the probabilities
                off[name] = max(map(relative, result, results[XQ]))
        return {name: f"off by {value:.0e}" for name, value in off.items()}

    # the table of each half of the bits meets that of the other once, and twice for gradients
    case = Case(check, flops=3.0 * 2 * tokens * codes * groups, bytes=2 * x.numel() * 4)
    case.add(
        XQ, lambda: partial(_with_gradient, x, lambda u: module(u).losses.regularizer), ours=True
    )
    case.add(SOFTMAX, lambda: _softmax(x, module, groups, codes))
    if groups == 1:
        case.add(peers.VQP, lambda: _vqp(x, kind))
    return case


def _check_terms(module: LFQ | BSQ, u: Tensor, groups: int) -> float:
    """Both entropies and their gradients; how far off the worst of them is.

    Gradients are compared on the scale of both together: that of the batch almost vanishes where
    all codes are used alike, and what is left of it is rounding.
    """
    terms = ("per_token", "batch")
    exact = [
        _with_gradient(u.double(), lambda v, t=t: _plain(v, module.scale, groups)[t]) for t in terms
    ]
    found = [_with_gradient(u, lambda v, t=t: module.entropy(v)._asdict()[t]) for t in terms]
    scale = sum(pull.norm() for _, pull in exact)
    off = 0.0
    for term, mine, true in zip(terms, found, exact, strict=True):
        off = max(off, check_close(XQ, term, mine[0], true[0], _TOLERANCE))
        share = ((mine[1].double() - true[1]).norm() / scale).item()
        if not share <= _TOLERANCE:
            raise Red(f"{XQ}: the gradient of {term} is off by {share:.3g} of both gradients")
        off = max(off, share)
    return off


def _with_gradient(x: Tensor, penalty: Callable[[Tensor], Tensor]) -> Result:
    x = x.detach().requires_grad_()
    value = penalty(x)
    value.backward()
    return value.detach(), gradient(x)


def _plain(u: Tensor, scale: float, groups: int) -> dict[str, Any]:
    """One softmax over all codes of each group, in the precision of `u`."""
    bits = u.shape[-1] // groups
    every = indices_to_signs(torch.arange(2**bits, device=u.device), bits)
    codes = scale * (2 * every.to(u.dtype) - 1)
    terms = [peers.softmax_entropy(part, codes) for part in u.split(bits, dim=-1)]
    per_token, batch = (sum(term) for term in zip(*terms, strict=True))
    return {"per_token": per_token, "batch": batch}


def _softmax(x: Tensor, module: LFQ | BSQ, groups: int, codes: int) -> Callable[[], Result]:
    peers.fits(_MATRICES * 4.0 * len(x) * codes, x.device.type)

    def penalty(u: Tensor) -> Tensor:
        terms = _plain(module.bound(u), module.scale, groups)
        return terms["per_token"] - terms["batch"] + module.dim * math.log(2)

    return partial(_with_gradient, x, penalty)


def _vqp(x: Tensor, kind: str) -> Callable[[], Result]:
    """`LFQ` of vector-quantize-pytorch at our temperature, without its commitment.

    Its penalty lacks our constant, which is added outside: then only its floor under the
    probabilities makes a difference.
    """
    bits = x.shape[-1]
    peers.fits(_MATRICES * 4.0 * len(x) * 2**bits, x.device.type)
    options = {"entropy_loss_weight": 1.0, "spherical": kind == "BSQ"}
    module = peers.vqp().LFQ(dim=bits, codebook_size=2**bits, **options).to(x.device).train()

    def penalty(u: Tensor) -> Tensor:
        return module(u[None], inv_temperature=1.0).entropy_aux_loss + bits * math.log(2)

    return partial(_with_gradient, x, penalty)


TOKENS = {"cpu": 4096, "cuda": 65536}
CURVE = (6, 8, 10, 12, 14, 16, 18, 20)


def specs(device: str, quick: bool) -> list[Spec]:
    """Single sizes, grouped sizes, and a curve over the bits."""
    if quick:
        return [_spec(32, 6), _spec(32, 8, "BSQ", 4), *_curve(32, (4, 6))]
    tokens = TOKENS[device]
    return [
        *(_spec(tokens, bits) for bits in (10, 14, 18)),
        _spec(tokens, 14, "BSQ"),
        _spec(tokens, 36, "BSQ", 9),
        _spec(tokens, 36, "BSQ", 12),
        _spec(tokens, 36, "BSQ", 18),
        *_curve(tokens, CURVE),
    ]


def _spec(tokens: int, bits: int, kind: str = "LFQ", group_size: int | None = None) -> Spec:
    grouped = f" in groups of {group_size}" if group_size else ""
    name = f"{kind} 2^{bits}{grouped}, {tokens} tokens"
    sizes = {"tokens": tokens, "bits": bits, "kind": kind, "group_size": group_size}
    return Spec(name, entropy_case, sizes, {"tokens": 8}, seconds=6)


def _curve(tokens: int, values: Sequence[int]) -> list[Spec]:
    return [
        Spec(
            f"{bits} bits, {tokens} tokens",
            entropy_case,
            {"tokens": tokens, "bits": bits},
            {"tokens": 8},
            ("bits",),
            seconds=2,
        )
        for bits in values
    ]


def draw(document: dict[str, Any]) -> Figure:
    """Time and memory over the number of bits."""
    return pictures.curves(document, {"bits": "bits d, of 2^d codes"})


BENCHMARK = harness.Benchmark(
    "entropy",
    "Entropy penalty over all 2^d codes, forward and backward, float32",
    specs,
    {},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.entropy import main as importable

    sys.exit(importable())
