"""Who owns the codes of a `VQ`, and how they learn."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.distributed import all_reduce_sum_


class Codebook(nn.Module, ABC):
    """A table of codes `(codebook_size, dim)` and the rule by which it learns.

    Codes that learn by gradient need only `codes`. Others learn in three steps, all driven by the
    root of the quantizer's tree: `refresh` derives the codes from the statistics as a learning
    forward starts, `observe` adds to `pending` sums during it, `fold` moves these (summed over all
    processes) into the statistics as it ends. So the codes stay the same within a forward and
    until the next one, and `decode(indices)` gives what the decoder saw.

    Args:
        codebook_size: Rows of the table.
        dim: Their length.

    Raises:
        ValueError: If either is below 1.
    """

    accumulating = False
    # whether the pending sums hold earlier micro-batches, and not an unfinished forward
    carries = False

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(
                f"{type(self).__name__} needs a positive codebook_size and dim, "
                f"got {codebook_size} and {dim}"
            )
        self.codebook_size, self.dim = codebook_size, dim

    @abstractmethod
    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        """The codes in use."""

    def refresh(self) -> None:
        """Derives the codes from the statistics."""

    def observe(self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "*batch"]) -> None:
        """Adds vectors and the codes that they chose to the pending sums."""

    def pending(self) -> list[Tensor]:
        """Sums since the last update, to be summed over processes; empty if none are kept."""
        return []

    def fold(self) -> None:
        """Moves the pending sums into the statistics."""

    def config(self) -> dict[str, Any]:
        """Constructor arguments beyond the sizes."""
        return {}

    def extra_repr(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.config().items())
        return f"{self.codebook_size}, {self.dim}{options}"


class GradientCodebook(Codebook):
    """Codes that are a parameter and learn from the codebook loss (van den Oord et al. 2017).

    They start uniform in +-1 / codebook_size, as in taming-transformers, LlamaGen and XQ-GAN.
    """

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, dim)
        self.weight = nn.Parameter(torch.empty(codebook_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes."""
        nn.init.uniform_(self.weight, -1 / self.codebook_size, 1 / self.codebook_size)

    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        return self.weight


def has_parameters(module: nn.Module) -> bool:
    """Whether anything in it learns by gradient."""
    # no next(): torch 2.6 cannot trace it with a default
    for _ in module.parameters():
        return True
    return False


def is_learning(module: nn.Module) -> bool:
    """Whether state may change: in training, with gradients on, never inside a backward pass.

    So validation under `no_grad` cannot corrupt an average, and what activation checkpointing
    recomputes (with `use_reentrant=False`) is not learned from twice.
    """
    return module.training and torch.is_grad_enabled() and not _in_backward()


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def start_learning(root: nn.Module) -> list[Codebook]:
    """Prepares each codebook below `root` that learns by statistics for one forward pass."""
    found = [m for m in root.modules() if isinstance(m, Codebook) and is_learning(m)]
    codebooks = [book for book in found if book.pending()]
    for book in codebooks:
        book.refresh()
        if not book.carries:
            for sums in book.pending():
                sums.zero_()
    return codebooks


def finish_learning(codebooks: list[Codebook]) -> None:
    """Folds what the forward pass observed, after one sum over processes for all codebooks."""
    for book in codebooks:
        book.carries = book.accumulating
    ready = [book for book in codebooks if not book.accumulating]
    if ready:
        all_reduce_sum_([sums for book in ready for sums in book.pending()])
    for book in ready:
        book.fold()


@contextmanager
def accumulating(module: nn.Module) -> Iterator[None]:
    """Within it, codebooks below `module` only observe; the next forward outside learns from all.

    For the micro-batches of one optimizer step. Under `DistributedDataParallel` enter its `no_sync`
    as well: otherwise its broadcast of buffers before each forward replaces the sums.
    """
    codebooks = [m for m in module.modules() if isinstance(m, Codebook)]
    before = [book.accumulating for book in codebooks]
    try:
        for book in codebooks:
            book.accumulating = True
        yield
    finally:
        for book, value in zip(codebooks, before, strict=True):
            book.accumulating = value
