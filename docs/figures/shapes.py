"""Where the indices of a multi-scale product lie: one tensor, coarse to fine."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.figures.drawing import BLUE, GREEN, INK, ORANGE, canvas, words
from xq.quantizers import BSQ, ProductQuantizer, ResidualQuantizer

SCALES = (1, 2, 4)
_COLOURS = (ORANGE, GREEN, BLUE)


@torch.no_grad()
def drawn() -> Figure:
    """The grids of each branch, and below them the tensor with a sample's real indices."""
    torch.manual_seed(0)
    quantizer = ProductQuantizer(ResidualQuantizer(BSQ(4), multiscale=SCALES), P=2)
    indices = quantizer.encode(torch.randn(1, 4, 4, 8))[0]
    fig, axes = canvas(9.0, 4.9)
    for branch in range(2):
        left = 0.35 + 4.45 * branch
        words(
            axes,
            left,
            4.65,
            f"branch {branch}: channels {4 * branch} to {4 * branch + 3}",
            ha="left",
            weight="bold",
        )
        for scale, part, colour in zip(SCALES, _grids(indices[:, branch]), _COLOURS, strict=True):
            x = left + {1: 0.0, 2: 0.85, 4: 2.15}[scale]
            _cells(axes, x, 4.4, part, colour, side=0.42)
            words(axes, x + 0.21 * scale, 4.26 - 0.42 * scale, f"{scale} x {scale}", size=9.5)
    words(axes, 0.35, 2.1, "indices[0]: 21 tokens, 2 branches", ha="left", weight="bold")
    start = 0
    for scale, colour in zip(SCALES, _COLOURS, strict=True):
        count = scale * scale
        part = indices[start : start + count].T
        _cells(axes, 0.75 + 0.385 * start, 1.6, part, colour, side=0.385)
        x = 0.75 + 0.385 * (start + count / 2)
        words(axes, x, 1.78, _tokens(start, count), size=9.5, color=colour)
        start += count
    for branch in range(2):
        words(axes, 0.55, 1.4 - 0.385 * branch, str(branch), size=9.5)
    words(axes, 0.22, 1.2, "branch", size=9.5, rotation=90)
    words(
        axes,
        0.75,
        0.42,
        "decode takes the first 1, the first 5 or all 21 tokens; partials yields all three.",
        ha="left",
        size=10,
    )
    return fig


def _tokens(start: int, count: int) -> str:
    return f"{start}" if count == 1 else f"{start} to {start + count - 1}"


def _grids(tokens: torch.Tensor) -> list[torch.Tensor]:
    parts = tokens.split([side * side for side in SCALES])
    return [part.view(side, side) for part, side in zip(parts, SCALES, strict=True)]


def _cells(
    axes: Axes, left: float, top: float, values: torch.Tensor, colour: str, side: float
) -> None:
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            corner = (left + j * side, top - (i + 1) * side)
            axes.add_patch(Rectangle(corner, side, side, facecolor=colour, alpha=0.22, linewidth=0))
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1))
            middle = (corner[0] + side / 2, corner[1] + side / 2)
            words(axes, *middle, str(value), size=9.5, color=INK)
