"""Draws every figure, or those named on the command line."""

import argparse
from pathlib import Path

import matplotlib as mpl

from docs.figures import (
    cells,
    entropy,
    gradients,
    learning,
    nests,
    pipelines,
    protocol,
    shapes,
)
from docs.figures.drawing import STYLE, saved

FOLDER = Path(__file__).parents[1] / "assets" / "figures"
FIGURES = {
    "cells": cells.drawn,
    "nests": nests.drawn,
    "protocol": protocol.drawn,
    "shapes": shapes.drawn,
    "gradients": gradients.drawn,
    "learning": learning.drawn,
    "entropy": entropy.drawn,
    "pipelines": pipelines.drawn,
}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the SVGs")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(FIGURES))
    if unknown:
        parser.error(f"there is no figure {', '.join(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name in given.names or FIGURES:
            saved(FIGURES[name](), given.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
