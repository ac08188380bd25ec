"""How codes are used: exactly, and as VAR and XQ-GAN count it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.distributed import SharedGroup, all_reduce_sum_
from xq.precision import Float32

# counts take 8 bytes each; beyond this (512 MiB) a histogram is no way to count
_MOST_COUNTS = 1 << 26


class Usage(NamedTuple):
    """How the codes were used: one value for each scale (if any), branch and step.

    Attributes:
        used: Share of the codes that appeared, in [0, 1].
        perplexity: How many codes, all used alike, would have this entropy.
        entropy: Of the code distribution, in bits; `log2(codebook_size)` at most.
    """

    used: Float[Tensor, "*scales_and_code"]
    perplexity: Float[Tensor, "*scales_and_code"]
    entropy: Float[Tensor, "*scales_and_code"]


@runtime_checkable
class HasCodes(Protocol):
    """What `CodebookUsage.of` reads from a quantizer or wrapper."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def code_shape(self) -> tuple[int, ...]: ...
    @property
    def grids(self) -> tuple[tuple[int, int], ...]: ...


class CodebookUsage(nn.Module):
    """Counts every index that it is shown: exact over a data set, summed over processes.

    A scale of few tokens cannot use many codes in one batch: count over a whole epoch.

    Args:
        codebook_size: How many values each index can take.
        code_shape: Shape of one token's indices.
        grids: Token grids `(h, w)` of a multi-scale quantizer, coarse to fine; `()` without.
        process_group: The processes that count together; all by default.

    Raises:
        ValueError: If there would be more than 2^26 counts.

    Examples:
        >>> quantizer = ProductQuantizer(VQ(4, 16), P=2)
        >>> usage = CodebookUsage.of(quantizer)
        >>> for _ in range(10):  # an epoch
        ...     usage.update(quantizer.encode(torch.randn(64, 8)))
        >>> used, perplexity, entropy = usage.compute()
        >>> used.shape  # one number a branch
        torch.Size([2])
    """

    counts: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_shape: Sequence[int] = (),
        grids: Sequence[tuple[int, int]] = (),
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self._shared_group = SharedGroup(process_group)
        self.codebook_size, self.code_shape = codebook_size, tuple(code_shape)
        self.grids = tuple(grids)
        self.shape = (*([len(self.grids)] if self.grids else []), *self.code_shape)
        if math.prod(self.shape) * codebook_size > _MOST_COUNTS:
            raise ValueError(
                f"CodebookUsage would keep {math.prod(self.shape)} x {codebook_size} counts; "
                f"above {_MOST_COUNTS} in all, count a group of bits at a time"
            )
        self.register_buffer("counts", torch.empty(*self.shape, codebook_size, dtype=torch.int64))
        self.reset()

    @classmethod
    def of(cls, quantizer: HasCodes) -> "CodebookUsage":
        """A counter for the indices of this quantizer."""
        return cls(quantizer.codebook_size, quantizer.code_shape, quantizer.grids)

    def reset(self) -> None:
        """Forgets all counts."""
        self.counts.zero_()

    @torch.no_grad()
    def update(self, indices: Shaped[Tensor, "..."]) -> None:
        """Counts indices of any batch shape, `(b, tokens, *code_shape)` with grids.

        Raises:
            ValueError: If they are no integers or their shape does not fit; on the CPU, if one is
                out of range. (Elsewhere that is an error of torch: looking would wait.)
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"CodebookUsage counts integer indices, got {indices.dtype}")
        tail = tuple(indices.shape[indices.ndim - len(self.code_shape) :])
        tokens = sum(h * w for h, w in self.grids)
        token_axes = indices.ndim - len(self.code_shape)
        if tail != self.code_shape or (
            self.grids and (token_axes != 2 or indices.shape[1] != tokens)
        ):
            want = (*(("b", tokens) if self.grids else ("...",)), *self.code_shape)
            raise ValueError(
                f"CodebookUsage expects indices of shape {want}, got {tuple(indices.shape)}"
            )
        indices = indices.long()
        inside = (indices >= 0) & (indices < self.codebook_size)
        if indices.device.type == "cpu" and not inside.all():
            raise ValueError(
                f"CodebookUsage counts indices in 0..{self.codebook_size - 1}, "
                f"got {int(indices.min())}..{int(indices.max())}"
            )
        # every position counts in a row of its own; a stranger must not count in its neighbour's
        rows = torch.arange(math.prod(self.code_shape), device=indices.device)
        rows = rows.view(self.code_shape)
        if self.grids:
            sizes = torch.tensor([h * w for h, w in self.grids], device=indices.device)
            scale = torch.arange(len(sizes), device=indices.device)
            scale = scale.repeat_interleave(sizes, output_size=tokens)
            rows = rows + scale.view(-1, *[1] * len(self.code_shape)) * rows.numel()
        keys = (indices + rows * self.codebook_size).where(inside, -1).reshape(-1)
        ones = keys.new_ones(()).expand(len(keys))
        self.counts.view(-1).index_add_(0, keys, ones)

    @torch.no_grad()
    def compute(self) -> Usage:
        """Usage of all indices so far, on all processes; NaN perplexity and entropy before any."""
        counts = self.counts.clone()
        all_reduce_sum_([counts], self._shared_group.group)
        share = counts.double() / counts.sum(-1, keepdim=True)
        entropy = torch.special.entr(share).sum(-1)
        used = (counts > 0).double().mean(-1)
        return Usage(used.float(), entropy.exp().float(), (entropy / math.log(2)).float())


class RunningUtilisation(Float32):
    """The share of codes in use as VAR and XQ-GAN report it: those with enough recent hits.

    A running mean of hits a batch is kept for each code. A code counts as used if that is at least
    0.08 times what it would be were all codes hit alike, **as often as there are tokens on the
    finest scale**, whichever scale is meant. So a coarse scale cannot come near 1: with `n` tokens
    of `h w`, it stays below `n / (0.08 h w)`. `CodebookUsage` counts exactly.

    Hits are those of all processes. The first batch counts as it is for the first scale and a tenth
    for the others, as in the released codes; then a tenth each, and a hundredth after 100 scales
    (10 batches of 10 scales). Without scales each index of a token is counted by itself.

    Args:
        codebook_size: How many values each index can take.
        code_shape: Shape of one token's indices.
        grids: Token grids `(h, w)` of a multi-scale quantizer, coarse to fine; `()` without.
        process_group: The processes that count together; all by default.

    Raises:
        ValueError: If there would be more than 2^26 counts.

    Examples:
        >>> quantizer = VQ(4, 16)
        >>> running = RunningUtilisation.of(quantizer)
        >>> running.update(quantizer.encode(torch.randn(64, 4)))
        >>> running.compute().shape
        torch.Size([])
    """

    running: Tensor
    margin: Tensor
    batches: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_shape: Sequence[int] = (),
        grids: Sequence[tuple[int, int]] = (),
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        # one batch at a time
        self._hits = CodebookUsage(codebook_size, code_shape, grids, process_group=process_group)
        self.register_buffer("running", torch.zeros(self._hits.counts.shape))
        self.register_buffer("margin", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(cls, quantizer: HasCodes) -> "RunningUtilisation":
        """One for the indices of this quantizer."""
        return cls(quantizer.codebook_size, quantizer.code_shape, quantizer.grids)

    @torch.no_grad()
    def update(self, indices: Shaped[Tensor, "..."]) -> None:
        """Takes the next batch, of which each process has its part.

        Raises:
            ValueError: As `CodebookUsage.update`.
        """
        counter = self._hits
        counter.reset()
        counter.update(indices)
        hits = counter.counts.clone()
        all_reduce_sum_([hits], counter._shared_group.group)
        # the finest scale's, which is the last one
        scales = hits.reshape(len(counter.grids) or 1, -1, hits.shape[-1])
        tokens = scales[-1, 0].sum()
        visits = self.batches * len(scales) + torch.arange(len(scales), device=hits.device)
        fresh = torch.where(visits < 100, 0.1, 0.01).where(visits > 0, 1.0)
        kept = torch.where(visits < 100, 0.9, 0.99).where(visits > 0, 0.0)
        running = self.running.view(scales.shape)
        running = kept[:, None, None] * running + fresh[:, None, None] * scales
        self.running = running.view(hits.shape)
        self.margin = tokens.float() / counter.codebook_size * 0.08
        self.batches = self.batches + 1

    @torch.no_grad()
    def compute(self) -> Float[Tensor, "*scales_and_code"]:
        """The share of codes in use: one value for each scale (if any), branch and step.

        Raises:
            ValueError: If there was no batch.
        """
        if not self.batches:
            raise ValueError("RunningUtilisation has seen no batch of indices; call update first")
        return (self.running >= self.margin).float().mean(-1)
