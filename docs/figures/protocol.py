"""What happens once, at the root, and what the walk through the tree does."""

from matplotlib.figure import Figure

from docs.figures.drawing import BLUE, GREEN, GREY, ORANGE, arrow, box, canvas, words

_ONCE = (
    ("float32", "outside autocast"),
    ("bound", "onto the codes' domain"),
    ("quantize", "the walk"),
    ("estimate", "gradients to the input"),
    ("learn", "codebooks, one sum"),
)


def drawn() -> Figure:
    """The row of `forward` above, the tree of `quantize` below."""
    fig, axes = canvas(9.0, 4.7)
    words(axes, 0.2, 4.45, "forward(x), once, at the root", ha="left", size=12, weight="bold")
    for i, (name, says) in enumerate(_ONCE):
        left = 0.2 + 1.75 * i
        walk = name == "quantize"
        fill, edge = ("#dcebf5", BLUE) if walk else ("#eef0f5", GREY)
        box(axes, left, 3.3, 1.5, 0.85, fill=fill, edge=edge)
        words(axes, left + 0.75, 3.87, name, size=11, weight="bold")
        words(axes, left + 0.75, 3.57, says, size=8.2)
        if i:
            arrow(axes, (left - 0.25, 3.72), (left, 3.72))
    box(axes, 0.2, 0.15, 8.6, 2.75, fill="white", edge=BLUE, dashed=True)
    arrow(axes, (4.45, 3.3), (4.45, 2.9), color=BLUE)
    words(axes, 0.45, 2.62, "quantize(u), at every node", ha="left", size=11, weight="bold")
    box(axes, 3.2, 1.95, 2.5, 0.5, "ProductQuantizer", fill="#dff1ea", edge=GREEN)
    for x in (1.1, 5.3):
        box(axes, x, 1.1, 2.5, 0.5, "ResidualQuantizer", fill="#fbeed3", edge=ORANGE)
        arrow(axes, (4.45 + (x > 3) * 0.5 - 0.25, 1.95), (x + 1.25, 1.6), color=GREY)
        for k in range(3):
            left = x - 0.35 + 1.1 * k
            box(axes, left, 0.3, 0.95, 0.45, "BSQ", fill="#dcebf5", edge=BLUE)
            arrow(axes, (x + 1.25, 1.1), (left + 0.475, 0.75), color=GREY)
    words(axes, 8.6, 2.62, "each returns (z, indices, losses)", ha="right", size=10)
    return fig
