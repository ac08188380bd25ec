"""Which code is nearest: `xq.quantizers.lookup.nearest` against what others do."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness, peers, pictures
from benchmarks.asked import BEST_PEER, Asked, Faster, OfLimit
from benchmarks.cases import XQ, Case, Skip, Spec
from benchmarks.gates import Nearest
from xq.quantizers.lookup import nearest

ADDMM, CDIST, KNN, FLASH = "addmm + argmin", "cdist + argmin", "faiss.knn", "flash-kmeans"
CHUNKED = "xq chunked"


def lookup_case(
    n: int, k: int, dim: int, device: str, metric: str = "euclidean", best: int | None = None
) -> Case:
    """The nearest (or the `best` nearest) of k Gaussian codes to n Gaussian vectors."""
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(rows, dim, generator=generator).to(device) for rows in (n, k))

    def check(results: dict[str, Tensor]) -> dict[str, str]:
        truth = Nearest(x, codes, metric, best or 1)
        for c in case.contenders:
            if c.ours:
                truth.check(c.name, results[c.name])
        shares = {name: truth.hits(found)[0].double().mean() for name, found in results.items()}
        return {name: f"{_floored(part.item())} nearest" for name, part in shares.items()}

    size = x.element_size() * (n + k) * dim + 8 * n * (best or 1)
    case = Case(check, flops=2.0 * n * k * dim, bytes=size)
    for name, backend in _backends(device).items():
        case.add(name, partial(_xq, x, codes, metric, best, backend), ours=True)
    _add_peers(case, x, codes, metric, best)
    return case


def _backends(device: str) -> dict[str, str | None]:
    fused = "triton" if device == "cuda" else "faiss"
    return {XQ: None, CHUNKED: "chunked", f"xq {fused}": fused}


def _xq(
    x: Tensor, codes: Tensor, metric: str, best: int | None, backend: str | None
) -> Callable[[], Tensor]:
    options: dict[str, Any] = {"backend": backend} | ({} if best is None else {"k": best})
    if backend is not None:
        try:
            nearest(x[:1], codes, metric, **options)
        except (ValueError, ImportError) as refused:
            raise Skip(str(refused)) from None
    return lambda: nearest(x, codes, metric, **options)


def _add_peers(case: Case, x: Tensor, codes: Tensor, metric: str, best: int | None) -> None:
    case.add(KNN, lambda: peers.faiss_knn(x, codes, metric, best or 1))
    if best is not None:
        case.add("addmm + topk", lambda: partial(peers.addmm_topk, x, codes, best))
        return
    if metric == "cosine":
        case.add("product + argmax", lambda: partial(peers.cosine_argmax, x, codes))
    else:
        case.add(ADDMM, lambda: partial(peers.addmm_argmin, x, codes))
        case.add(CDIST, lambda: lambda: torch.cdist(x, codes).argmin(1))
        if x.is_cuda:
            case.add("addmm, compiled", lambda: partial(_compiled_addmm(), x, codes))
            case.add(FLASH, lambda: peers.flash_kmeans(x, codes))
    case.add(peers.VQP, lambda: peers.vqp_lookup(x, codes, metric))


def _compiled_addmm() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(peers.addmm_argmin)


def _floored(part: float) -> str:
    """In percent, not rounded up: one wrong row in a million is less than all."""
    return "100 %" if part == 1 else f"{int(1000 * part) / 10} %"


REACH = {
    "cpu": [
        (16384, 16384, 8),
        (8192, 16384, 8),
        (16384, 16384, 32),
        (8192, 16384, 64),
        (4096, 16384, 256),
    ],
    "cuda": [(65536, 16384, 8), (65536, 16384, 32), (65536, 16384, 64)],
}
# curves pass through one point: tokens, codes, channels
CENTRE = {"cpu": (4096, 4096, 32), "cuda": (32768, 8192, 32)}
CURVES = {
    "cpu": {
        "n": (256, 1024, 4096, 16384, 65536),
        "k": (256, 1024, 4096, 16384, 65536),
        "dim": (4, 8, 16, 32, 64, 128, 256),
    },
    "cuda": {
        "n": (2048, 8192, 32768, 131072),
        "k": (512, 2048, 8192, 32768),
        "dim": (4, 8, 16, 32, 64, 128, 256),
    },
}


def specs(device: str, quick: bool) -> list[Spec]:
    """The rows that were asked for, two other kinds of search, and three curves."""
    if quick:
        return [
            _spec(64, 48, 8),
            _spec(40, 64, 4, metric="cosine"),
            _spec(40, 48, 4, best=3),
            *_curves((64, 64, 4), {"n": (32, 64), "k": (32, 64), "dim": (4, 8)}),
        ]
    n, k, dim = CENTRE[device]
    return [
        *(_spec(*sizes, seconds=16) for sizes in REACH[device]),
        _spec(n, k, dim, metric="cosine"),
        _spec(n, k, dim, best=8),
        *_curves(CENTRE[device], CURVES[device]),
    ]


def _spec(n: int, k: int, dim: int, seconds: float = 6, **options: Any) -> Spec:
    kind = "".join(f", {'k=' if name == 'best' else ''}{v}" for name, v in options.items())
    sizes = {"n": n, "k": k, "dim": dim, **options}
    return Spec(f"{n} x {k} x {dim}{kind}", lookup_case, sizes, {"n": 32, "k": 32}, (), seconds)


def _curves(centre: tuple[int, int, int], curves: dict[str, Sequence[int]]) -> list[Spec]:
    """One case a point; the centre belongs to all curves, and is measured once."""
    points: dict[tuple[int, ...], list[str]] = {}
    axes = list(curves)
    for axis, values in curves.items():
        for value in values:
            point = tuple(value if a == axis else c for a, c in zip(axes, centre, strict=True))
            points.setdefault(point, []).append(axis)
    return [
        Spec(
            " x ".join(map(str, point)),
            lookup_case,
            dict(zip(axes, point, strict=True)),
            {"n": 32, "k": 32},
            tuple(swept),
            seconds=3,
        )
        for point, swept in points.items()
    ]


def _asked_cpu() -> list[Asked]:
    return [
        Faster("16384 x 16384 x 8", 15, ADDMM),
        Faster("16384 x 16384 x 8", 4.5, ADDMM, CHUNKED),
        Faster("8192 x 16384 x 8", 4, BEST_PEER),
        Faster("8192 x 16384 x 8", 4, BEST_PEER, CHUNKED),
        Faster("16384 x 16384 x 32", 3.5, ADDMM),
        Faster("16384 x 16384 x 32", 2.5, ADDMM, CHUNKED),
        Faster("8192 x 16384 x 64", 2, ADDMM),
        Faster("4096 x 16384 x 256", 1.2, ADDMM),
        Faster(None, 0.95, KNN),
    ]


def _asked_cuda() -> list[Asked]:
    over = zip(REACH["cuda"], (10, 6, 3), strict=True)
    rows = [("{} x {} x {}".format(*sizes), times) for sizes, times in over]
    return [
        line
        for work, times in rows
        for line in (Faster(work, times, ADDMM), Faster(work, 1, FLASH), OfLimit(work, 0.6))
    ]


def draw(document: dict[str, Any]) -> Figure:
    """Time and memory over tokens, codes and channels."""
    labels = {"n": "tokens N", "k": "codes K", "dim": "channels C"}
    return pictures.curves(document, labels)


BENCHMARK = harness.Benchmark(
    "lookup",
    "Lookup: the nearest of K codes to each of N vectors of C channels, float32",
    specs,
    {"cpu": _asked_cpu(), "cuda": _asked_cuda()},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.lookup import main as importable

    sys.exit(importable())
