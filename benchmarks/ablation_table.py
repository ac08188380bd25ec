"""The numbers of the ablation, cases that differ in their seed taken together."""

from statistics import fmean
from typing import Any

METRICS = {"psnr": "PSNR", "lpips": "LPIPS", "fd": "fd", "used": "codes used"}
_FORMS = {"psnr": ".2f", "lpips": ".3f", "fd": ".0f", "used": ".1%", "perplexity": ".0f"}


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a training, in the order of bits; variants below what they vary."""
    shown = measured(document)
    names = {**METRICS, "fd": f"fd_{document['shared']['features']}"}
    head = ["", "bits a picture", *(names[key] for key in shown), "perplexity", "runs"]
    groups = by_name(document)
    rows = []
    for name, runs in sorted(groups.items(), key=lambda item: _place(item[1][0], groups)):
        cells = [_cell(runs, key) for key in (*shown, "perplexity")]
        rows.append([name, f"{runs[0]['bits']:.0f}", *cells, str(len(runs))])
    return head, rows


def measured(document: dict[str, Any]) -> list[str]:
    """The metrics that there are numbers of."""
    return [key for key in METRICS if any(c[key] is not None for c in document["cases"])]


def by_name(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each case."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in document["cases"]:
        found.setdefault(case["name"], []).append(case)
    return found


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Over seeds."""
    return fmean(run[key] for run in runs)


def spread(document: dict[str, Any], key: str) -> float | None:
    """The largest distance between two seeds of one case; None where all have one."""
    found = [
        max(run[key] for run in runs) - min(run[key] for run in runs)
        for runs in by_name(document).values()
        if len(runs) > 1
    ]
    return max(found, default=None)


def number(case: dict[str, Any], key: str) -> str:
    """As it is printed."""
    return format(case[key], _FORMS[key]).replace("%", " %")


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    if runs[0][key] is None:
        return ""
    values = [run[key] for run in runs]
    middle = number({key: mean(runs, key)}, key)
    if len(runs) == 1:
        return middle
    return f"{middle} ± {number({key: (max(values) - min(values)) / 2}, key)}"


def _place(case: dict[str, Any], groups: dict[str, list[dict[str, Any]]]) -> tuple[Any, ...]:
    """By bits of the case itself or of what it varies, then by name, variants last."""
    base = groups.get(case["variant_of"], [case])[0]
    return base["bits"], base["name"], bool(case["variant_of"]), case["bits"], case["name"]
