"""Plots of a document: curves over sizes, or bars for single cases."""

from collections.abc import Callable
from itertools import cycle
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import XQ
from benchmarks.machine import line
from benchmarks.words import memory, time

# Okabe and Ito's colours, which most colour-blind people can tell apart: cold for ours
_OURS = ("#0072B2", "#56B4E9", "#009E73")
_PEERS = ("#D55E00", "#E69F00", "#CC79A7", "#8C8C8C", "#4D4D4D", "#B8A500")
_MARKS = "osDv^<>"
# what is smaller is within the noise of a process's pages
_LEAST_MEMORY = 1 << 20
_WORDS = {"median": time, "peak_bytes": memory}
_TITLES = {"median": "time", "peak_bytes": "extra memory"}
# so that ticks are round numbers in either unit
_BASES = {"median": 10, "peak_bytes": 4}
_LIMIT = "limit"


class Field(NamedTuple):
    """What bars show of a contender.

    Attributes:
        title: Above the panel.
        words: The number in words.
    """

    title: str
    words: Callable[[float], str]


def curves(document: dict[str, Any], labels: dict[str, str]) -> Figure:
    """Time above, extra memory below; a column for each swept size.

    Args:
        document: Of a benchmark.
        labels: Of the sizes, such as `{"n": "tokens N"}`; the last word is the letter.
    """
    looks = _looks(document)
    if len(labels) > 1:
        figure = Figure(figsize=(4.3 * len(labels) + 0.6, 7.8), layout="constrained")
        panels = figure.subplots(2, len(labels), sharey="row")
    else:
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        panels = figure.subplots(1, 2).reshape(2, 1)
    for column, (size, label) in enumerate(labels.items()):
        cases = [case for case in document["cases"] if size in case["sweeps"]]
        cases.sort(key=lambda case: case["sizes"][size])
        for axes, field in zip(panels[:, column], _WORDS, strict=True):
            _curves(axes, cases, size, field, looks)
        others = [k for k in labels if k != size]
        fixed = [f"{labels[k].split()[-1]} = {cases[0]['sizes'][k]}" for k in others]
        panels[0, column].set_title(", ".join(fixed), fontsize=10)
        for axes in panels[:, column] if len(labels) == 1 else panels[1:, column]:
            axes.set_xlabel(label)
    for axes, field in zip(panels[:, 0], _WORDS, strict=True):
        axes.set_ylabel(_TITLES[field])
    handles: dict[str, Any] = {}
    for axes in panels[0]:
        handles |= {name: h for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in (*looks, _LIMIT) if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        ordered,
        loc="outside upper center",
        ncols=min(len(ordered), 5),
        frameon=False,
    )
    sign(figure, document)
    return figure


def _curves(axes: Axes, cases: list[Any], size: str, field: str, looks: dict[str, Any]) -> None:
    sizes = [case["sizes"][size] for case in cases]
    for name, look in looks.items():
        points = [
            (case["sizes"][size], c[field])
            for case in cases
            for c in case["contenders"]
            if c["name"] == name and c[field] is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, _floored(y, field), label=name, markersize=4, **look)
    if field == "median" and all(case["limit"] for case in cases):
        y = [case["limit"]["seconds"] for case in cases]
        axes.plot(sizes, y, label=_LIMIT, color="black", linestyle=":", linewidth=1)
    if max(sizes) > 8 * min(sizes):
        axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=_BASES[field])
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(_axis_words(field))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def bars(document: dict[str, Any], fields: dict[str, Field] | None = None) -> Figure:
    """Time to the left, extra memory to the right; a group of bars for each case.

    Bars begin at zero, and the longest of each group has the full width.

    Args:
        document: Of a benchmark.
        fields: What to show of each contender instead, from left to right.
    """
    fields = fields or {field: Field(_TITLES[field], _WORDS[field]) for field in _WORDS}
    looks = _looks(document)
    cases = document["cases"]
    rows = [c for case in cases for c in case["contenders"]]
    shown = [f for f in fields if any(c[f] is not None for c in rows)]
    height = 0.27 * (len(rows) + 1.6 * len(cases)) + 1.0
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, field in zip(panels, shown, strict=True):
        _bars(axes, cases, field, fields[field], looks)
    sign(figure, document)
    return figure


def _bars(axes: Axes, cases: list[Any], field: str, how: "Field", looks: dict[str, Any]) -> None:
    y, ticks, names = 0.0, [], []
    for case in cases:
        axes.text(0, y, f" {case['name']}", weight="bold", va="center")
        y += 1
        longest = max(c[field] or 0 for c in case["contenders"]) or 1
        for c in case["contenders"]:
            if c[field] is not None:
                share = c[field] / longest
                axes.barh(y, share, 0.8, color=looks[c["name"]]["color"])
                axes.text(share, y, f" {how.words(c[field])}", va="center", fontsize=8)
            ticks.append(y)
            names.append(c["name"])
            y += 1
        y += 0.6
    axes.set_yticks(ticks, names)
    axes.set_ylim(y - 0.6, -1)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([])
    axes.set_title(how.title, fontsize=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _looks(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How each contender is drawn, the same in every panel."""
    known = {c["name"]: c["ours"] for case in document["cases"] for c in case["contenders"]}
    ours, theirs, marks = cycle(_OURS), cycle(_PEERS), cycle(_MARKS)
    return {
        name: {
            "color": next(ours if own else theirs),
            "marker": next(marks),
            "linewidth": 2.2 if own else 1.2,
            "zorder": 4 if name == XQ else 3 if own else 2,
        }
        for name, own in known.items()
    }


def _floored(values: Any, field: str) -> list[float]:
    return [max(v, _LEAST_MEMORY) if field == "peak_bytes" else v for v in values]


def _axis_words(field: str) -> FuncFormatter:
    """`10 ms` and not `10.0 ms`."""

    def words(value: float, _: Any) -> str:
        number, _, unit = _WORDS[field](value).rpartition(" ")
        whole = number.rstrip("0").rstrip(".") if "." in number else number
        return f"{whole} {unit}"

    return FuncFormatter(words)


def sign(figure: Figure, document: dict[str, Any]) -> None:
    """The machine and the commit, below the picture."""
    figure.supxlabel(fill(line(document), 150), fontsize=7, color="#666666")
