"""What the figures have in common: colours, boxes, arrows, files that stay the same."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK = "#1f2430"
GREY = "#8a8f9c"
PALE = "#eef0f5"
# Okabe and Ito's colours, which most colour-blind people can tell apart
BLUE, SKY, GREEN, ORANGE, RED, PINK = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
)
# in force while a figure is drawn and while it is written
STYLE = {
    "font.size": 11,
    "svg.fonttype": "path",
    "svg.hashsalt": "xq",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure on a white card; inches, as the text is 11 points."""
    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure to place boxes on, in inches from the lower left."""
    fig = figure(width, height, layout=None)
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return fig, axes


def saved(fig: Figure, path: Path) -> None:
    """Writes the SVG: the same bytes from the same figure and matplotlib."""
    fig.savefig(path, format="svg", metadata={"Date": None})


def box(
    axes: Axes,
    left: float,
    bottom: float,
    width: float,
    height: float,
    text: str = "",
    *,
    fill: str = PALE,
    edge: str = GREY,
    size: float = 11,
    weight: str = "normal",
    family: str = "sans-serif",
    ink: str = INK,
    dashed: bool = False,
) -> None:
    """A rounded rectangle with text in its middle."""
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.06, bottom + 0.06),
            width - 0.12,
            height - 0.12,
            boxstyle="round,pad=0.06",
            facecolor=fill,
            edgecolor=edge,
            linewidth=1.1,
            linestyle=(0, (4, 3)) if dashed else "-",
        )
    )
    middle = (left + width / 2, bottom + height / 2)
    words(axes, *middle, text, size=size, weight=weight, family=family, color=ink)


def words(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Text around a point."""
    style = {"ha": "center", "va": "center", "color": INK, "fontsize": options.pop("size", 11)}
    axes.text(x, y, text, **style | options)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    color: str = INK,
    dashed: bool = False,
    bend: float = 0.0,
    width: float = 1.3,
) -> None:
    """An arrow between two points; `bend` curves it."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": color,
            "linewidth": width,
            "linestyle": (0, (4, 3)) if dashed else "-",
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )
