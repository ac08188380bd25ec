"""ProductQuantizer: each part of the channels has a quantizer of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.config import describe
from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, ScalesLike
from xq.quantizers.children import check_alike, listed
from xq.quantizers.replicate import replicate
from xq.quantizers.sharing import sharing
from xq.quantizers.shrink import joined


class ProductQuantizer(Quantizer):
    """Splits the channels over branches (Jegou et al. 2011; ImageFolder, XQ-GAN).

    `z` is the branches' side by side, `indices` gains an axis of branches, losses are means over
    branches.

    Args:
        quantizer: One quantizer, of which each branch gets a fresh copy, or a list with one a
            branch, which is taken as it is. Branches may differ in `dim`.
        P: Number of branches; may be left out for a list.
        shared: Whether all branches use the one quantizer.

    Raises:
        ValueError: If the arguments contradict each other or the branches differ.
        TypeError: If something else than quantizers is given.

    Examples:
        >>> pq = ProductQuantizer(VQ(4, 256), P=2)
        >>> z, indices, _ = pq(torch.randn(2, 16, 16, 8))
        >>> indices.shape, pq.bits
        (torch.Size([2, 16, 16, 2]), 16.0)
        >>> first, second = pq.split(z)
    """

    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        P: int | None = None,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__()
        given = listed("ProductQuantizer", quantizer)
        self._from_list = isinstance(quantizer, Sequence)
        if self._from_list:
            if shared or P not in (None, len(given)):
                raise ValueError(
                    f"ProductQuantizer takes a list of {len(given)} quantizers as it is, "
                    f"got P={P} and shared={shared}"
                )
            branches, count = given, len(given)
        else:
            if not isinstance(P, int) or P < 1:
                raise ValueError(f"ProductQuantizer needs P branches, 1 or more, got P={P}")
            branches, count = (given if shared else replicate(given[0], P)), P
        self.shared = shared
        self.P = count
        self.branches = nn.ModuleList(branches)
        self._adopt()

    def _adopt(self) -> None:
        """Takes over what the branches have in common."""
        branches = self._all_branches()
        alike = ("codebook_size", "code_shape", "grids", "depth", "step_axis")
        check_alike("ProductQuantizer", branches, alike)
        child = branches[0]
        self.dims = [branch.dim for branch in branches]
        self.dim, self.codebook_size = sum(self.dims), child.codebook_size
        self.code_shape, self.scales = (self.P, *child.code_shape), child.scales
        self.depth = child.depth
        inner = child.step_axis
        self.step_axis = inner + 1 if inner is not None and inner >= 0 else inner
        self.shrink = joined([branch.shrink for branch in branches], self.dims)

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        parts = zip(self._all_branches(), self.split(u), strict=True)
        return self._side_by_side([branch.quantize(part, depth) for branch, part in parts])

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        parts = zip(self._all_branches(), self.split(u), strict=True)
        return self._side_by_side([branch.choose(part) for branch, part in parts])

    def _side_by_side(self, results: list[Quantized]) -> Quantized:
        losses = Losses(
            *(torch.stack(terms).mean() for terms in zip(*(q.losses for q in results), strict=True))
        )
        indices = torch.stack([q.indices for q in results], dim=self._axis(results[0].indices, -1))
        return Quantized(torch.cat([q.z for q in results], dim=-1), indices, losses)

    def dequantize(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        parts = zip(self._all_branches(), self._unbind(indices), strict=True)
        return torch.cat([branch.dequantize(part) for branch, part in parts], dim=-1)

    def dequantize_steps(
        self, indices: Int[Tensor, "..."]
    ) -> Iterator[Float[Tensor, "*batch dim"]]:
        parts = zip(self._all_branches(), self._unbind(indices), strict=True)
        steps = [branch.dequantize_steps(part) for branch, part in parts]
        for z in zip(*steps, strict=True):
            yield torch.cat(z, dim=-1)

    def dequantize_step(self, indices: Int[Tensor, "..."], k: int) -> Float[Tensor, "*batch dim"]:
        """What step k of each branch, a residual, adds to the sum."""
        branches: list[Any] = self._all_branches()
        parts = zip(branches, self._unbind(indices), strict=True)
        return torch.cat([branch.dequantize_step(part, k) for branch, part in parts], dim=-1)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        parts = zip(self._all_branches(), self.split(x), strict=True)
        return torch.cat([branch.bound(part) for branch, part in parts], dim=-1)

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        parts = zip(self._all_branches(), self.split(u), self.split(z), strict=True)
        return torch.cat([branch.estimate(a, b) for branch, a, b in parts], dim=-1)

    def split(self, z: Float[Tensor, "*batch dim"]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The channels of each branch."""
        return z.split(self.dims, dim=-1)

    @property
    def domain(self) -> str:
        return " x ".join(branch.domain for branch in self._all_branches())

    @property
    def estimators(self) -> Any:
        return [branch.estimators for branch in self._all_branches()]

    @property
    def regularizes(self) -> bool:
        return any(branch.regularizes for branch in self._all_branches())

    @property
    def commits(self) -> bool:
        return any(branch.commits for branch in self._all_branches())

    @property
    def noisy(self) -> bool:
        return any(branch.noisy for branch in self._all_branches())

    def with_scales(self, scales: ScalesLike) -> "ProductQuantizer":
        """The same branches, shared, at another resolution.

        Raises:
            ValueError: If the branches have no scales, or their number does not fit.
        """
        own: list[Any] = list(self.branches)
        new = sharing(self, branches=nn.ModuleList([b.with_scales(scales) for b in own]))
        new._adopt()
        return new

    def config(self) -> dict[str, Any]:
        branches = list(self.branches)
        return describe(
            {
                "quantizer": branches if self._from_list else branches[0],
                "P": self.P,
                "shared": self.shared,
            }
        )

    def extra_repr(self) -> str:
        return f"P={self.P}" + (", shared=True" if self.shared else "")

    def _all_branches(self) -> list[Quantizer]:
        branches: list[Any] = list(self.branches)
        return branches * self.P if self.shared else branches

    def _axis(self, indices: Tensor, offset: int = 0) -> int:
        """Where the axis of branches stands, before the code of each."""
        return indices.ndim - len(self.code_shape) - offset

    def _unbind(self, indices: Int[Tensor, "..."]) -> tuple[Tensor, ...]:
        return indices.unbind(self._axis(indices))
