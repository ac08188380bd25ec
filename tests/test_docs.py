"""Every block of Python in the README and the docs runs, in order, one namespace a file."""

import json
import re
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

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
    # a module, so that classes of the page can be pickled as those of a script can
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page.read_text()):
        # as many empty lines as stand above, so that an error names the line of the page
        exec(compile("\n" * line + code, page, "exec"), vars(module))


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


LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
# what a page takes in when the site is built, which links mean as it is there
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.M)


def written(page: Path) -> str:
    """The text of a page without its code, which may hold brackets of all kinds."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)


def anchors(page: Path) -> set[str]:
    """What a page's headings are called, as the site and GitHub call simple ones."""
    text = page.read_text()
    text += "".join((ROOT / name).read_text() for name in SNIPPET.findall(text))
    found = set()
    for heading in re.findall(r"^#+ (.+?)#*$", re.sub(r"```.*?```", "", text, flags=re.S), re.M):
        heading = unicodedata.normalize("NFKD", re.sub(r"\]\([^)]*\)", "", heading)).lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(written(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_ratios_of_the_readme_are_the_measured_ones():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| ([\d.]+)x \|$", text, re.M)
    assert len(rows) > 8
    for benchmark, work, peer, ratio in rows:
        results = json.loads((ROOT / f"benchmarks/results/{benchmark}.json").read_text())
        assert not results["quick"]
        (case,) = (case for case in results["cases"] if case["name"] == work)
        (measured,) = (one["times_xq"] for one in case["contenders"] if one["name"] == peer)
        digits = len(ratio.partition(".")[2])
        assert f"{measured:.{digits}f}" == ratio, f"{work}, {peer}: {measured}"
