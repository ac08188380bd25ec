"""Codes that nobody chooses start again at vectors of the batch.

Everything here is alike on all processes and waits for none: who is dead follows from the summed
counts, and where a code starts again from rows that every process offers, which travel with the
sums. Rows are picked by an integer hash of the number of the step, so a run that is resumed goes on
with the same ones.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.distributed import rank, world_size
from xq.learning import is_learning
from xq.quantizers.codebook import Codebook

# what a revived code weighs, as a share of the fair count: enough to be seen before it is judged
_MASS = 0.3
# at each step at most this share of the codes can start again, and as many rows are offered
_AT_ONCE, _FEWEST = 16, 64


class CountingCodebook(Codebook):
    """A codebook that counts how often its codes are chosen, and revives the dead ones.

    Args:
        codebook_size: Rows of the table.
        dim: Their length.
        decay: What is kept of the counts at each update, in [0, 1).
        revive: A code is dead when its count falls below this share of the fair one, that is of
            vectors / codes. Zero: never.
        revive_below: The same as a count of vectors a step; the larger of both bounds holds.
        process_group: The processes that learn together; all by default.
        counting: Whether to count at all.

    Raises:
        ValueError: If an argument lies outside its range.
    """

    count: Tensor
    step: Tensor
    pending_count: Tensor
    pending_samples: Tensor
    pending_visits: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        decay: float,
        revive: float,
        revive_below: float,
        process_group: Any,
        counting: bool = True,
    ) -> None:
        super().__init__(codebook_size, dim, process_group=process_group)
        name = type(self).__name__
        if not 0 <= decay < 1:
            raise ValueError(f"{name} needs a decay in [0, 1), got {decay}; 0.99 is usual")
        if not 0 <= revive < 1 or revive_below < 0:
            raise ValueError(
                f"{name} needs revive in [0, 1), a share of the fair count, and revive_below, a "
                f"count, of zero or more, got {revive} and {revive_below}"
            )
        self.decay, self.revive, self.revive_below = decay, revive, revive_below
        self.counting = counting
        if not counting:
            return
        rows = min(codebook_size, max(codebook_size // _AT_ONCE, _FEWEST))
        self.register_buffer("count", torch.zeros(codebook_size))
        # updates so far; -1 for codes that were set and have not learned since
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pending_count", torch.zeros(codebook_size), persistent=False)
        # rows of the batch, the last column 1 where there is one
        self.register_buffer("pending_samples", torch.zeros(rows, dim + 1), persistent=False)
        self.register_buffer("pending_visits", torch.zeros((), dtype=torch.int64), persistent=False)

    def observe(self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "*batch"]) -> None:
        if not self.counting or self.is_frozen or not is_learning(self):
            return
        with torch.no_grad():
            indices = indices.reshape(-1)
            vectors = u.reshape(-1, self.dim).to(self.count.dtype)
            # one NaN, such as mixed precision makes now and then, would stay in the averages
            # told by the sum, a pass and not three: too large for it is too large for distances
            finite = vectors.sum(-1).isfinite()
            vectors = vectors.where(finite[:, None], 0.0)
            self.pending_count.index_add_(0, indices, finite.to(vectors.dtype))
            self.add(vectors, indices)
            if self.revives and len(vectors):
                self._keep_rows(vectors, finite)

    def add(self, vectors: Float[Tensor, "n dim"], indices: Int[Tensor, " n"]) -> None:
        """Adds to further sums; vectors that are not finite are zero."""

    def pending(self) -> list[Tensor]:
        return [self.pending_count] if self.counting and not self.is_frozen else []

    def clear(self) -> None:
        super().clear()
        for scratch in (self.pending_samples, self.pending_visits):
            scratch.zero_()

    def share(self) -> list[Tensor]:
        sums = self.pending()
        processes = world_size(self.process_group)
        if not self.revives or processes == 1:
            return sums
        # each process writes into a column of its own, so that the sum holds them all
        rows = max(-(-len(self.pending_samples) // processes), _FEWEST)
        own = self.pending_samples[:rows]
        offers = own.new_zeros(len(own), processes, self.dim + 1)
        offers[:, rank(self.process_group)] = own
        self._offers = offers
        return [*sums, offers]

    @property
    def revives(self) -> bool:
        """Whether dead codes start again."""
        return self.counting and (self.revive > 0 or self.revive_below > 0)

    def _keep_rows(self, vectors: Tensor, finite: Tensor) -> None:
        """Picks rows, spread over the batch; of several calls in a step each is as likely."""
        n, slots = len(vectors), len(self.pending_samples)
        slot = torch.arange(slots, device=vectors.device)
        noise = _hashed(slot + slots * (self.step * 64 + self.pending_visits))
        stride = max(n // slots, 1)
        # one in each stretch of the batch, wherever that begins
        row = (slot * stride + noise % stride + (noise[:1] >> 24)) % n
        there = finite[row] & (slot < n)
        new = torch.cat([vectors[row], there[:, None].to(vectors.dtype)], dim=1)
        self.pending_visits.add_(1)
        taken = ((noise >> 32) % self.pending_visits == 0) | (self.pending_samples[:, -1] == 0)
        taken = (taken & there)[:, None]
        self.pending_samples.copy_(torch.where(taken, new, self.pending_samples))

    def candidates(self) -> Float[Tensor, "rows {self.dim+1}"]:
        """The rows that processes offer."""
        if world_size(self.process_group) == 1:
            return self.pending_samples
        offers = self._offers.flatten(0, 1)
        del self._offers
        # those first that are there: some processes may have no vectors
        first = offers[:, -1].argsort(descending=True, stable=True)
        return offers[first[: len(self.pending_samples)]]

    def fold_count(self) -> tuple[Tensor, Tensor]:
        """Moves the pending counts into the averages; by what factor and by which share."""
        observed = self.pending_count.sum()
        learned = observed > 0
        # nothing observed, nothing forgotten; asked of the sums, which all processes share
        share = torch.where(learned, 1 - self.decay, 0.0).to(self.count.dtype)
        # codes that were set weigh as if this batch had placed them
        factor = observed / self.count.sum().clamp(min=torch.finfo(self.count.dtype).tiny)
        factor = torch.where(learned & (self.step < 0), factor, 1.0)
        if self.frozen is not None:
            share = share * ~self.frozen
        self.count.mul_(factor).lerp_(self.pending_count, share)
        self.step.copy_(torch.where(learned, self.step.clamp(min=0) + 1, self.step))
        return factor, share

    def revival(
        self, candidates: Float[Tensor, "rows width"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows {self.dim}"], Shaped[Tensor, " rows"]]:
        """Which codes may start again, where, and whether they do; counts them anew if so."""
        fair = self.count.mean()
        lightest = self.count.argsort(stable=True)[: len(candidates)]
        light = self.count[lightest]
        dead = light < (self.revive * fair).clamp(min=self.revive_below)
        starts = dead & (candidates[:, -1] > 0)
        if self.frozen is not None:
            starts = starts & ~self.frozen[lightest]
        self.count.index_copy_(0, lightest, torch.where(starts, _MASS * fair, light))
        return lightest, candidates[:, :-1], starts

    def config(self) -> dict[str, Any]:
        return {"decay": self.decay, "revive": self.revive, "revive_below": self.revive_below}


def _hashed(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """An integer that looks random, zero or more (multiply and shift, as in splitmix64)."""
    x = (x + 1) * -7046029254386353131
    x = (x ^ (x >> 29)) * -4658895280553007687
    return (x ^ (x >> 32)) & 0x7FFFFFFFFFFFFFFF
