"""Which token grid each step of a residual sees: the input's own, or a pyramid."""

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.config import describe
from xq.quantizers.base import Scales, ScalesLike, as_grids
from xq.quantizers.constants import constant
from xq.quantizers.memo import once
from xq.quantizers.resample import area, bicubic
from xq.quantizers.sharing import sharing

# VAR's ten scales for 256 x 256 images at stride 16 (Tian et al. 2024, section 4)
_PUBLISHED = {10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
_LAST = 16


class Refine(nn.Conv2d):
    """Mends what upsampling blurs: `(1 - ratio) * h + ratio * conv(h)` (VAR, appendix).

    Args:
        dim: Channels.
        ratio: Share of the 3 x 3 convolution, in (0, 1].

    Raises:
        ValueError: If `ratio` lies outside (0, 1].
    """

    def __init__(self, dim: int, ratio: float = 0.5) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"Refine needs a ratio in (0, 1], got {ratio}; leave it out for 0")
        super().__init__(dim, dim, 3, padding=1)
        self.dim, self.ratio = dim, ratio

    def forward(self, input: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        return F.conv2d(input, *once(self._mixed), padding=1)

    def _mixed(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that does all of it."""
        bias: Any = self.bias
        identity = constant(_identity, self.dim, like=self.weight)
        return torch.lerp(identity, self.weight, self.ratio), self.ratio * bias

    def config(self) -> dict[str, Any]:
        return {"dim": self.dim, "ratio": self.ratio}


def _identity(dim: int, **options: Any) -> Float[Tensor, "{dim} {dim} 3 3"]:
    """The kernel that changes nothing."""
    return F.pad(torch.eye(dim, **options)[:, :, None, None], (1, 1, 1, 1))


class Flat(nn.Module):
    """Every step sees the input's own grid; indices gain an axis of steps."""

    scales: Scales = ()

    def down(self, x: Tensor, k: int) -> Tensor:
        return x

    def up(self, z: Tensor, k: int) -> Tensor:
        return z

    def join(self, indices: list[Tensor], code_ndim: int) -> Tensor:
        """One tensor of the steps' indices: the new axis stands before the child's own."""
        return torch.stack(indices, dim=indices[0].ndim - code_ndim)

    def split(self, indices: Tensor, code_ndim: int) -> Sequence[Tensor]:
        """The indices of each step there is."""
        return indices.unbind(indices.ndim - 1 - code_ndim)


class Pyramid(nn.Module):
    """Step k sees the grid of scale k; indices are one axis of tokens, coarse to fine.

    Down by area, up by bicubic interpolation and a shared refinement, as in VAR (Tian et al. 2024,
    algorithms 1 and 2). The last scale is the grid of the input.

    Args:
        scales: Sides or `(h, w)` pairs, coarse to fine; none larger than the last.
        refine: Convolutions after upsampling, which scales share as in VAR. More than scales are
            kept, and some idle: XQ-GAN's single-scale files hold such.

    Raises:
        ValueError: If scales are missing, not positive or larger than the last.

    Examples:
        >>> scales = Pyramid((1, 2, (3, 4)), refine=[Refine(8)])
        >>> quantizer = ResidualQuantizer(VQ(8, 64), multiscale=scales)
        >>> quantizer.grids
        ((1, 1), (2, 2), (3, 4))
        >>> quantizer(torch.randn(2, 3, 4, 8)).indices.shape
        torch.Size([2, 17])
    """

    def __init__(self, scales: ScalesLike, refine: Sequence[Refine] = ()) -> None:
        super().__init__()
        self.scales = _checked(scales)
        self.sizes = as_grids(self.scales)
        self.refine = nn.ModuleList(refine)

    def down(self, x: Float[Tensor, "b H W dim"], k: int) -> Float[Tensor, "b h w dim"]:
        """`x` at scale k, by area."""
        return area(x, self.sizes[k])

    def up(self, z: Float[Tensor, "b h w dim"], k: int) -> Float[Tensor, "b H W dim"]:
        """`z` of scale k at the last scale, refined."""
        z = bicubic(z, self.sizes[-1])
        if not self.refine:
            return z
        refine = self.refine[shared_refinement(k, len(self.scales), len(self.refine))]
        # a view: convolutions take maps whose channels lie side by side as they are
        return refine(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def join(self, indices: list[Tensor], code_ndim: int) -> Int[Tensor, "b t *code"]:
        """All scales' tokens on one axis, row by row."""
        return torch.cat([i.flatten(1, 2) for i in indices], dim=1)

    def split(self, indices: Int[Tensor, "b t *code"], code_ndim: int) -> Iterator[Tensor]:
        """The token grid of each scale there is."""
        start = 0
        for h, w in self.sizes:
            if start < indices.shape[1]:
                yield indices[:, start : start + h * w].unflatten(1, (h, w))
            start += h * w

    def with_scales(self, scales: ScalesLike) -> "Pyramid":
        """The same refinements at other scales; with few scales some refinements may be idle."""
        new = sharing(self)
        new.scales = _checked(scales)
        new.sizes = as_grids(new.scales)
        return new

    def config(self) -> dict[str, Any]:
        return describe({"scales": self.scales, "refine": list(self.refine)})

    def extra_repr(self) -> str:
        return f"scales={self.scales}"


def published_scales(depth: int) -> Scales:
    """VAR's schedule for 10 steps, otherwise a geometric one from 1 to 16."""
    if depth in _PUBLISHED:
        return _PUBLISHED[depth]
    return tuple(round(_LAST ** (k / (depth - 1))) if depth > 1 else _LAST for k in range(depth))


def shared_refinement(k: int, scales: int, refinements: int) -> int:
    """Which refinement scale k uses: the nearest of evenly spread ticks, the first on ties.

    Tick positions as in VAR, which treats 4 convolutions apart. Its 10 scales meet two exact ties
    there, so the formula is evaluated in doubles in the very order of `numpy.linspace`, on which
    every released checkpoint depends: 0, 0, 1, 1, 1, 2, 2, 3, 3, 3.
    """
    edge = 1 / 3 / refinements if refinements == 4 else 1 / 2 / refinements
    first, last = edge, 1 - edge
    step = (last - first) / (refinements - 1) if refinements > 1 else 0.0
    ticks = [i * step + first for i in range(refinements)]
    if refinements > 1:
        ticks[-1] = last
    position = k / (scales - 1) if scales > 1 else 0.0
    distances = [abs(tick - position) for tick in ticks]
    return distances.index(min(distances))


def _checked(scales: Any) -> Scales:
    try:
        scales = tuple(_scale(s) for s in scales)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Pyramid takes scales as sides or (h, w) pairs, such as (1, 2, (3, 4)), got {scales!r}"
        ) from error
    sizes = as_grids(scales)
    if not sizes or min(min(s) for s in sizes) < 1:
        raise ValueError(f"Pyramid needs one or more positive scales, got {scales}")
    if any(h > sizes[-1][0] or w > sizes[-1][1] for h, w in sizes):
        raise ValueError(
            f"Pyramid scales go coarse to fine, none larger than the last, got {scales}"
        )
    return scales


def _scale(scale: Any) -> int | tuple[int, int]:
    if hasattr(scale, "__index__"):
        return int(scale)
    h, w = scale
    return index(h), index(w)
