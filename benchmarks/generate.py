"""Sampling from AR and VAR: with kept keys and values, and with all of them computed again."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, pictures
from benchmarks.asked import Asked, Faster
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.words import memory, ratio
from xq.models import AR, VAR, teacher_forcing
from xq.models.sampling import draw
from xq.quantizers import VQ, ResidualQuantizer

RECOMPUTED = "recomputed"
CLASSES, CODES, CHANNELS = 1000, 4096, 32
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# of the draws, whose filters are those of the published settings
FILTERS: dict[str, Any] = {"top_k": 900, "top_p": 0.96}
# depth, width and heads; about 16 M parameters each, and 112 M on a GPU
SIZES = {
    "cpu": {"ar": (7, 384, 6), "var": (5, 384, 6)},
    "cuda": {"ar": (15, 768, 12), "var": (10, 768, 12)},
}
ASKED = "AR, 256 tokens"


def ar_case(size: Sequence[int], batch: int, device: str, side: int = 16) -> Case:
    """All tokens of a grid, one after another.

    Args:
        size: Depth, width and heads.
        batch: Images.
        device: Where.
        side: Of the grid.
    """
    depth, width, heads = size
    options: Any = {"depth": depth, "width": width, "heads": heads, "classes": CLASSES}
    model = AR(CODES, side, **options)
    labels = _prepared(model, batch, device)

    def recomputed(generator: torch.Generator) -> Tensor:
        # the token to predict has to be there, but is not looked at
        tokens = torch.zeros(batch, model.num_tokens, dtype=torch.long, device=device)
        for t in range(model.num_tokens):
            logits = model(tokens[:, : t + 1], labels)[:, -1:]
            tokens[:, t] = draw(logits, generator=generator, **FILTERS)[:, 0]
        return tokens.unflatten(1, model.token_shape)

    cached = partial(model.generate, labels, **FILTERS)
    return _case(model, device, cached, recomputed, range(1, model.num_tokens + 1))


def var_case(size: Sequence[int], batch: int, device: str, scales: Sequence[int] = SCALES) -> Case:
    """All scales, one after another.

    Args:
        size: As of `ar_case`.
        batch: Images.
        device: Where.
        scales: Sides of the grids.
    """
    depth, width, heads = size
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(VQ(CHANNELS, CODES), multiscale=tuple(scales))
    options: Any = {"depth": depth, "width": width, "heads": heads, "classes": CLASSES}
    model = VAR.of(quantizer, **options)
    quantizer = quantizer.eval().to(device)
    labels = _prepared(model, batch, device)

    def recomputed(generator: torch.Generator) -> Tensor:
        tokens = torch.zeros(batch, 0, dtype=torch.long, device=device)
        for side in scales:
            blank = torch.zeros(batch, side * side, dtype=torch.long, device=device)
            inputs = teacher_forcing(quantizer, torch.cat([tokens, blank], dim=1))
            logits = model(inputs, labels)[:, -side * side :]
            tokens = torch.cat([tokens, draw(logits, generator=generator, **FILTERS)], dim=1)
        return tokens

    cached = partial(model.generate, quantizer, labels, **FILTERS)
    return _case(model, device, cached, recomputed, model.ends)


def _prepared(model: AR | VAR, batch: int, device: str) -> Tensor:
    """Gives the model random weights under which all tokens matter; labels to sample."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.eval().to(device)
    return torch.arange(batch, device=device) % CLASSES


def _case(
    model: AR | VAR,
    device: str,
    cached: Callable[..., Tensor],
    recomputed: Callable[[torch.Generator], Tensor],
    lengths: Sequence[int],
) -> Case:
    """Both ways to sample; `lengths` is what recomputation gives to the model, step by step."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    said = f"{size:.1f} M weights"

    def check(results: dict[str, Tensor]) -> dict[str, str]:
        mine, other = results[XQ], results.get(RECOMPUTED)
        if mine.min() < 0 or mine.max() >= CODES or len(mine.unique()) < 2:
            raise Red(f"{XQ} draws tokens that are none, or all alike")
        if other is None:
            return {XQ: said}
        differ = (mine != other).double().mean().item()
        if differ:
            raise Red(f"{XQ}: {differ:.2%} of the tokens differ from those of recomputation")
        return {XQ: said, RECOMPUTED: f"{sum(lengths)} positions"}

    def run(sample: Callable[..., Tensor], *, keyword: bool) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        with torch.inference_mode():
            return sample(generator=generator) if keyword else sample(generator)

    case = Case(check)
    case.add(XQ, lambda: partial(run, cached, keyword=True), ours=True)
    case.add(RECOMPUTED, lambda: partial(run, recomputed, keyword=False), ours=True)
    return case


def specs(device: str, quick: bool) -> list[Spec]:
    """AR and VAR with about as many parameters."""
    if quick:
        small: dict[str, Any] = {"size": (2, 32, 2), "batch": 2}
        return [
            Spec("AR, 9 tokens", ar_case, {**small, "side": 3}, {}),
            Spec("VAR, 14 tokens", var_case, {**small, "scales": (1, 2, 3)}, {}),
        ]
    sizes, batch = SIZES[device], 2 if device == "cpu" else 64
    tiny: dict[str, Any] = {"size": (1, 64, 1), "batch": 1}
    return [
        Spec(
            ASKED,
            ar_case,
            {"size": sizes["ar"], "batch": batch},
            {**tiny, "side": 2},
            seconds=60,
        ),
        Spec(
            "VAR, 680 tokens",
            var_case,
            {"size": sizes["var"], "batch": batch},
            {**tiny, "scales": (1, 2)},
            seconds=30,
        ),
    ]


ASKED_OF: list[Asked] = [Faster(ASKED, 5, RECOMPUTED)]


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a generator, in images per second."""
    rows = []
    for case in document["cases"]:
        by_name = {c["name"]: c for c in case["contenders"]}
        mine, other, batch = by_name[XQ], by_name[RECOMPUTED], case["sizes"]["batch"]
        model, _, tokens = case["name"].removesuffix(" tokens").partition(", ")
        size, positions = (c["checked"].rpartition(" ")[0] for c in (mine, other))
        speeds = [f"{batch / c['median']:.3g}" for c in (mine, other)]
        rows.append(
            [
                model,
                size,
                tokens,
                str(batch),
                *speeds,
                ratio(other["median"] / mine["median"]),
                ratio(int(positions) / int(tokens)),
                memory(mine["peak_bytes"]),
            ]
        )
    head = ["work", "parameters", "tokens", "batch", "images/s", RECOMPUTED]
    return [*head, "faster", "positions", "extra memory"], rows


BENCHMARK = harness.Benchmark(
    "generate",
    "Sampling: tokens of images from AR and VAR, without the decoder, float32",
    specs,
    {"cpu": ASKED_OF, "cuda": ASKED_OF},
    pictures.bars,
    table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.generate import main as importable

    sys.exit(importable())
