"""What a training tells: lines of JSON, tensorboard, Weights & Biases."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.checkpoints import write_whole


class Journal:
    """Writes numbers and pictures.

    Args:
        out: A folder, for `metrics.jsonl` and `tensorboard/`.
        step: Steps that are done: what was written of later ones, before a kill, is forgotten.
        log: The settings.
        config: All settings, for the record.

    Raises:
        ImportError: If wandb is asked for and missing.
    """

    def __init__(self, out: Path, step: int, log: Any, config: dict[str, Any]) -> None:
        # takes a second to import
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.path, lambda file: file.write(text.encode()))
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.wandb = _wandb(out, log, config) if log.wandb else None

    def add(self, step: int, **numbers: Any) -> None:
        """Writes numbers, and dicts of numbers, that belong to a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        flat = dict(_flat(numbers))
        for name, value in flat.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(flat, step=step)

    def add_picture(self, step: int, name: str, path: Path) -> None:
        """Shows a PNG file that was written."""
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
        self.board.add_image(name, pixels, step, dataformats="HWC")
        if self.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Waits until all is written."""
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _flat(numbers: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file that may end in the middle of one."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _wandb(out: Path, log: Any, config: dict[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("--wandb needs wandb: pip install wandb") from error
    # the same name, so that a training that goes on is one run there
    name = out.resolve().name
    return wandb.init(
        project=log.project, id=name, name=name, dir=str(out), resume="allow", config=config
    )
