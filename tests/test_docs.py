"""Every block of Python in the README and the docs runs, in order, one namespace a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.M | re.S
)


def blocks(text: str) -> list[tuple[int, str]]:
    """The number of the line before each block, and its code without the fence's indentation."""
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        found.append((line, code))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for line, code in blocks(page.read_text()):
        # as many empty lines as stand above, so that an error names the line of the page
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_every_fence_is_found():
    for page in PAGES:
        text = page.read_text()
        assert len(blocks(text)) == len(re.findall(r"^\s*```\s*python", text, re.M)), page


def test_the_readme_has_blocks():
    assert len(blocks((ROOT / "README.md").read_text())) >= 2


def test_blocks_are_cut_out_exactly():
    text = "a\n\n```python\nx = 1\n\ny = 2\n```\n\n"
    text += "- b\n\n  ```python title='t'\n  if y:\n      x\n  ```\n"
    text += "```bash\nls\n```\n"
    assert blocks(text) == [(3, "x = 1\n\ny = 2\n"), (11, "if y:\n    x\n")]
