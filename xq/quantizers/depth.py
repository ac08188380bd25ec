"""Quantizer dropout: how many steps of a residual each sample keeps."""

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn


class DepthDropout(nn.Module):
    """Draws a depth for each sample, in training mode (Li et al. 2024, ImageFolder, section 3.4).

    A share `p` of the samples, picked at random, keeps a number of steps drawn evenly from
    `minimum` to `depth`; the others keep all. `batch * p` is rounded at random, so that its mean is
    right for small batches too. Drawn once, at the top: all branches of a product see the same.

    Args:
        depth: Steps of the residual.
        p: Share of samples that are drawn, in [0, 1].
        minimum: Fewest steps kept, 1 to `depth`.

    Raises:
        ValueError: If an argument lies outside its range.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 64), depth=10)
        >>> drop, x = DepthDropout(10, p=0.1, minimum=3), torch.randn(32, 16, 8)
        >>> depth = drop(len(x), x.device)
        >>> z, indices, losses = quantizer(x, depth)
        >>> drop.is_full(depth).shape
        torch.Size([32])
    """

    def __init__(self, depth: int, p: float = 0.1, minimum: int = 3) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"DepthDropout needs p in [0, 1], got {p}")
        if not 1 <= minimum <= depth:
            raise ValueError(f"DepthDropout needs 1 <= minimum <= depth, got {minimum} and {depth}")
        self.depth, self.p, self.minimum = depth, p, minimum

    def forward(
        self,
        batch: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, " {batch}"] | None:
        """Depths of a batch, or None where nothing is dropped: in eval mode, or with p = 0.

        Args:
            batch: Number of samples.
            device: Where they are drawn.
            generator: Source of randomness, on that device.
        """
        if not self.training or self.p == 0:
            return None
        options: dict[str, Any] = {"device": device, "generator": generator}
        drawn = torch.randint(self.minimum, self.depth + 1, (batch,), **options)
        count = torch.floor(batch * self.p + torch.rand(1, **options))
        chosen = torch.randperm(batch, **options) < count
        return drawn.where(chosen, self.depth)

    def is_full(self, depth: Int[Tensor, " b"] | None) -> Bool[Tensor, " b"] | None:
        """Which samples keep all steps; None (all of them) for None."""
        return None if depth is None else depth >= self.depth

    def extra_repr(self) -> str:
        return f"{self.depth}, p={self.p}, minimum={self.minimum}"


def keep_mask(
    depth: int | Shaped[Tensor, " b"] | None, steps: int, like: Tensor
) -> Bool[Tensor, "{steps} b"] | None:
    """Which steps each sample keeps; None where all do."""
    if depth is None:
        return None
    if isinstance(depth, int):
        depth = torch.full(like.shape[:1], depth, device=like.device)
    return torch.arange(steps, device=like.device)[:, None] < depth.to(like.device)
