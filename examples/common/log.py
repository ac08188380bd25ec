"""Records of a training, in memory and as lines of JSON."""

import json
from pathlib import Path
from typing import Any


class Log:
    """Keeps records and writes each at once.

    Args:
        path: Of the file, which starts anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        path.write_text("")

    def add(self, **record: Any) -> None:
        """Writes one record."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
