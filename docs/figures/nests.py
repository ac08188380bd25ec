"""Which quantizer holds which, and what a name such as MSBR10P2 says."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures.drawing import BLUE, GREEN, INK, ORANGE, box, canvas, words

_FLOORS = (
    (
        "product",
        "channels side by side",
        GREEN,
        "#dff1ea",
        ("ProductQuantizer(.., P=2)",),
    ),
    (
        "residual",
        "what is left, again",
        ORANGE,
        "#fbeed3",
        ("ResidualQuantizer(.., depth=8)", "ResidualQuantizer(.., multiscale=True)"),
    ),
    (
        "leaf",
        "one code for a vector",
        BLUE,
        "#dcebf5",
        ("VQ", "LFQ", "BSQ", "FSQ", "IBQ", "GumbelVQ"),
    ),
)
# letters, their floor's colour, what they say
_NAME = (
    ("MS", ORANGE, "over several\nscales"),
    ("B", BLUE, "binary codes,\nBSQ"),
    ("R10", ORANGE, "residual of\n10 steps"),
    ("P2", GREEN, "product of\n2 branches"),
)


def drawn() -> Figure:
    """Three floors, and a name of the paper taken apart."""
    fig, axes = canvas(9.0, 4.75)
    for i, floor in enumerate(_FLOORS):
        _floor(axes, 4.45 - 1.1 * i, *floor)
    _name(axes)
    return fig


def _floor(
    axes: Axes, y: float, name: str, says: str, edge: str, fill: str, members: tuple[str, ...]
) -> None:
    box(axes, 0.15, y - 0.85, 8.7, 0.95, fill=fill, edge=edge)
    words(axes, 0.35, y - 0.24, name, ha="left", size=12, weight="bold", color=edge)
    words(axes, 0.35, y - 0.54, says, ha="left", size=10)
    left, room = 2.35, 6.4
    for i, member in enumerate(members):
        width = room / len(members)
        box(
            axes,
            left + i * width + 0.05,
            y - 0.64,
            width - 0.1,
            0.52,
            member,
            fill="white",
            edge=edge,
            size=9.5,
            family="monospace",
        )


def _name(axes: Axes) -> None:
    x = 0.5
    for letters, color, says in _NAME:
        width = 0.27 * len(letters)
        words(axes, x, 0.98, letters, size=22, weight="bold", color=color, ha="left")
        words(axes, x, 0.42, says, size=9.5, ha="left", color=INK)
        x += max(width + 0.25, 1.25)
    code = (
        "ProductQuantizer(",
        "  ResidualQuantizer(BSQ(12),",
        "    depth=10, multiscale=True),",
        "  P=2)",
    )
    for i, line in enumerate(code):
        words(axes, 5.6, 0.98 - 0.25 * i, line, ha="left", size=10, family="monospace")
