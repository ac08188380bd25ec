"""How often the gradient of z reaches the input of a residual: measured."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures.drawing import BLUE, GREY, RED, figure
from xq.quantizers import VQ, ResidualQuantizer

DEPTHS = tuple(range(1, 9))


def drawn() -> Figure:
    """Two lines over the depth."""
    torch.manual_seed(0)
    once = [factor(ResidualQuantizer(VQ(8, 32), depth)) for depth in DEPTHS]
    each = [factor(EstimatorAtEachStep(depth)) for depth in DEPTHS]
    fig = figure(7.0, 3.7)
    axes = fig.subplots()
    axes.plot(DEPTHS, each, "o-", color=RED)
    axes.plot(DEPTHS, once, "o-", color=BLUE)
    for depth, value in list(zip(DEPTHS, each, strict=True))[1:]:
        axes.annotate(
            f"{value:.1f}",
            (depth, value),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            color=RED,
            fontsize=9.5,
        )
    axes.annotate(
        f"{once[-1]:.1f}",
        (DEPTHS[-1], once[-1]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        color=BLUE,
        fontsize=9.5,
    )
    axes.text(4.4, 6.7, "an estimator at each step", ha="right", color=RED)
    axes.text(5.2, 1.45, "one, at the root: xq", ha="left", color=BLUE)
    axes.set(xlabel="steps of the residual", ylim=(0, 9), xticks=DEPTHS)
    axes.set_ylabel("gradient of the input\nover that of z")
    axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
    return fig


class EstimatorAtEachStep(torch.nn.Module):
    """A residual as it is often written: every step a quantizer with a forward of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(VQ(8, 32) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        rest, total = x, torch.zeros_like(x)
        for step in self.steps:
            z = step(rest).z
            rest = rest - z.detach()
            total = total + z
        return (total,)


def factor(quantizer: torch.nn.Module) -> float:
    """The gradient of the input where that of z is one, which must be the same everywhere."""
    x = torch.randn(16, 8, requires_grad=True)
    quantizer(x)[0].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.grad.mean().expand_as(x))
    return float(x.grad.mean())
