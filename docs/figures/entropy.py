"""What the two entropies of sign codes say: three batches of tokens with 3 bits."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.figures.drawing import BLUE, GREY, ORANGE, figure
from xq.quantizers import indices_to_signs, sign_entropy

BITS = 3
CERTAIN = 6.0


def drawn() -> Figure:
    """Three panels: how codes are used on average, and what one token says."""
    signs = codes()
    batches = {
        "undecided": 0.3 * signs,
        "decided, all alike": (CERTAIN * signs[5]).expand(2**BITS, BITS),
        "decided, used evenly": CERTAIN * signs,
    }
    fig = figure(9.0, 3.5)
    panels = fig.subplots(1, 3, sharey=True)
    for axes, (title, logits) in zip(panels, batches.items(), strict=True):
        _panel(axes, title, logits)
    panels[0].set_ylabel("probability")
    handles = panels[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return fig


def codes() -> Tensor:
    """All of them, as -1 and 1: `(codes, bits)`."""
    return 2.0 * indices_to_signs(torch.arange(2**BITS), BITS).double() - 1


def probabilities(logits: Tensor) -> Tensor:
    """Of each token over all codes, by the plain softmax: `(tokens, codes)`."""
    return (logits @ codes().T / 2).softmax(dim=-1)


def _panel(axes: Axes, title: str, logits: Tensor) -> None:
    entropy = sign_entropy(logits)
    each = probabilities(logits)
    # the library's factorised numbers are those of the softmax that is drawn
    torch.testing.assert_close(entropy.per_token, -(each * each.log()).sum(-1).mean())
    numbers = range(2**BITS)
    axes.bar(numbers, each.mean(0).tolist(), width=0.8, color=BLUE, alpha=0.45, label="all tokens")
    axes.bar(numbers, each[5].tolist(), width=0.32, color=ORANGE, label="one token")
    axes.set(ylim=(0, 1.05), xticks=list(numbers), xlabel="code", title=title)
    axes.title.set_fontsize(12)
    lines = [
        f"per token  {entropy.per_token.item():.2f}",
        f"batch  {entropy.batch.item():.2f}",
        f"penalty  {entropy.penalty().item():.2f}",
    ]
    axes.text(0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=10)
    axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
