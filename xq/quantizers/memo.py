"""What a call derives from the weights, kept until that call ends.

A residual of ten steps so normalizes a codebook that they share once. Weights may change between
any two calls, and by any means, hence nothing lives longer, nor is seen by another thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class _Thread(threading.local):
    kept: dict[Any, Any] | None = None


_THREAD = _Thread()


def one_call() -> Any:
    """A context in which `once` keeps what it makes; the root of a tree enters it at each call."""
    # graphs are cleared of repeated work by those who compile them
    return nullcontext() if torch.compiler.is_compiling() else _one_call()


@contextmanager
def _one_call() -> Iterator[None]:
    before, _THREAD.kept = _THREAD.kept, {}
    try:
        yield
    finally:
        _THREAD.kept = before


def once(make: Callable[..., T], *args: Any) -> T:
    """`make(*args)`, of a bound method, made once within one call of the root."""
    if torch.compiler.is_compiling() or _THREAD.kept is None:
        return make(*args)
    key = make, args, torch.is_grad_enabled()
    if key not in _THREAD.kept:
        _THREAD.kept[key] = make(*args)
    return _THREAD.kept[key]


def forget() -> None:
    """Drops what this call has made so far, because a weight was changed within it."""
    if _THREAD.kept is not None:
        _THREAD.kept.clear()
