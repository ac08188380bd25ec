"""When the codes and the statistics of an EMACodebook change."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures.drawing import BLUE, GREEN, GREY, INK, ORANGE, arrow, box, canvas, words

# the steps of a training forward: name, what it does
_STEPS = (
    ("refresh", "statistics\nto codes"),
    ("observe", "vectors to\npending sums"),
    ("fold", "sums to\nstatistics"),
)


def drawn() -> Figure:
    """Time from left to right; below it which codes are in use."""
    fig, axes = canvas(9.4, 4.3)
    for left, name in ((0.25, "training forward 1"), (6.0, "training forward 2")):
        box(axes, left, 2.2, 3.15, 1.75, fill="white", edge=BLUE)
        words(axes, left + 1.575, 3.72, name, weight="bold", color=BLUE)
        for i, (step, says) in enumerate(_STEPS):
            x = left + 0.1 + i * 1.0
            box(axes, x, 2.35, 0.95, 1.1, fill="#dcebf5", edge=BLUE)
            words(axes, x + 0.475, 3.17, step, size=10, weight="bold")
            words(axes, x + 0.475, 2.72, says, size=8)
    box(axes, 3.75, 2.2, 1.9, 1.75, fill="white", edge=GREEN)
    words(axes, 4.7, 3.72, "in between", weight="bold", color=GREEN)
    words(
        axes,
        4.7,
        2.92,
        "decode, encode,\neval, no_grad,\nrecomputation:\nnothing changes",
        size=9.5,
    )
    arrow(axes, (0.25, 1.9), (9.2, 1.9), color=GREY)
    words(axes, 9.15, 2.03, "time", size=9, color=GREY, ha="right", va="bottom")
    _lane(axes, 1.3, "codes in use", ((1.2, 7.0, "codes 1"), (7.0, 9.2, "codes 2")), BLUE)
    _lane(
        axes,
        0.55,
        "statistics",
        ((1.2, 2.85, "of step 0"), (2.85, 8.6, "of step 1"), (8.6, 9.2, "2")),
        ORANGE,
    )
    return fig


def _lane(
    axes: Axes, y: float, name: str, spans: tuple[tuple[float, float, str], ...], colour: str
) -> None:
    words(axes, 0.2, y, name.replace(" in ", "\nin "), ha="left", size=10, color=INK)
    for left, right, text in spans:
        box(axes, left, y - 0.24, right - left, 0.48, text, fill="white", edge=colour, size=10)
