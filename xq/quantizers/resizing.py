"""A VQ with fewer codes, or with more."""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from xq.quantizers.kmeans import plus_plus
from xq.quantizers.revival import CountingCodebook
from xq.quantizers.sharing import sharing
from xq.quantizers.vq import VQ

# what a codebook has for each of its codes
_ROWS = ("weight", "count", "total")


@torch.no_grad()
def keep_codes(
    vq: nn.Module, codes: Shaped[Tensor, "..."]
) -> tuple[VQ, Int[Tensor, " codebook_size"]]:
    """The same VQ with some of its codes, such as those that a data set uses.

    Args:
        vq: A `VQ`, left as it is; the new one has a codebook of its own.
        codes: Which to keep: indices in their new order, or a mask.

    Returns:
        The new VQ, and a table of new indices by old ones, -1 for those that are gone:
        `table[indices]` brings stored tokens along.

    Raises:
        ValueError: If none would be left, one is named twice or out of range, or the codebook
            has no rows of its own.

    Examples:
        >>> vq, vectors = VQ(8, 64), torch.randn(20, 8)
        >>> used = vq.encode(vectors).unique()
        >>> smaller, table = keep_codes(vq, used)
        >>> torch.equal(table[vq.encode(vectors)], smaller.encode(vectors))
        True
    """
    vq = _checked(vq, "keep_codes")
    book: Any = vq.codebook
    codes = codes.to(book.codes().device)
    mask = book.as_mask(codes)
    kept = mask.nonzero()[:, 0] if codes.dtype == torch.bool else codes.reshape(-1).long()
    if not len(kept) or len(kept) != mask.sum():
        raise ValueError(f"keep_codes takes different codes, one or more, got {codes.tolist()[:8]}")
    table = torch.full_like(mask, -1, dtype=torch.int64)
    table[kept] = torch.arange(len(kept), device=kept.device)
    new = _resized(vq, len(kept))
    _copy_rows(book, new.codebook, kept, slice(None))
    return new, table


@torch.no_grad()
def add_codes(vq: nn.Module, codebook_size: int, x: Shaped[Tensor, "..."], *, seed: int = 0) -> VQ:
    """The same VQ with further codes behind those that it has, which keep their indices.

    Args:
        vq: A `VQ`, left as it is; the new one has a codebook of its own.
        codebook_size: How many codes there will be.
        x: Vectors `(*batch, dim)` as the VQ takes them; new codes are drawn from those that are far
            from all codes (k-means++), and weigh as much as the others do on average.
        seed: For the draws.

    Raises:
        ValueError: If there are that many codes already, `x` does not fit, or the codebook has no
            rows of its own.

    Examples:
        >>> larger = add_codes(VQ(8, 64), 96, torch.randn(500, 8))
        >>> larger.codebook_size
        96
    """
    vq = _checked(vq, "add_codes")
    book: Any = vq.codebook
    if codebook_size <= book.codebook_size:
        raise ValueError(
            f"add_codes makes a codebook larger, got codebook_size={codebook_size} for one of "
            f"{book.codebook_size} codes; keep_codes makes it smaller"
        )
    if x.ndim == 0 or x.shape[-1] != vq.dim or not x.numel() or not x.isfinite().all():
        raise ValueError(
            f"add_codes takes finite vectors (..., {vq.dim}), one or more, got {tuple(x.shape)}"
        )
    vectors = vq.bound(x.reshape(-1, vq.dim).to(book.codes()))
    generator = torch.Generator().manual_seed(seed)
    codes = plus_plus(vectors, codebook_size, generator, start=vq.bound(book.codes()))
    new = _resized(vq, codebook_size)
    new.codebook.load_codes(codes)
    fresh: Any = new.codebook
    if book.counting:
        fresh.count.fill_(book.count.mean())
        if hasattr(book, "total"):
            fresh.total.copy_(codes * fresh.count[:, None])
    _copy_rows(book, fresh, slice(None), slice(book.codebook_size))
    return new


def _checked(vq: nn.Module, name: str) -> VQ:
    if not isinstance(vq, VQ):
        raise ValueError(
            f"{name} takes a VQ, got {type(vq).__name__}; change the leaves and build the tree of "
            "them, as in ProductQuantizer([...]) or ResidualQuantizer([...])"
        )
    if not isinstance(vq.codebook, CountingCodebook):
        raise ValueError(
            f"{name} needs codes that are rows of a table of their own, which those of "
            f"{type(vq.codebook).__name__} are not"
        )
    return vq


def _resized(vq: Any, codebook_size: int) -> VQ:
    """A VQ like this one with a new codebook."""
    old: Any = vq.codebook
    options = {**old.config(), "process_group": old.process_group}
    book = type(old)(codebook_size, vq.dim, **options).to(old.codes()).train(old.training)
    new = sharing(vq, codebook=book)
    new.codebook_size = codebook_size
    return new


def _copy_rows(old: Any, new: Any, source: Any, target: Any) -> None:
    for name in _ROWS:
        if hasattr(old, name):
            getattr(new, name)[target] = getattr(old, name)[source]
    if old.counting:
        new.step.copy_(old.step)
