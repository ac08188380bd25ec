"""A training in one file, from which it goes on as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import torch

from common.whole import written_whole


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Replaces the file in one piece, once it is on the disk."""
    with written_whole(path) as beside:
        torch.save(checkpoint, beside)


def load_checkpoint(path: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint, on the CPU, or None where there is none yet.

    Args:
        path: Its file.
        arguments: Of the command, which must be those of the checkpoint, its key "arguments".

    Raises:
        ValueError: If they are not.
    """
    if not path.is_file():
        return None
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    there = checkpoint["arguments"]
    other = [name for name in arguments if arguments[name] != there.get(name)]
    if other:
        found = ", ".join(f"{n} {there.get(n)} there, {arguments[n]} here" for n in other)
        raise ValueError(f"{path} belongs to another training: {found}; give another --out")
    return checkpoint


class Records:
    """Lines of JSON; those that a resumed training writes again are taken away first.

    Args:
        path: The file.
        step: Up to which the training has come; at 0 the file starts anew.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        with written_whole(path) as beside:
            beside.write_text("".join(f"{json.dumps(r)}\n" for r in _read(path, step)))

    def add(self, **record: Any) -> None:
        """Writes one."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _read(path: Path, step: int) -> list[dict[str, Any]]:
    if not step or not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # a line that was cut short has no end
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["step"] <= step]
