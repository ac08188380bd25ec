"""The table in docs/complaints.md names the tests of this folder, and they exist."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "complaints.md").read_text()
TEST = re.compile(r"test_(?:defect|complaint)_\d\d_\w+")
COUNTS = {"Defects": ("defect", 25), "Complaints": ("complaint", 40)}


def rows(title: str) -> dict[int, str]:
    """The last cell of each numbered row in a section, by its number."""
    section = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^\| (\d+) \|(.*)\|$", section, re.M)
    assert len({number for number, _ in found}) == len(found)
    return {int(number): cells.rsplit("|", 1)[-1].strip() for number, cells in found}


def defined() -> list[str]:
    """Names of all test functions in this folder but for those of this file."""
    return [
        node.name
        for path in sorted(HERE.glob("test_*.py"))
        if path != Path(__file__)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("title", COUNTS)
def test_every_row_has_its_test_or_says_why_not(title: str) -> None:
    kind, count = COUNTS[title]
    table, existing = rows(title), defined()
    assert list(table) == list(range(1, count + 1))
    for number, cell in table.items():
        own = [name for name in TEST.findall(cell) if name.startswith(f"test_{kind}_{number:02}_")]
        assert own or re.match(r"none: \w+", cell), number
        assert set(TEST.findall(cell)) <= set(existing), number


def test_every_test_stands_in_its_row() -> None:
    tables = {kind: rows(title) for title, (kind, _) in COUNTS.items()}
    assert len(defined()) == len(set(defined())) > 60
    for name in defined():
        kind, number = re.match(r"test_(defect|complaint)_(\d\d)_", name).groups()
        assert f"`{name}`" in tables[kind][int(number)], name
