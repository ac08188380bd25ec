"""Results as JSON and as an aligned table."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.whole import written_whole


def save_json(path: Path, results: Any) -> None:
    """Writes results; what is not finite becomes null, which JSON has."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"
    with written_whole(path) as beside:
        beside.write_text(text)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records below each other; a column for each key, in the order in which they come."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    lines = [columns, *([_text(record.get(key, "")) for key in columns] for record in records)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    left = [all(isinstance(r.get(key, ""), str) for r in records) for key in columns]
    rows = (
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        )
        for line in lines
    )
    return "\n".join(row.rstrip() for row in rows)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
