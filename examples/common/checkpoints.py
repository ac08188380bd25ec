"""Files of everything a training needs to go on: each appears whole or not at all."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

ON_ERROR = ("stop", "skip")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes beside the file, waits for the disk, then puts it in the file's place.

    So whenever it ends, the file is what it was before or what it is now. Leaves nothing behind
    where writing fails.

    Raises:
        OSError: If it does, such as on a full disk.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # torch.save has a RuntimeError of its own for a full disk
        raise OSError(f"{path} cannot be written ({error})") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Checkpoints:
    """The last checkpoints of a training, and the best.

    Args:
        folder: Where they are.
        last: How many are kept.
        on_error: "stop" the training where one cannot be written, or "skip" it.

    Raises:
        ValueError: If a setting is none of these.
    """

    def __init__(self, folder: Path, last: int, on_error: str) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"save.on_error is one of {', '.join(ON_ERROR)}; got {on_error!r}")
        if last < 1:
            raise ValueError(f"save.last must be 1 or more, got {last}")
        self.folder, self.last, self.on_error = folder, last, on_error

    def steps(self) -> list[int]:
        """After which steps there is one."""
        return sorted(
            int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.pt")
        )

    def load(self) -> dict[str, Any] | None:
        """The newest, on the CPU; None where there is none yet.

        Raises:
            ValueError: If it cannot be read.
        """
        for part in self.folder.glob("*.part"):
            # of a process that was killed as it wrote
            part.unlink(missing_ok=True)
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        # reading rubbish raises whatever it comes to
        except Exception as error:
            others = f"; remove it to go on from step {steps[-2]}" if len(steps) > 1 else ""
            raise ValueError(f"{path} is damaged ({error}){others}") from error

    def save(self, step: int, state: dict[str, Any], best: int | None) -> bool:
        """Writes one, and only then removes what need not be kept.

        Args:
            step: Steps done.
            state: Tensors, numbers, text and containers.
            best: The step whose checkpoint stays.

        Returns:
            Whether it was written.

        Raises:
            OSError: If it could not be, and `on_error` says "stop".
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(step), lambda file: torch.save(state, file))
        except OSError as error:
            if self.on_error == "stop":
                raise
            print(f"step {step}: {error}; going on without", file=sys.stderr)
            return False
        for old in self.steps()[: -self.last]:
            if old != best:
                self._path(old).unlink()
        return True

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"
