"""The site builds without a warning, from this machine alone, and has every public name."""

import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_public_api import PROMISED

ROOT = Path(__file__).parents[1]
# a heading of its own has a function whose module has its name
DIRECTIVE = re.compile(r"^::: (\S+)$(?:\n    options:\n      heading: (\S+)$)?", re.M)
# what a browser fetches by itself
FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def directives() -> list[tuple[str, str]]:
    """What the API pages document, and the heading that says otherwise."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [found for page in pages for found in DIRECTIVE.findall(page.read_text())]


def documented() -> list[str]:
    """The names that the API pages show."""
    return [heading or name for name, heading in directives()]


@pytest.mark.parametrize("module", [module for module in PROMISED if module != "xq"])
def test_every_promised_name_has_its_place(module):
    promised = {f"{module}.{name}" for name in PROMISED[module].split()}
    assert promised <= set(documented())


def test_the_short_names_are_those_of_other_modules():
    here = importlib.import_module("xq")
    for name in PROMISED["xq"].split():
        found = getattr(here, name)
        others = [other for other in documented() if other.endswith(f".{name}")]
        assert any(_named(other) is found for other in others), name


def test_what_is_documented_exists_and_once():
    assert len(documented()) == len(set(documented()))
    for name, heading in directives():
        assert _named(name) is _named(heading or name)


def _named(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


class Fetches(HTMLParser):
    """Addresses of what a page needs, and how many formulas it has."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.formulas = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.formulas += "arithmatex" in (given.get("class") or "").split()
        needed = tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload")
        address = given.get(FETCHED.get(tag, ""))
        if needed and address:
            self.addresses.append(address)


def fetches(page: Path) -> Fetches:
    """What a page of the site needs."""
    parser = Fetches()
    parser.feed(page.read_text())
    return parser


def test_a_page_needs_nothing_of_other_hosts_and_all_of_it_is_there(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        addresses = fetches(page).addresses
        assert addresses
        for address in addresses:
            parts = urlsplit(address)
            assert not parts.scheme or parts.scheme == "data", f"{page}: {address}"
            assert not parts.netloc, f"{page}: {address}"
            if parts.path:
                # 404.html may be shown at any depth, so its addresses start at the root
                start = site if parts.path.startswith("/") else page.parent
                there = start / unquote(parts.path).lstrip("/")
                assert there.is_file(), f"{page}: {address}"


def test_styles_fetch_nothing_of_other_hosts(site):
    for style in site.rglob("*.css"):
        for address in re.findall(r"url\(\s*['\"]?([^)'\"]+)", style.read_text()):
            assert urlsplit(address).scheme in ("", "data"), f"{style}: {address}"
            assert not address.startswith("//")


def test_no_module_is_documented_for_its_function(site):
    for page in (site / "api").rglob("*.html"):
        assert "doc-symbol-module" not in page.read_text(), page


def test_formulas_have_what_renders_them(site):
    page = fetches(site / "concepts" / "entropy" / "index.html")
    assert page.formulas > 5
    wanted = {"katex.min.js", "katex.min.css", "formulas.js"}
    assert wanted <= {Path(address).name for address in page.addresses}
    fonts = {path.name for path in (site / "assets" / "katex" / "fonts").iterdir()}
    used = re.findall(
        r"fonts/([\w-]+\.woff2)", (site / "assets" / "katex" / "katex.min.css").read_text()
    )
    assert fonts == set(used)


def test_the_search_knows_names_and_words(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    places = {entry["location"] for entry in entries}
    assert "api/nests/#xq.quantizers.ResidualQuantizer" in places
    assert any("activation checkpointing" in entry["text"] for entry in entries)


def test_what_lives_in_the_root_is_on_the_site(site):
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        title = (ROOT / name).read_text().splitlines()[0].removeprefix("# ")
        page = site / Path(name).stem.lower() / "index.html"
        assert f">{title}" in page.read_text()
        assert "--8&lt;--" not in page.read_text()
