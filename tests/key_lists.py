"""The names and shapes of released files, as meta tensors: no weights of theirs are here."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def listed(project: str) -> dict[str, dict[str, Tensor]]:
    """The sections of a list by title; each row is a name and the sizes of its axes."""
    sections: dict[str, dict[str, Tensor]] = {}
    section: dict[str, Tensor] = {}
    for line in gzip.decompress((GOLDEN / f"keys_{project}.txt.gz").read_bytes()).splitlines():
        key, *sizes = line.decode().split()
        if key == "#":
            section = sections[sizes[0]] = {}
        else:
            section[key] = torch.empty([int(size) for size in sizes], device="meta")
    return sections


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
