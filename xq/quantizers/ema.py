"""Codes that follow the running mean of the vectors that chose them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xq.quantizers.codebook import Codebook, is_learning

# lighter codes keep their place: so small a sum of a decayed average is rounding alone
_LIGHTEST = 1e-8


class EMACodebook(Codebook):
    """Codes as exponential moving averages (van den Oord et al. 2017, appendix A.1).

    `weight = total / count`, without Laplace smoothing. Both start at zero, so the first vectors
    that choose a code place it; a code that none has chosen stays where it began. `weight`,
    `count` and `total` are the whole state.

    Args:
        codebook_size: Rows of the table.
        dim: Their length.
        decay: What is kept of the statistics at each update, in [0, 1).

    Raises:
        ValueError: If `decay` lies outside [0, 1).
    """

    weight: Tensor
    count: Tensor
    total: Tensor
    pending_count: Tensor
    pending_total: Tensor

    def __init__(self, codebook_size: int, dim: int, *, decay: float = 0.99) -> None:
        super().__init__(codebook_size, dim)
        if not 0 <= decay < 1:
            raise ValueError(f"EMACodebook needs a decay in [0, 1), got {decay}; 0.99 is usual")
        self.decay = decay
        self.register_buffer("weight", torch.empty(codebook_size, dim))
        self.register_buffer("count", torch.empty(codebook_size))
        self.register_buffer("total", torch.empty(codebook_size, dim))
        self.register_buffer("pending_count", torch.zeros(codebook_size), persistent=False)
        self.register_buffer("pending_total", torch.zeros(codebook_size, dim), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes and forgets the statistics."""
        with torch.no_grad():
            self.weight.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
            for sums in (self.count, self.total, self.pending_count, self.pending_total):
                sums.zero_()

    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        return self.weight

    @torch.no_grad()
    def refresh(self) -> None:
        count = self.count[:, None]
        mean = self.total / count.clamp(min=_LIGHTEST)
        self.weight.copy_(torch.where(count > _LIGHTEST, mean, self.weight))

    def observe(self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "*batch"]) -> None:
        if not is_learning(self):
            return
        with torch.no_grad():
            indices = indices.reshape(-1)
            vectors = u.reshape(-1, self.dim).to(self.pending_total.dtype)
            # one NaN, such as mixed precision makes now and then, would stay in the averages
            finite = vectors.isfinite().all(-1)
            self.pending_count.index_add_(0, indices, finite.to(vectors.dtype))
            self.pending_total.index_add_(0, indices, vectors.where(finite[:, None], 0.0))

    def pending(self) -> list[Tensor]:
        return [self.pending_count, self.pending_total]

    @torch.no_grad()
    def fold(self) -> None:
        # nothing observed, nothing forgotten; asked of the sums, which all processes share
        observed = self.pending_count.sum() > 0
        share = torch.where(observed, 1 - self.decay, 0.0).to(self.count.dtype)
        self.count.lerp_(self.pending_count, share)
        self.total.lerp_(self.pending_total, share)

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(*args)
        self.carries = False
        # a module built on the meta device and loaded with assign=True: no file has these sums
        if self.pending_total.is_meta and not self.total.is_meta:
            self.pending_count = torch.zeros_like(self.count)
            self.pending_total = torch.zeros_like(self.total)

    def config(self) -> dict[str, Any]:
        return {"decay": self.decay}
