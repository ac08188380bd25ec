"""Fails unless a wheel and an sdist hold what they should, and nothing else.

python .ci/contents.py DIST        in a checkout; DIST holds one of each
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what building an sdist adds, or takes along unasked
ALWAYS = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", ".gitignore"}
METADATA = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


def main(folder: str) -> None:
    """Says what differs, and exits with 1 if anything does."""
    (wheel,), (sdist,) = (list(Path(folder).glob(form)) for form in ("*.whl", "*.tar.gz"))
    name = wheel.name.rsplit("-", 3)[0]
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    differences = differing("the wheel", found, in_wheel(checkout(), f"{name}.dist-info"))
    with tarfile.open(sdist) as archive:
        found = {m.name.removeprefix(f"{name}/") for m in archive.getmembers() if m.isfile()}
    differences += differing("the sdist", found, in_sdist(checkout()))
    if differences:
        sys.exit("\n".join(differences))


def checkout() -> list[str]:
    """The files that git has, or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def in_wheel(files: Iterable[str], metadata: str) -> set[str]:
    """The package, its licence and what pip reads."""
    package = {name for name in files if name.startswith("xq/")}
    return package | {f"{metadata}/{name}" for name in METADATA}


def in_sdist(files: Iterable[str]) -> set[str]:
    """What one needs to build, test and read: what pyproject.toml includes."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        targets = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]
    roots = [root.strip("/") for root in targets["sdist"]["include"]]
    kept = {f for f in files if any(f == root or f.startswith(f"{root}/") for root in roots)}
    return kept | ALWAYS


def differing(what: str, found: set[str], wanted: set[str]) -> list[str]:
    """A line for each file that is there and should not be, or the other way around."""
    strange = [f"{what} holds {name}, which it should not" for name in sorted(found - wanted)]
    return strange + [f"{what} lacks {name}" for name in sorted(wanted - found)]


if __name__ == "__main__":
    main(*sys.argv[1:])
