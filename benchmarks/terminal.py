"""Tables for the terminal, at most 100 columns wide."""

from textwrap import fill
from typing import Any

from benchmarks.machine import line
from benchmarks.words import memory, rate, ratio, share, time

WIDTH = 100
_NAME = 30
_COLUMNS = (("median", 10), ("spread", 8), ("extra memory", 14), ("x xq", 8), ("of limit", 10))


def header(document: dict[str, Any]) -> str:
    """What runs, and where."""
    parts = [document["title"], "=" * len(document["title"]), fill(line(document), WIDTH)]
    if document["quick"]:
        parts.append("Quick: sizes and times mean nothing.")
    return "\n".join(parts)


def case(case: dict[str, Any]) -> str:
    """One case: a line each contender, or a single line if it is a point of a curve."""
    return _point(case) if case["sweeps"] else _block(case)


def _point(case: dict[str, Any]) -> str:
    xq = case["contenders"][0]
    best = case["best_peer"]
    parts = [f"  {case['name']:<{_NAME}}{'xq ' + time(xq['median']):>14}"]
    if best:
        ahead = ratio(case["ahead_of_best_peer"])
        parts.append(f"   {ahead:>6} as fast as {best}, the best peer")
    return "".join(parts)


def _block(case: dict[str, Any]) -> str:
    limit = case["limit"]
    aside = f"limit {time(limit['seconds'])}, {rate(limit)}" if limit else ""
    head = "".join(f"{name:>{width}}" for name, width in _COLUMNS)
    lines = ["", f"{case['name']}   {aside}".rstrip(), f"{'':{_NAME}}{head}  checked"]
    for c in case["contenders"]:
        cells = (
            time(c["median"]),
            "" if c["spread"] is None else f"± {share(c['spread'])}",
            memory(c["peak_bytes"]),
            ratio(c["times_xq"]),
            share(c["of_limit"]),
        )
        row = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        lines.append(f"  {c['name']:<{_NAME - 2}}{row}  {c['checked']}".rstrip())
    for name, reason in case["skipped"].items():
        lines.append(fill(f"  {name}: left out, {reason}", WIDTH, subsequent_indent="    "))
    if case["best_peer"]:
        ahead = ratio(case["ahead_of_best_peer"])
        lines.append(f"  xq is {ahead} as fast as the best peer, {case['best_peer']}.")
    return "\n".join(lines)


def asked(lines: list[dict[str, Any]]) -> str:
    """What was asked beside what was measured."""
    if not lines:
        return ""
    keys = ("work", "ours", "against", "asked", "measured")
    head = dict(zip(keys, keys, strict=True))
    rows = [head, *({**line, "measured": line["measured"] or "not measured"} for line in lines)]
    widths = {key: max(len(row[key]) for row in rows) + 2 for key in keys}
    verdicts = ["", *({True: "yes", False: "NO", None: ""}[line["met"]] for line in lines)]
    table = [
        "".join(f"{row[key]:<{widths[key]}}" for key in keys) + verdict
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return "\n".join(["", "Asked and measured", *(f"  {row}".rstrip() for row in table)])
