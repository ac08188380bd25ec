"""Who owns the codes of a `VQ`, and when they learn."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from xq.distributed import SharedGroup, all_reduce_sum_
from xq.learning import is_learning


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
        process_group: The processes that learn together; all by default.

    Raises:
        ValueError: If a size is below 1.
    """

    accumulating = False
    # whether the pending sums hold earlier micro-batches, and not an unfinished forward
    carries = False
    # whether all codes stay as they are
    is_frozen = False
    # sees the vectors, and the metric, before codes are chosen for them; `initialize` sets it
    watcher: Callable[["Codebook", Tensor, str], None] | None = None
    frozen: Tensor | None

    def __init__(self, codebook_size: int, dim: int, *, process_group: Any = None) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ValueError(
                f"{type(self).__name__} needs a positive codebook_size and dim, "
                f"got {codebook_size} and {dim}"
            )
        self.codebook_size, self.dim = codebook_size, dim
        self._shared_group = SharedGroup(process_group)
        # single codes that stay; a setting of this run, as `requires_grad` is, not a state
        self.register_buffer("frozen", None, persistent=False)

    @abstractmethod
    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        """The codes in use."""

    def refresh(self) -> None:
        """Derives the codes from the statistics."""

    def observe(self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "*batch"]) -> None:
        """Adds vectors and the codes that they chose to the pending sums."""

    def pending(self) -> list[Tensor]:
        """Sums since the last update; empty if none are kept."""
        return []

    def share(self) -> list[Tensor]:
        """What is summed over processes, in place, before `fold`; the pending sums by default."""
        return self.pending()

    def fold(self) -> None:
        """Moves the pending sums into the statistics."""

    def clear(self) -> None:
        """Forgets what is pending."""
        for sums in self.pending():
            sums.zero_()

    def load_codes(
        self, codes: Shaped[Tensor, "..."], shares: Shaped[Tensor, "..."] | None = None
    ) -> None:
        """Replaces all codes, and whatever statistics belong to them.

        Args:
            codes: `(codebook_size, dim)`.
            shares: How large a part of the vectors chooses each code; all alike by default.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        raise ValueError(f"{type(self).__name__} has no codes that could be set one by one")

    def freeze(self, codes: Shaped[Tensor, "..."] | None = None) -> None:
        """Keeps codes as they are, whatever trains; not saved, as `requires_grad` is not.

        Args:
            codes: Indices of single codes, or a mask `(codebook_size,)`; by default all codes.

        Raises:
            ValueError: If an index is out of range or the mask has another size.
        """
        if codes is None:
            self.is_frozen = True
            return
        mask = self.as_mask(codes)
        self.frozen = mask if self.frozen is None else self.frozen | mask

    def unfreeze(self) -> None:
        """Lets all codes learn again."""
        self.is_frozen, self.frozen = False, None

    def as_mask(self, codes: Shaped[Tensor, "..."]) -> Shaped[Tensor, " codebook_size"]:
        """Indices of codes, or a mask, as a mask; checked."""
        device, name = self.codes().device, type(self).__name__
        if codes.dtype == torch.bool:
            if codes.shape != (self.codebook_size,):
                raise ValueError(
                    f"{name} has {self.codebook_size} codes, got a mask of {tuple(codes.shape)}"
                )
            return codes.to(device)
        codes = codes.reshape(-1).to(device)
        outside = codes.is_floating_point() or ((codes < 0) | (codes >= self.codebook_size)).any()
        if outside:
            raise ValueError(
                f"{name} has the codes 0..{self.codebook_size - 1}, got {codes.tolist()[:8]}"
            )
        return torch.zeros(self.codebook_size, dtype=torch.bool, device=device).index_fill_(
            0, codes.long(), True
        )

    @property
    def process_group(self) -> Any:
        """The processes that learn together; None for all."""
        return self._shared_group.group

    def config(self) -> dict[str, Any]:
        """Constructor arguments beyond the sizes; no file keeps a process group."""
        return {}

    def extra_repr(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.config().items())
        return f"{self.codebook_size}, {self.dim}{options}"

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(*args)
        self.carries = False
        device = self.codes().device
        # a module built on the meta device and loaded with assign=True: no file has scratch sums
        for name in self._non_persistent_buffers_set:
            scratch = getattr(self, name)
            if scratch is not None and scratch.is_meta and device.type != "meta":
                setattr(self, name, torch.zeros_like(scratch, device=device))


def checked_codes(book: Codebook, codes: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and shares as `load_codes` takes them, the shares with the sum 1."""
    name, size = type(book).__name__, (book.codebook_size, book.dim)
    if codes.shape != size or not codes.is_floating_point():
        raise ValueError(
            f"{name} takes codes of shape {size}, got {codes.dtype} of shape {tuple(codes.shape)}; "
            "add_codes and keep_codes make a VQ with more or fewer"
        )
    shares = codes.new_ones(len(codes)) if shares is None else shares.to(codes)
    if shares.shape != size[:1] or (shares < 0).any() or not 0 < shares.sum() < float("inf"):
        raise ValueError(f"{name} takes a share for each of its {size[0]} codes, zero or more")
    if not codes.isfinite().all():
        raise ValueError(f"{name} got codes that are NaN or infinite")
    return codes, shares / shares.sum()


def has_parameters(module: nn.Module) -> bool:
    """Whether anything in it learns by gradient."""
    # no next(): torch 2.6 cannot trace it with a default
    for _ in module.parameters():
        return True
    return False


def start_learning(root: nn.Module) -> list[Codebook]:
    """Prepares each codebook below `root` that learns by statistics for one forward pass."""
    found = [m for m in root.modules() if isinstance(m, Codebook) and is_learning(m)]
    codebooks = [book for book in found if book.pending()]
    for book in codebooks:
        book.refresh()
        if not book.carries:
            book.clear()
    return codebooks


def finish_learning(codebooks: list[Codebook]) -> None:
    """Folds what the forward pass observed, after one sum over processes for all codebooks."""
    for book in codebooks:
        book.carries = book.accumulating
    ready = [book for book in codebooks if not book.accumulating]
    while ready:
        group = ready[0].process_group
        books = [book for book in ready if book.process_group is group]
        ready = [book for book in ready if book.process_group is not group]
        all_reduce_sum_([sums for book in books for sums in book.share()], group)
        for book in books:
            book.fold()


@contextmanager
def accumulating(module: nn.Module) -> Iterator[None]:
    """Within it, codebooks below `module` only observe; the next forward outside learns from all.

    For the micro-batches of one optimizer step. Under `DistributedDataParallel` enter its `no_sync`
    as well: otherwise its broadcast of buffers before each forward replaces the sums.

    Args:
        module: A quantizer, or a model around it.

    Examples:
        >>> vq, batch = VQ(8, 64, codebook=EMACodebook), torch.randn(4, 100, 8)
        >>> with accumulating(vq):
        ...     for micro_batch in batch[:3]:
        ...         _ = vq(micro_batch)
        >>> _ = vq(batch[3])  # learns from all four
        >>> vq.codebook.step.item()
        1
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
