"""Codes that follow the running mean of the vectors that chose them."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.distributed import rank, world_size
from xq.quantizers.codebook import checked_codes
from xq.quantizers.revival import CountingCodebook

# lighter codes keep their place: so small a sum of a decayed average is rounding alone
_LIGHTEST = 1e-8


class EMACodebook(CountingCodebook):
    """Codes as exponential moving averages (van den Oord et al. 2017, appendix A.1).

    `weight = total / count`. Both start at zero, so the first vectors that choose a code place it.
    Codes that are not chosen start again at vectors of the batch (`revive`), on all processes
    alike. `weight`, `count`, `total` and `step` are the whole state.

    `decay` and `revive` may be set while it trains. For the least error within few epochs start
    from `initialize`, let `decay` go from 0.9 to 0.99 and set `revive` to 0 for the last tenth.

    Args:
        codebook_size: Rows of the table.
        dim: Their length.
        decay: What is kept of the statistics at each update, in [0, 1).
        smoothing: Laplace smoothing: this count is added to each code's (the paper's N_i) before
            the division, in proportion. It draws rare codes towards zero, so by default 0.
        revive: A code is dead when its count falls below this share of the fair one, that is of
            vectors / codes; in [0, 1). Zero: codes are left where they are.
        revive_below: The same as a count of vectors a step; the larger of both bounds holds.
        process_group: The processes that learn together; all by default.

    Raises:
        ValueError: If an argument lies outside its range.

    Examples:
        >>> vq = VQ(8, 512, codebook=partial(EMACodebook, decay=0.9))
        >>> z, indices, losses = vq(torch.randn(2, 256, 8))  # learns, since it is in training mode
        >>> vq.codebook.decay = 0.99
        >>> list(vq.parameters())
        []
    """

    weight: Tensor
    total: Tensor
    pending_total: Tensor
    # the first process's codes, on their way to all in the first update that these share
    drawn: Tensor | None = None
    has_drawn = False

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float = 0.99,
        smoothing: float = 0.0,
        revive: float = 0.02,
        revive_below: float = 0.0,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            decay=decay,
            revive=revive,
            revive_below=revive_below,
            process_group=process_group,
        )
        if smoothing < 0:
            raise ValueError(f"EMACodebook needs a smoothing of zero or more, got {smoothing}")
        self.smoothing = smoothing
        self.register_buffer("weight", torch.empty(codebook_size, dim))
        self.register_buffer("total", torch.empty(codebook_size, dim))
        self.register_buffer("pending_total", torch.zeros(codebook_size, dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes and forgets the statistics."""
        with torch.no_grad():
            self.weight.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
            for sums in (self.count, self.total, self.step):
                sums.zero_()
            self.clear()
        self.carries = self.has_drawn = False

    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        return self.weight

    @torch.no_grad()
    def refresh(self) -> None:
        count = self.count
        if self.smoothing:
            everything = count.sum()
            smoothed = count + self.smoothing
            count = smoothed * (everything / smoothed.sum())
        mean = self.total / count.clamp(min=_LIGHTEST)[:, None]
        # codes that were set and have not learned since are what they were set to
        learned = (self.count > _LIGHTEST) & (self.step >= 0)
        if self.frozen is not None:
            learned = learned & ~self.frozen
        self.weight.copy_(torch.where(learned[:, None], mean, self.weight))

    def add(self, vectors: Float[Tensor, "n dim"], indices: Int[Tensor, " n"]) -> None:
        self.pending_total.index_add_(0, indices, vectors)

    def pending(self) -> list[Tensor]:
        return [] if self.is_frozen else [self.pending_count, self.pending_total]

    def clear(self) -> None:
        super().clear()
        self.pending_total.zero_()

    def share(self) -> list[Tensor]:
        sums = super().share()
        if self.has_drawn or world_size(self.process_group) == 1:
            return sums
        # processes with other seeds drew other codes, and nothing else moves those not yet chosen
        own = self.weight.clone()
        self.drawn = own if rank(self.process_group) == 0 else own.zero_()
        return [*sums, self.drawn]

    @torch.no_grad()
    def fold(self) -> None:
        factor, share = self.fold_count()
        self.total.mul_(factor).lerp_(self.pending_total, share[..., None])
        if self.drawn is not None:
            chosen = (self.count > _LIGHTEST)[:, None]
            self.weight.copy_(torch.where(chosen, self.weight, self.drawn))
            self.drawn, self.has_drawn = None, True
        if self.revives:
            codes, rows, starts = self.revival(self.candidates())
            placed = rows * self.count[codes][:, None]
            placed = torch.where(starts[:, None], placed, self.total[codes])
            self.total.index_copy_(0, codes, placed)

    @torch.no_grad()
    def load_codes(
        self, codes: Shaped[Tensor, "..."], shares: Shaped[Tensor, "..."] | None = None
    ) -> None:
        """Replaces codes and statistics; the first batch after it counts as much as they do.

        Args:
            codes: `(codebook_size, dim)`.
            shares: How large a part of the vectors chooses each code; all alike by default.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        codes, shares = checked_codes(self, codes, shares)
        self.weight.copy_(codes)
        self.count.copy_(shares)
        self.total.copy_(self.weight * self.count[:, None])
        self.step.fill_(-1)
        self.clear()
        self.carries = False

    def config(self) -> dict[str, Any]:
        return {**super().config(), "smoothing": self.smoothing}
