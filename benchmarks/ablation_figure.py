"""The picture of the ablation: over bits, over steps, and what one change does."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from benchmarks.ablation_cases import LARGE
from benchmarks.ablation_table import by_name, mean, measured, spread
from benchmarks.pictures import sign

# Okabe and Ito's colours, which most colour-blind people can tell apart
_LOOKS = {
    "VQ": ("#0072B2", "o"),
    "RQ": ("#56B4E9", "s"),
    "PQ": ("#009E73", "D"),
    "MSVQ": ("#D55E00", "^"),
    "MSBSQ": ("#E69F00", "v"),
    "LFQ": ("#8C8C8C", "<"),
    "BSQ": ("#CC79A7", ">"),
}


def draw(document: dict[str, Any]) -> Figure:
    """A column a metric: over bits, over steps, and the difference that a variant makes."""
    keys = measured(document)
    variants = [name for name, runs in by_name(document).items() if _base(document, runs[0])]
    heights = [3.4, 3.0, 0.6 + 0.24 * len(variants)][: 3 if variants else 2]
    figure = Figure(figsize=(3.6 * len(keys) + 0.8, sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(
        len(heights), len(keys), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for column, key in enumerate(keys):
        _over_bits(panels[0, column], document, key)
        _over_steps(panels[1, column], document, key)
        if variants:
            _differences(panels[2, column], document, key, variants if column == 0 else None)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    sign(figure, document)
    return figure


def title(document: dict[str, Any], key: str) -> str:
    """Of an axis, with the direction that is better."""
    return {
        "psnr": "PSNR in dB, more is better",
        "lpips": f"LPIPS ({document['shared']['lpips']}), less is better",
        "fd": f"fd_{document['shared']['features']}, less is better",
        "used": "codes used",
    }[key]


def _over_bits(axes: Axes, document: dict[str, Any], key: str) -> None:
    groups = by_name(document)
    for family, (colour, marker) in _LOOKS.items():
        for large in (False, True):
            points = [
                (runs[0]["bits"], mean(runs, key), _half(runs, key))
                for runs in groups.values()
                if runs[0]["family"] == family and _is_plain(runs[0], large)
            ]
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                look: dict[str, Any] = {"color": colour, "marker": marker, "label": family}
                if large:
                    look |= {"markerfacecolor": "white", "linestyle": "none", "label": None}
                axes.errorbar(x, y, error, **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_ticks(document), [f"{bits / 1000:.0f}k" for bits in _ticks(document)])
    axes.set_xlabel("bits a picture (hollow: K = 16384)", fontsize=8)
    _finish(axes, document, key)


def _over_steps(axes: Axes, document: dict[str, Any], key: str) -> None:
    least: dict[str, float] = {}
    for runs in by_name(document).values():
        case = runs[0]
        if _is_plain(case, large=False):
            least[case["family"]] = min(case["bits"], least.get(case["family"], case["bits"]))
    for runs in by_name(document).values():
        case = runs[0]
        if _is_plain(case, large=False) and case["bits"] == least[case["family"]]:
            colour, marker = _LOOKS[case["family"]]
            x, y = ([point[name] for point in case["curve"]] for name in ("step", key))
            axes.plot(x, y, color=colour, marker=marker, markersize=4)
    shown = min(document["shared"]["shown"], document["shared"]["squares"])
    axes.set_xlabel(f"steps; the fewest bits of each kind; {shown} pictures", fontsize=8)
    _finish(axes, document, key)


def _differences(axes: Axes, document: dict[str, Any], key: str, names: list[str] | None) -> None:
    """How far each variant is from what it varies, from the same seed; grey: two seeds apart."""
    found = [
        (runs[0], base)
        for runs in by_name(document).values()
        if (base := _base(document, runs[0])) is not None
    ]
    values = [case[key] - base[key] for case, base in found]
    apart = spread(document, key)
    if apart is not None:
        axes.axvspan(-apart, apart, color="#DDDDDD", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.plot(values, range(len(values)), "o", color="#0072B2", markersize=5)
    axes.set_yticks(range(len(values)), names or [""] * len(values), fontsize=8)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel("difference; grey: seeds at their widest", fontsize=8)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    if key == "used":
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _base(document: dict[str, Any], case: dict[str, Any]) -> dict[str, Any] | None:
    """What a case varies, of the same seed."""
    for other in document["cases"]:
        if other["name"] == case["variant_of"] and other["seed"] == case["seed"]:
            return other
    return None


def _is_plain(case: dict[str, Any], large: bool) -> bool:
    """Whether it is a quantizer of that many codes, and no variant in anything else."""
    if large:
        return case["codes"] == LARGE
    return not case["variant_of"]


def _half(runs: list[dict[str, Any]], key: str) -> float:
    values = [run[key] for run in runs]
    return (max(values) - min(values)) / 2


def _ticks(document: dict[str, Any]) -> list[float]:
    """The bits that differ by more than a little."""
    found: list[float] = []
    for bits in sorted(case["bits"] for case in document["cases"]):
        if not found or bits > 1.3 * found[-1]:
            found.append(bits)
    return found


def _finish(axes: Axes, document: dict[str, Any], key: str) -> None:
    axes.set_title(title(document, key), fontsize=10)
    axes.grid(linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    if key == "used":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
