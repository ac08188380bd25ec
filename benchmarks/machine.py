"""Where and with what a number was measured."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import xq

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "faiss-cpu", "vector-quantize-pytorch", "triton", "flash-kmeans", "numpy")
# what the benchmarks themselves write does not change what they measure
_WRITTEN = (":!benchmarks/results", ":!docs/benchmarks.md", ":!docs/assets/benchmarks")


def described(device: str) -> dict[str, Any]:
    """Machine, versions and commit, as JSON."""
    commit, dirty = _commit()
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(_memory() / (1 << 30), 1),
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "xq": xq.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "lookup_override": os.environ.get("XQ_LOOKUP"),
    }


def line(document: dict[str, Any]) -> str:
    """The same in one line, to stand above a table."""
    machine, versions = document["machine"], dict(document["versions"])
    parts = [machine["gpu"]] if machine["gpu"] else []
    parts.append(f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores")
    parts.append(f"{machine['memory_gib']:g} GiB")
    parts.append(machine["system"])
    known = [f"{name} {number}" for name, number in versions.items() if number and name != "numpy"]
    commit = f"commit {document['commit']}" if document["commit"] else "no commit"
    changed = " with changes" if document["dirty"] else ""
    override = document["lookup_override"]
    extra = [f"XQ_LOOKUP={override}"] if override else []
    day = document["date"][:10]
    return "; ".join([", ".join(parts), ", ".join(known), *extra, f"{commit}{changed}, {day}"])


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    try:
        commit = _git("rev-parse", "--short", "HEAD").strip()
        return commit, bool(_git("status", "--porcelain", "--", ".", *_WRITTEN).strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
