"""What is shipped, without building it: `.ci/run` builds, and compares the files."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import xq

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# what is for people who work on it, in a clone
IN_A_CLONE_ALONE = {".ci", ".gitignore", ".pre-commit-config.yaml"}
IN_EVERY_SDIST = {"README.md", "LICENSE", "pyproject.toml"}


@pytest.fixture(scope="module")
def contents() -> ModuleType:
    """The script that `.ci/run` calls."""
    path = ROOT / ".ci" / "contents.py"
    if not path.exists():
        pytest.skip("an sdist has no .ci")
    spec = importlib.util.spec_from_file_location("contents", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(contents) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    try:
        return contents.checkout()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not answer: {error}")


def test_all_of_the_checkout_is_shipped_or_left_out_on_purpose(files):
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    shipped = {path.strip("/").split("/")[0] for path in included} | IN_EVERY_SDIST
    top = {name.split("/")[0] for name in files}
    assert not shipped - top, "pyproject.toml includes what does not exist"
    assert top - shipped == IN_A_CLONE_ALONE & top


def test_the_package_holds_code_and_its_own_data_alone(files):
    package = [name for name in files if name.startswith("xq/")]
    others = [name for name in package if not name.endswith(".py")]
    data = re.compile(r"xq/(py\.typed|models/presets/tiny\.\w+)")
    assert [name for name in others if not data.fullmatch(name)] == []
    assert "xq/py.typed" in others
    # a wheel is for everyone, so what is in it stays small
    assert sum((ROOT / name).stat().st_size for name in others) < 5_000_000


def test_the_check_names_what_differs(contents):
    files = ["xq/a.py", "tests/test_a.py", "README.md", "notes.txt"]
    wheel = contents.in_wheel(files, "xq-1.dist-info")
    assert {name for name in wheel if "dist-info" not in name} == {"xq/a.py"}
    sdist = contents.in_sdist(files)
    assert {"xq/a.py", "tests/test_a.py", "README.md", "PKG-INFO"} <= sdist
    assert "notes.txt" not in sdist
    found = contents.differing("the wheel", {"xq/a.py", "tests/test_a.py"}, {"xq/a.py", "xq/b.py"})
    assert found == [
        "the wheel holds tests/test_a.py, which it should not",
        "the wheel lacks xq/b.py",
    ]


def test_the_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(xq.__version__)}\] - ", changelog, re.M)


def test_classifiers_name_the_versions_of_python_that_are_supported():
    project = PROJECT["project"]
    oldest = int(project["requires-python"].removeprefix(">=3."))
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    assert [int(minor) for minor in named] == list(range(oldest, oldest + len(named)))
    assert len(named) > 2
    assert len(set(project["classifiers"])) == len(project["classifiers"])
    assert not any(name.startswith("License ::") for name in project["classifiers"])


def test_extras_that_pages_name_exist():
    extras = PROJECT["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "xq").rglob("*.py")]
    named = set()
    for page in pages:
        for group in re.findall(
            r"(?:install (?:-e )?\"?(?:\.|xq)|xq)\[([\w,]+)\]", page.read_text()
        ):
            named |= set(group.split(","))
    assert named <= set(extras)
    assert {"examples", "dev", "vision"} <= named
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)) - {"xq"} == set(extras) - {"all"}


def test_the_readme_says_which_xq_this_is():
    assert "`xq` on PyPI is another project" in (ROOT / "README.md").read_text()
