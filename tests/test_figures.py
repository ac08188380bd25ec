"""The committed drawings are those that the scripts draw."""

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from docs.figures.__main__ import FIGURES, FOLDER, main

PAGES = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder with all of them."""
    folder = tmp_path_factory.mktemp("figures")
    assert main(["--out", str(folder)]) == 0
    return folder


def names(folder: Path) -> set[str]:
    """What a folder holds."""
    return {path.name for path in folder.iterdir()}


def parts(path: Path) -> Counter[str]:
    """How many elements of each kind a drawing has, and its size."""
    root = ElementTree.parse(path).getroot()
    return Counter(element.tag for element in root.iter()) + Counter([root.attrib["viewBox"]])


def test_all_are_committed_and_no_others(drawn):
    assert names(drawn) == names(FOLDER) == {f"{name}.svg" for name in FIGURES}


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_one_is_what_is_drawn(drawn, name):
    committed = (FOLDER / f"{name}.svg").read_text()
    by = re.search(r"Matplotlib v([\w.]+)", committed)
    assert by is not None
    if by[1] != mpl.__version__:
        pytest.skip(f"matplotlib {by[1]} drew the committed one, this is {mpl.__version__}")
    assert parts(drawn / f"{name}.svg") == parts(FOLDER / f"{name}.svg")


def test_the_same_bytes_again(drawn, tmp_path):
    assert main(["--out", str(tmp_path), "learning"]) == 0
    assert (tmp_path / "learning.svg").read_bytes() == (drawn / "learning.svg").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
def test_a_page_shows_it_and_says_what_it_shows(name):
    shown = re.compile(rf"^!\[[^\]]{{20,}}\]\([./]*assets/figures/{name}\.svg\)$", re.M)
    assert any(shown.search(page.read_text()) for page in PAGES)


def test_a_name_that_there_is_not(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "cels"])
    assert "there is no figure cels" in capsys.readouterr().err
