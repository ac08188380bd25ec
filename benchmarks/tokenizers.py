"""The presets at full size: one image to tokens and back."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness, peers, pictures
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.gates import check_finite
from benchmarks.words import memory, time
from xq.models import Tokenizer
from xq.models.presets.__main__ import rows

# one of each architecture; the rest differ by their codes
PRESETS = (
    *("VQ-4096", "VP2-4096", "MSVR10P2-4096", "MSBR10P2-4096", "VQGAN 1024"),
    *("RQGAN", "VAR", "LlamaGen VQ-16", "Open-MAGVIT2", "IBQ 16384"),
    *("ViT-VQGAN base", "BSQ-ViT 18", "TiTok-L-32", "TiTok-S-128"),
)


class Pass(NamedTuple):
    """What a pass leaves behind."""

    indices: Tensor
    image: Tensor


def preset_case(preset: str, batch: int, device: str) -> Case:
    """Encode and decode; the weights are random."""
    peers.needs("timm", "timm")
    torch.manual_seed(0)
    row = next(row for row in rows() if row.name == preset)
    model = row.make().eval().to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, row.image_size, row.image_size)
    images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)

    def check(results: dict[str, Pass]) -> dict[str, str]:
        indices, image = results[XQ]
        check_finite(XQ, image=image)
        if image.shape != images.shape:
            raise Red(f"{XQ}: images {tuple(image.shape)} of images {tuple(images.shape)}")
        if indices.min() < 0 or indices.max() >= model.quantizer.codebook_size:
            raise Red(f"{XQ}: indices outside the codebook")
        return {XQ: f"{indices[0].numel()} tokens"}

    case = Case(check)
    case.add(XQ, lambda: partial(_round_trip, model, images), ours=True)
    return case


@torch.inference_mode()
def _round_trip(model: Tokenizer, images: Tensor) -> Pass:
    indices = model.encode(images)
    return Pass(indices, model.decode(indices))


def specs(device: str, quick: bool) -> list[Spec]:
    """A case a preset."""
    names = ("TiTok-S-128",) if quick else PRESETS
    batch = 1 if device == "cpu" else 32
    return [
        Spec(name, preset_case, {"preset": name, "batch": batch}, {}, seconds=6) for name in names
    ]


def draw(document: dict[str, Any]) -> Figure:
    """A bar for each preset, all on one scale."""
    ours = {case["name"]: case["contenders"][0] for case in document["cases"]}
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(ours)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, field, label in (
        (left, "seconds", "median", time),
        (right, "MiB beyond the weights", "peak_bytes", memory),
    ):
        values = [one[field] or 0 for one in ours.values()]
        bars = axes.barh(list(ours), [v / (1 << 20) if axes is right else v for v in values])
        axes.bar_label(bars, [label(v) for v in values], padding=3, fontsize=8)
        axes.set_title(title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    pictures.sign(figure, document)
    return figure


BENCHMARK = harness.Benchmark(
    "tokenizers",
    "Tokenizers at full size: images of 256 x 256 to tokens and back",
    specs,
    {},
    draw,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see `harness.main`."""
    return harness.main(BENCHMARK, arguments)


if __name__ == "__main__":
    # by its importable name, under which other processes find the cases
    from benchmarks.tokenizers import main as importable

    sys.exit(importable())
