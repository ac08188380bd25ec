"""Writes the tables of `docs/benchmarks.md` from `benchmarks/results/*.json`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import (
    ablation,
    distortion,
    entropy,
    generate,
    imports,
    lookup,
    losses,
    step,
    tokenizers,
    trees,
)
from benchmarks.asked import judged
from benchmarks.harness import RESULTS, Benchmark, pictures, replacing
from benchmarks.machine import line
from benchmarks.words import memory, rate, ratio, share, time

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_MODULES = (
    *(lookup, entropy, step, trees, losses),
    *(tokenizers, generate, imports, distortion, ablation),
)
BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}
DEVICES = {"cpu": ("CPU", ""), "cuda": ("GPU", "-cuda")}
NOT_MEASURED = "not measured"
_SECTION = re.compile(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", re.S)


def rewritten(page: str, results: Path) -> str:
    """The page with the tables of these results between its marks."""
    return _SECTION.sub(lambda m: m[1] + section(BENCHMARKS[m[2]], results) + m[3], page)


def section(benchmark: Benchmark, results: Path) -> str:
    """All tables of one benchmark, on each device that says something about it."""
    parts = []
    for device, (name, ending) in DEVICES.items():
        path = results / f"{benchmark.name}{ending}.json"
        asked = benchmark.asked.get(device, [])
        if path.is_file():
            document = json.loads(path.read_text())
            if document["quick"]:
                raise ValueError(f"{path} comes from a quick run, whose numbers mean nothing")
            parts += [f"**{name}.** {line(document)}.", _asked(document["asked"])]
            table = _table(*benchmark.table(document)) if benchmark.table else _cases(document)
            parts += [table, _costliest(document)]
            picture = pictures(results) / path.with_suffix(".png").name
            parts.append(f"![{benchmark.title}]({_link(picture)})")
        elif asked or device == "cpu":
            parts.append(f"**{name}**: {NOT_MEASURED}.")
            parts.append(_asked([judged(one, []) for one in asked]))
    return "\n" + "".join(f"{part}\n\n" for part in parts if part)


def _link(path: Path) -> str:
    return (
        path.relative_to(PAGE.parent).as_posix() if path.is_relative_to(PAGE.parent) else path.name
    )


def _asked(lines: list[dict[str, Any]]) -> str:
    verdicts = {True: "yes", False: "**no**", None: ""}
    rows = [
        [one["work"], one["ours"], one["against"], one["asked"], one["measured"], one["met"]]
        for one in lines
    ]
    for row in rows:
        row[-2:] = [row[-2] or NOT_MEASURED, verdicts[row[-1]]]
    return _table(["work", "contender", "against", "asked", "measured", "met"], rows)


def _cases(document: dict[str, Any]) -> str:
    """A row a case, a column a contender; points of curves are in the picture."""
    cases = [case for case in document["cases"] if not case["sweeps"]]
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
    limits = any(case["limit"] for case in cases)
    rows = []
    for case in cases:
        cells = {c["name"]: _cell(c) for c in case["contenders"]}
        cells |= dict.fromkeys(case["skipped"], "left out")
        row = [case["name"], *(cells.get(name, "") for name in names)]
        ahead = case["ahead_of_best_peer"]
        row.append("" if ahead is None else f"{ratio(ahead)}, {case['best_peer']}")
        if limits:
            row.append(f"{time(case['limit']['seconds'])}<br>{rate(case['limit'])}")
        rows.append(row)
    ending = ["xq over the best peer"] + (["limit"] if limits else [])
    return _table(["time, extra memory", *names, *ending], rows)


def _cell(contender: dict[str, Any]) -> str:
    spread = contender["spread"]
    took = time(contender["median"]) + ("" if spread is None else f" ± {share(spread)}")
    return "<br>".join(filter(None, (took, memory(contender["peak_bytes"]))))


def _costliest(document: dict[str, Any]) -> str:
    rows = [[f"`{row['module']}`", time(row["seconds"])] for row in document.get("costliest", [])]
    return _table(["the modules that cost most, by themselves", "time"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    """The command."""
    page = rewritten(PAGE.read_text(), RESULTS)
    with replacing(PAGE) as path:
        path.write_text(page)
    print(f"{PAGE} has the tables of {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
