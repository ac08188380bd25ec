"""ResidualQuantizer: each step quantizes what the steps before it left."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.config import describe
from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, ScalesLike, expand
from xq.quantizers.children import check_alike, listed
from xq.quantizers.codebook import has_parameters
from xq.quantizers.depth import keep_mask
from xq.quantizers.estimators import passes_through
from xq.quantizers.grids import Flat, Pyramid, Refine, published_scales
from xq.quantizers.replicate import replicate
from xq.quantizers.running_fit import NoFit, RunningFit
from xq.quantizers.sharing import sharing
from xq.quantizers.shrink import Shrink, divided, multiplied, power

# as many refinements as VAR and XQ-GAN share among their scales
_REFINEMENTS = 4


class ResidualQuantizer(Quantizer):
    """A sum of codes, coarse to fine: RQ (Lee et al. 2022, section 3.1), or multi-scale (VAR).

    The fit compares the input with the running sum after each step. Losses are means over steps.

    Args:
        quantizer: One quantizer, or a list with one a step, which is taken as it is.
        depth: Number of steps; may be left out where a list or scales tell it.
        multiscale: False: each step sees the input's own grid, and `indices` gains an axis of
            steps. Scales such as `(1, 2, 4)`, or True for the published ones of this depth
            (10 steps: VAR's, up to 16): step k sees scale k, `indices` is one axis of tokens, and
            up to four convolutions refine what was upsampled. A `Pyramid`: the same with
            refinements of one's own, or none.
        shared: Whether all steps use the one quantizer, or fresh copies of it. By default exactly
            when multi-scale, as in VAR and XQ-GAN.
        shrink: Step k quantizes `rest / shrink**k`. By default 1 with scales, otherwise the
            quantizer's own: 1 for learned codes, less for codes of a fixed size.

    Raises:
        ValueError: If the arguments contradict each other or the steps differ.
        TypeError: If something else than quantizers is given.

    Examples:
        >>> rq = ResidualQuantizer(VQ(8, 256), depth=4)
        >>> indices = rq(torch.randn(2, 16, 16, 8)).indices
        >>> indices.shape
        torch.Size([2, 16, 16, 4])
        >>> rq.decode(indices[..., :2]).shape  # fewer steps decode too
        torch.Size([2, 16, 16, 8])
        >>> pyramid = ResidualQuantizer(VQ(8, 256), multiscale=(1, 2, 4))
        >>> pyramid(torch.randn(2, 4, 4, 8)).indices.shape  # 1 + 4 + 16 tokens
        torch.Size([2, 21])
    """

    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        depth: int | None = None,
        *,
        multiscale: bool | ScalesLike | Pyramid = False,
        shared: bool | None = None,
        shrink: float | None = None,
    ) -> None:
        super().__init__()
        given = listed("ResidualQuantizer", quantizer)
        self._from_list = isinstance(quantizer, Sequence)
        known = {
            "depth": depth,
            "the list of quantizers": len(given) if self._from_list else None,
            "multiscale": _count(multiscale),
        }
        self.depth = _agreed_depth(known)
        self.grid = _grid(multiscale, self.depth, given[0].dim)
        if self._from_list and shared:
            raise ValueError(
                "ResidualQuantizer takes a list as it is; with shared=True pass one quantizer"
            )
        by_default = isinstance(self.grid, Pyramid) and not self._from_list
        self.shared = by_default if shared is None else shared
        as_given = self._from_list or self.shared
        steps = given if as_given else replicate(given[0], self.depth)
        self.steps = nn.ModuleList(steps)
        self._adopt(steps, shrink)

    def _adopt(self, steps: list[Quantizer], shrink: float | None) -> None:
        """Takes over what the steps have in common."""
        pyramid = isinstance(self.grid, Pyramid)
        alike = ["dim", "codebook_size", "code_shape", "grids", "domain", "estimators"]
        if shrink is None and not pyramid:
            alike.append("shrink")
        check_alike("ResidualQuantizer", steps, alike)
        child = steps[0]
        if passes_through(child.estimators):
            raise ValueError(
                f"ResidualQuantizer cannot have {type(child).__name__} as a step: its z brings its "
                "own gradient, which the input would receive once a step; at the root or in a "
                "ProductQuantizer it works"
            )
        if pyramid and child.scales:
            raise ValueError(
                f"ResidualQuantizer got multiscale={self.grid.scales} around a quantizer with "
                f"scales {child.scales}; a pyramid cannot hold another"
            )
        if shrink is not None and not 0 < shrink <= 1:
            raise ValueError(f"ResidualQuantizer needs shrink in (0, 1], got {shrink}")
        self._given_shrink = shrink
        self.dim, self.codebook_size = child.dim, child.codebook_size
        self.code_shape = child.code_shape if pyramid else (self.depth, *child.code_shape)
        self.scales = self.grid.scales or child.scales
        self.step_axis = -1 if pyramid else 0
        default: Shrink = 1.0 if pyramid else child.shrink
        self.step_shrink = default if shrink is None else shrink
        # an outer residual finds what all steps leave, or in a pyramid what the last one does
        self.shrink = child.shrink if pyramid else power(self.step_shrink, self.depth)

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        keep = keep_mask(depth, self.depth, u)
        is_read = self.commits or has_parameters(self)
        return self._walk(u, keep, RunningFit(u, keep) if is_read else NoFit(u))

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        return self._walk(u, None, NoFit(u))

    def _walk(self, u: Tensor, keep: Tensor | None, running: RunningFit | NoFit) -> Quantized:
        # codes never get a gradient to `u`; a regularizer does, by way of what is left
        rest = u if self.regularizes else u.detach()
        total = torch.zeros_like(u)
        indices, regularizers = [], []
        for k in range(self.depth):
            scale = power(self.step_shrink, k)
            q = self._step(k).choose(divided(self.grid.down(rest, k), scale))
            update = self.grid.up(multiplied(q.z, scale), k)
            # the residual ignores `keep`: after a dropped step no later one is kept
            rest = rest - update.detach()
            total = total + (update if keep is None else update * expand(keep[k], update))
            running.add(total)
            indices.append(q.indices)
            regularizers.append(q.losses.regularizer)
        commitment, codebook = running.terms()
        if not self.commits:
            commitment = torch.zeros_like(commitment)
        if not has_parameters(self):
            codebook = torch.zeros_like(codebook)
        losses = Losses(commitment, codebook, torch.stack(regularizers).mean())
        return Quantized(total, self.grid.join(indices, len(self._step(0).code_shape)), losses)

    def dequantize(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        *_, z = self.dequantize_steps(indices)
        return z

    def dequantize_steps(
        self, indices: Int[Tensor, "..."]
    ) -> Iterator[Float[Tensor, "*batch dim"]]:
        total: Tensor | None = None
        for k, step in enumerate(self.grid.split(indices, len(self._step(0).code_shape))):
            update = self.dequantize_step(step, k)
            # from zero, as in `quantize`, so that even the sign of zeros agrees
            total = (torch.zeros_like(update) if total is None else total) + update
            yield total

    def dequantize_step(self, indices: Int[Tensor, "..."], k: int) -> Float[Tensor, "*batch dim"]:
        """What step k alone, with its own indices, adds to the sum."""
        z = self._step(k).dequantize(indices)
        return self.grid.up(multiplied(z, power(self.step_shrink, k)), k)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self._step(0).bound(x)

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        return self._step(0).estimate(u, z)

    @property
    def domain(self) -> str:
        return self._step(0).domain

    @property
    def estimators(self) -> Any:
        return self._step(0).estimators

    @property
    def regularizes(self) -> bool:
        return any(step.regularizes for step in self._all_steps())

    @property
    def commits(self) -> bool:
        return any(step.commits for step in self._all_steps())

    @property
    def noisy(self) -> bool:
        return any(step.noisy for step in self._all_steps())

    def with_scales(self, scales: ScalesLike) -> "ResidualQuantizer":
        """The same steps and refinements, shared, at another resolution.

        Args:
            scales: As many as before, unless all steps share one quantizer.

        Raises:
            ValueError: If there are no scales to change, or their number does not fit.
        """
        if not isinstance(self.grid, Pyramid):
            if not self.scales:
                super().with_scales(scales)
            steps = [step.with_scales(scales) for step in self._all_steps()]
            return self._rebuilt(self.grid, steps)
        if not self.shared and len(scales) != self.depth:
            raise ValueError(
                f"ResidualQuantizer has {self.depth} steps of their own, got {len(scales)} scales"
            )
        return self._rebuilt(self.grid.with_scales(scales), self._all_steps())

    def _rebuilt(self, grid: Flat | Pyramid, steps: list[Quantizer]) -> "ResidualQuantizer":
        new = sharing(self, grid=grid, steps=nn.ModuleList(steps))
        new.depth = len(grid.scales) or self.depth
        new._adopt(steps, self._given_shrink)
        return new

    def config(self) -> dict[str, Any]:
        steps = self._all_steps()
        return describe(
            {
                "quantizer": steps if self._from_list else steps[0],
                "depth": self.depth,
                "multiscale": self.grid if isinstance(self.grid, Pyramid) else False,
                "shared": self.shared,
                "shrink": self._given_shrink,
            }
        )

    def extra_repr(self) -> str:
        return f"depth={self.depth}, shared={self.shared}"

    def _step(self, k: int) -> Quantizer:
        return self.steps[0 if self.shared else k]  # pyright: ignore[reportReturnType]

    def _all_steps(self) -> list[Quantizer]:
        return list(self.steps)  # pyright: ignore[reportReturnType]


def _count(multiscale: Any) -> int | None:
    if isinstance(multiscale, bool):
        return None
    if not isinstance(multiscale, Pyramid | Sequence):
        raise ValueError(
            "ResidualQuantizer takes multiscale as True, False, scales such as (1, 2, 4) or a "
            f"Pyramid, got {multiscale!r}"
        )
    return len(multiscale.scales if isinstance(multiscale, Pyramid) else multiscale)


def _agreed_depth(known: dict[str, int | None]) -> int:
    told = {name: count for name, count in known.items() if count is not None}
    if not told:
        raise ValueError("ResidualQuantizer needs depth, a list of quantizers or scales")
    depth = next(iter(told.values()))
    if len(set(told.values())) > 1 or depth < 1:
        counts = ", ".join(f"{count} by {name}" for name, count in told.items())
        raise ValueError(f"ResidualQuantizer needs one number of steps, 1 or more, got {counts}")
    return depth


def _grid(multiscale: bool | ScalesLike | Pyramid, depth: int, dim: int) -> Flat | Pyramid:
    if isinstance(multiscale, Pyramid):
        for refine in multiscale.refine:
            if refine.dim != dim:
                raise ValueError(
                    f"ResidualQuantizer has {dim} channels, its Pyramid a Refine({refine.dim})"
                )
        return multiscale
    if multiscale is False:
        return Flat()
    scales = published_scales(depth) if multiscale is True else multiscale
    return Pyramid(scales, [Refine(dim) for _ in range(min(_REFINEMENTS, len(scales)))])
