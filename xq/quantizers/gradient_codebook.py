"""Codes that are a parameter."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from xq.distributed import sharded_like
from xq.quantizers.codebook import checked_codes
from xq.quantizers.revival import CountingCodebook


class GradientCodebook(CountingCodebook):
    """Codes that are a parameter and learn from the codebook loss (van den Oord et al. 2017).

    They start uniform in +-1 / codebook_size, as in taming-transformers, LlamaGen and XQ-GAN.

    With `revive` (or `revive_below`) codes that are not chosen start again at vectors of the batch,
    as the next learning forward begins. `revive_in(optimizer, quantizer)` does so after each step
    of the optimizer instead, and resets what that keeps of these codes.

    Args:
        codebook_size: Rows of the table.
        dim: Their length.
        revive: A code is dead when its average count falls below this share of the fair one, that
            is of vectors / codes; in [0, 1), such as 0.02. Zero: never, and nothing is counted.
        revive_below: The same as a count of vectors a step; the larger of both bounds holds.
        decay: What is kept of the counts at each update, in [0, 1).
        process_group: The processes that learn together; all by default.

    Raises:
        ValueError: If an argument lies outside its range.

    Examples:
        >>> vq = VQ(8, 512, codebook=partial(GradientCodebook, revive=0.02))
        >>> optimizer = torch.optim.AdamW(vq.parameters(), weight_decay=0.0)
        >>> handle = revive_in(optimizer, vq)
    """

    samples: Tensor
    kept: Tensor | None

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        revive: float = 0.0,
        revive_below: float = 0.0,
        decay: float = 0.99,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            decay=decay,
            revive=revive,
            revive_below=revive_below,
            process_group=process_group,
            counting=revive > 0 or revive_below > 0,
        )
        self.weight = nn.Parameter(torch.empty(codebook_size, dim))
        # what single frozen codes are, wherever an optimizer's momentum takes the parameter
        self.register_buffer("kept", None, persistent=False)
        if self.counting:
            # dead codes start at these as the next step begins, so a resumed run needs them
            self.register_buffer("samples", torch.zeros_like(self.pending_samples))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes and forgets the counts."""
        with torch.no_grad():
            self.weight.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
            if self.counting:
                for counts in (self.count, self.samples, self.step):
                    counts.zero_()
                self.clear()
        self.carries = False

    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        if self.frozen is None or self.kept is None:
            return self.weight
        return torch.where(self.frozen[:, None], self.kept, self.weight)

    @torch.no_grad()
    def refresh(self) -> None:
        if self.counting:
            self._revive()

    @torch.no_grad()
    def fold(self) -> None:
        self.fold_count()
        if self.revives:
            self.samples.copy_(self.candidates())

    @torch.no_grad()
    def _revive(self) -> Bool[Tensor, " codebook_size"]:
        """Starts dead codes again, once for each fold; which ones."""
        codes, rows, starts = self.revival(self.samples.clone())
        self.samples.zero_()
        revived = torch.zeros_like(self.count, dtype=torch.bool).index_copy_(0, codes, starts)
        placed = torch.zeros_like(rows[:1]).expand(self.codebook_size, -1)
        placed = placed.index_copy(0, codes, rows)
        chosen = sharded_like(revived[:, None], self.weight)
        placed = sharded_like(placed.to(self.weight.dtype), self.weight)
        self.weight.copy_(torch.where(chosen, placed, self.weight))
        return revived

    @torch.no_grad()
    def load_codes(
        self, codes: Shaped[Tensor, "..."], shares: Shaped[Tensor, "..."] | None = None
    ) -> None:
        """Replaces all codes.

        Args:
            codes: `(codebook_size, dim)`.
            shares: How large a part of the vectors chooses each code; all alike by default.

        Raises:
            ValueError: If a shape does not fit or a value is not finite.
        """
        codes, shares = checked_codes(self, codes, shares)
        self.weight.copy_(codes)
        if self.kept is not None:
            self.kept.copy_(codes)
        if self.counting:
            self.count.copy_(shares)
            self.samples.zero_()
            self.step.fill_(-1)
            self.clear()
            self.carries = False

    def freeze(self, codes: Shaped[Tensor, "..."] | None = None) -> None:
        super().freeze(codes)
        if codes is None:
            self.weight.requires_grad_(False)
        else:
            self.kept = self.codes().detach().clone()

    def unfreeze(self) -> None:
        with torch.no_grad():
            self.weight.copy_(self.codes())
        super().unfreeze()
        self.kept = None
        self.weight.requires_grad_(True)

    def _save_to_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.kept is not None:
            with torch.no_grad():
                self.weight.copy_(self.codes())
        super()._save_to_state_dict(*args)

    def config(self) -> dict[str, Any]:
        # nothing is counted without revival
        return super().config() if self.counting else {}


def revive_in(optimizer: Optimizer, module: nn.Module) -> RemovableHandle:
    """Revives the dead codes of gradient codebooks right after each step of their optimizer.

    And sets to zero what the optimizer keeps of these codes (momentum, squared gradients), which
    would otherwise push them on as it pushed the dead ones. Needed under FSDP2, where a code that
    is moved within a forward is lost.

    Args:
        optimizer: It holds the codebooks' parameters.
        module: The quantizer, or a model around it.

    Returns:
        A handle whose `remove()` ends this.

    Raises:
        ValueError: If no codebook in `module` revives codes by gradient, or the optimizer lacks
            the parameter of one that does.

    Examples:
        >>> vq = VQ(8, 512, codebook=partial(GradientCodebook, revive=0.02))
        >>> handle = revive_in(torch.optim.AdamW(vq.parameters()), vq)
        >>> handle.remove()
    """
    books = [m for m in module.modules() if isinstance(m, GradientCodebook) and m.revives]
    if not books:
        raise ValueError(
            f"revive_in found no GradientCodebook with revive above 0 in {type(module).__name__}: "
            "build it with partial(GradientCodebook, revive=0.02)"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(book.weight) not in known for book in books):
        raise ValueError(
            f"the {type(optimizer).__name__} lacks the codes of a codebook in "
            f"{type(module).__name__}: make it after the model is wrapped, from all its parameters"
        )

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for book in books:
            _forget(optimizer, book.weight, book._revive())

    return optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def _forget(optimizer: Optimizer, weight: Tensor, revived: Bool[Tensor, " n"]) -> None:
    keep = sharded_like((~revived)[:, None].to(weight.dtype), weight)
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.mul_(keep)
