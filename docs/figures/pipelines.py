"""Where the two pipelines of XQ-GAN differ: around the quantizer."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures.drawing import BLUE, GREEN, GREY, ORANGE, PALE, arrow, box, canvas, words


def drawn() -> Figure:
    """SC above, V below, the quantizer of both between."""
    fig, axes = canvas(9.4, 4.9)
    words(axes, 0.2, 4.65, "SC: a vision transformer reads tokens out", ha="left", weight="bold")
    _transformers(axes)
    words(axes, 0.2, 1.75, "V: a CNN makes a grid", ha="left", weight="bold")
    _networks(axes)
    box(axes, 4.0, 0.3, 1.4, 4.05, fill="#dcebf5", edge=BLUE)
    words(axes, 4.7, 2.85, "quantizer", weight="bold")
    words(axes, 4.7, 2.35, "any tree;\nthe same\nfor both", size=9.5)
    return fig


def _transformers(axes: Axes) -> None:
    box(axes, 0.2, 3.45, 1.3, 0.8, "patches of\nthe image", size=9.5)
    box(axes, 0.2, 2.3, 1.3, 0.8, "P grids of\nqueries", fill="#fbeed3", edge=ORANGE, size=9.5)
    box(axes, 1.95, 2.3, 1.4, 1.95, "ViT,\nfull\nattention", fill=PALE)
    arrow(axes, (1.5, 3.85), (1.95, 3.85))
    arrow(axes, (1.5, 2.7), (1.95, 2.7), color=ORANGE)
    arrow(axes, (3.35, 2.7), (4.0, 2.7), color=ORANGE)
    words(axes, 3.68, 3.3, "queries\nalone", size=9, color=ORANGE)
    arrow(axes, (5.4, 2.7), (6.05, 2.7), color=ORANGE)
    box(axes, 6.05, 2.3, 1.4, 1.95, "ViT,\nfull\nattention", fill=PALE)
    box(axes, 7.9, 3.45, 1.3, 0.8, "patches to\npixels", size=9.5)
    words(axes, 5.72, 4.05, "mask\ntokens", size=9, color=GREY)
    arrow(axes, (5.5, 3.72), (6.05, 3.72), color=GREY)
    arrow(axes, (7.45, 3.85), (7.9, 3.85))


def _networks(axes: Axes) -> None:
    box(axes, 0.2, 0.5, 1.3, 0.8, "image", size=9.5)
    box(axes, 1.95, 0.5, 1.4, 0.8, "convolutions,\ndown", size=9.5, fill="#dff1ea", edge=GREEN)
    arrow(axes, (1.5, 0.9), (1.95, 0.9))
    arrow(axes, (3.35, 0.9), (4.0, 0.9), color=GREEN)
    arrow(axes, (5.4, 0.9), (6.05, 0.9), color=GREEN)
    box(axes, 6.05, 0.5, 1.4, 0.8, "convolutions,\nup", size=9.5, fill="#dff1ea", edge=GREEN)
    box(axes, 7.9, 0.5, 1.3, 0.8, "pixels", size=9.5)
    arrow(axes, (7.45, 0.9), (7.9, 0.9))
    words(axes, 3.68, 1.4, "all\npositions", size=9, color=GREEN)
