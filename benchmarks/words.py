"""Numbers as people read them: three digits and a unit."""

from typing import Any


def time(seconds: float | None) -> str:
    """Such as `23.6 ms`."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def memory(size: float | None) -> str:
    """Such as `1.05 GiB`; below 1 MiB the pages of a process say little."""
    if size is None:
        return ""
    if size < 1 << 20:
        return "< 1 MiB"
    unit, name = (1 << 30, "GiB") if size >= 1 << 30 else (1 << 20, "MiB")
    return f"{_three(size / unit)} {name}"


def ratio(value: float | None) -> str:
    """Such as `4.53x`."""
    return "" if value is None else f"{_three(value)}x"


def share(value: float | None, digits: int = 0) -> str:
    """Such as `91 %`."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def rate(limit: dict[str, Any]) -> str:
    """Of what a limit is made, such as `product at 190 GFLOP/s`."""
    if limit["of"] == "product":
        return f"product at {_three(limit['flops'] / 1e9)} GFLOP/s"
    return f"memory at {_three(limit['bandwidth'] / 1e9)} GB/s"


def _three(value: float) -> str:
    """Three digits, and never a power of ten."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
