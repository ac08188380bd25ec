"""beam_encode: better codes of a residual by a search over several paths."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.precision import float32_island, widen
from xq.quantizers.base import Quantizer
from xq.quantizers.checks import check_finite, check_input
from xq.quantizers.lookup.pairs import PairSearch, smallest
from xq.quantizers.memo import once, one_call
from xq.quantizers.product import ProductQuantizer
from xq.quantizers.residual import ResidualQuantizer
from xq.quantizers.shrink import Shrink, divided, multiplied, power
from xq.quantizers.vq import VQ
from xq.quantizers.wrapper import Wrapper

# steps one after the other, each with the scale of what it sees
_Chain = Sequence[tuple[Quantizer, Shrink]]
# numbers in flight: 4 MiB of float32, between what caches hold and what threads take for short; a
# GPU has more to fill
_NUMBERS, _NUMBERS_GPU = 1 << 20, 1 << 24


@torch.no_grad()
def beam_encode(
    quantizer: Quantizer | Wrapper,
    x: Shaped[Tensor, "..."],
    width: int,
    *,
    depth: int | None = None,
    **context: Any,
) -> Int[Tensor, "..."]:
    """Indices that follow the best `width` paths through the steps of a flat residual.

    A greedy `encode` takes the best code of each step. The search keeps the best few sums of codes
    so far, by their distance to the input, extends each by its best codes, and ends with the
    smallest final error (as the encoding of Babenko and Lempitsky 2014, additive quantization). No
    sample is worse off than with `encode`, to which `width=1` is equal; 8 brings most of the gain.
    As `encode`, it changes no state and has no gradient; the indices are `decode`d as any others.

    Branches of a product are searched one by one, which is exact, since they share no channels; so
    are those of a residual of products that split channels alike. What a leaf offers besides its
    greedy code is up to its `candidates`.

    Args:
        quantizer: A tree without scales, or a wrapper around one.
        x: What `encode` takes.
        width: How many paths are kept. Time grows with its square at most, memory is bounded.
        depth: Steps of the outermost residual to search; fewer make shorter indices, which `decode`
            takes. All by default.
        **context: As for `encode`, such as the `mask` of `Masked`.

    Raises:
        ValueError: If an argument does not fit, or the quantizer has scales.

    Examples:
        >>> rq, x = ResidualQuantizer(VQ(8, 64), depth=4).eval(), torch.randn(100, 8)
        >>> found = beam_encode(rq, x, width=8)
        >>> error = (rq.decode(found) - x).square().sum()
        >>> bool(error <= (rq(x).z - x).square().sum())
        True
    """
    if not hasattr(width, "__index__") or width < 1:
        raise ValueError(f"beam_encode needs a width of 1 path or more, got width={width!r}")
    if isinstance(quantizer, Wrapper):
        search = partial(beam_encode, quantizer.quantizer, width=width, depth=depth)
        with float32_island(x.device.type):
            return quantizer._encoded(search, quantizer._entered(x), **context)
    if context:
        raise ValueError(f"beam_encode got {sorted(context)}, which no wrapper here asks for")
    _check_tree(quantizer, depth)
    check_input(quantizer, x)
    check_finite(quantizer, x)
    with float32_island(x.device.type), one_call():
        u = quantizer.bound(widen(x)).reshape(-1, quantizer.dim)
        greedy = quantizer.choose(u).indices
        if depth is not None and quantizer.step_axis is not None:
            greedy = greedy.narrow(1 + quantizer.step_axis, 0, depth)
        if width > 1 and len(u):
            found = _in_tree([(quantizer, 1.0)], u, greedy[:, None], int(width), depth)[:, 0]
        else:
            found = greedy
    return found.reshape(*x.shape[:-1], *found.shape[1:])


def _check_tree(quantizer: Quantizer, depth: Any) -> None:
    name = type(quantizer).__name__
    if quantizer.scales:
        raise ValueError(
            f"beam_encode searches the steps of a flat residual, got {name} with scales "
            f"{quantizer.scales}, where each code of a step moves many tokens; use encode"
        )
    is_number = hasattr(depth, "__index__") and not isinstance(depth, Tensor)
    if depth is not None and not (is_number and 1 <= int(depth) <= quantizer.depth):
        raise ValueError(f"beam_encode: {name} has depths 1 to {quantizer.depth}, got {depth!r}")


def _in_tree(
    steps: _Chain,
    u: Float[Tensor, "n dim"],
    greedy: Int[Tensor, "n steps ..."],
    width: int,
    depth: int | None = None,
) -> Int[Tensor, "n steps ..."]:
    """Resolves composites into chains of steps, and searches these."""
    quantizers = [step for step, _ in steps]
    residuals = [q for q in quantizers if isinstance(q, ResidualQuantizer)]
    products = [q for q in quantizers if isinstance(q, ProductQuantizer)]
    if len(residuals) == len(steps):
        inner = [
            (step._step(k), _times(scale, power(step.step_shrink, k)))
            for step, (_, scale) in zip(residuals, steps, strict=True)
            for k in range(depth or step.depth)
        ]
        sizes = greedy.shape[1:3]
        return _in_tree(inner, u, greedy.flatten(1, 2), width).unflatten(1, sizes)
    if len(products) == len(steps) and all(q.dims == products[0].dims for q in products):
        parts = zip(products[0].split(u), greedy.unbind(2), strict=True)
        found = []
        for p, (part, path) in enumerate(parts):
            branch = [
                (product._all_branches()[p], _of_branch(scale, product.dims, p))
                for product, (_, scale) in zip(products, steps, strict=True)
            ]
            found.append(_in_tree(branch, part, path, width, depth))
        return torch.stack(found, dim=2)
    return _in_blocks(steps, u, greedy, width)


def _times(a: Shrink, b: Shrink) -> Shrink:
    """The product, channel by channel."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(p * q for p, q in zip(a, b, strict=True))
    if isinstance(a, tuple):
        return tuple(p * b for p in a)  # pyright: ignore[reportOperatorIssue]
    return tuple(a * q for q in b) if isinstance(b, tuple) else a * b


def _of_branch(scale: Shrink, dims: list[int], p: int) -> Shrink:
    start = sum(dims[:p])
    return scale[start : start + dims[p]] if isinstance(scale, tuple) else scale


def _in_blocks(
    steps: _Chain, u: Float[Tensor, "n dim"], greedy: Int[Tensor, "n steps ..."], width: int
) -> Int[Tensor, "n steps ..."]:
    chain = [_Step(step, scale, u.dtype) for step, scale in steps]
    most = max(step.numbers(width) for step in chain)
    block = max((_NUMBERS if u.device.type == "cpu" else _NUMBERS_GPU) // most, 1)
    parts = zip(u.split(block), greedy.split(block), strict=True)
    return torch.cat([_search(chain, part, path, width) for part, path in parts])


def _search(
    chain: "list[_Step]",
    u: Float[Tensor, "n dim"],
    greedy: Int[Tensor, "n steps ..."],
    width: int,
) -> Int[Tensor, "n steps ..."]:
    rest = u[:, None]
    paths: list[Tensor] = []
    for k, step in enumerate(chain):
        # of the last step's only the best one is wanted
        parents, indices = step.extend(rest, 1 if k + 1 == len(chain) else width)
        rest = _pick(rest, parents) - step.codes(indices)
        paths = [_pick(path, parents) for path in paths] + [indices]
    for step, indices in zip(chain, greedy.unbind(1), strict=True):
        u = u - step.codes(indices)
    better = rest[:, 0].square().sum(-1) < u.square().sum(-1)
    found = torch.stack([path[:, 0] for path in paths], dim=1)
    return found.where(better.view(-1, *[1] * (found.ndim - 1)), greedy)


def _pick(paths: Shaped[Tensor, "n from ..."], places: Int[Tensor, "n to"]) -> Tensor:
    """Of each row the entries at `places`."""
    if paths.shape[1] == 1:
        return paths.expand(-1, places.shape[1], *paths.shape[2:])
    rows = torch.arange(len(paths), device=paths.device)[:, None]
    return paths[rows, places]


class _Step:
    """One step of a chain, which sees its input in the scale of its codes."""

    def __init__(self, quantizer: Quantizer, scale: Shrink, dtype: torch.dtype) -> None:
        self.quantizer, self.scale = quantizer, scale
        self.table: PairSearch | None = None
        # a table tells all distances at once, if these are what both the step and the search go by
        if (
            isinstance(quantizer, VQ)
            and type(quantizer).candidates is VQ.candidates
            and (quantizer.normalize or quantizer.metric == "euclidean")
            and not isinstance(scale, tuple)
        ):
            self.table = PairSearch(once(quantizer._searchable, dtype)[1])

    def numbers(self, width: int) -> int:
        """How many numbers an extension holds for each vector."""
        if self.table is not None:
            return width * self.table.codes
        return width * width * self.quantizer.dim

    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """What `indices` add to the sum."""
        return multiplied(self.quantizer.dequantize(indices), self.scale)

    def extend(
        self, rest: Float[Tensor, "n paths dim"], k: int
    ) -> tuple[Int[Tensor, "n found"], Int[Tensor, "n found ..."]]:
        """The `k` best of all paths longer by one code: which path each extends, and the code."""
        if self.table is not None:
            parents, indices = self.table(divided(rest, self.scale), k)
            # only where codes are not finite is padding found
            return parents, indices.clamp_(max=self.quantizer.codebook_size - 1)
        indices = self.quantizer.candidates(divided(rest, self.scale), k)
        errors = (rest[:, :, None] - self.codes(indices)).square().sum(-1)
        each = errors.shape[2]
        best = smallest(errors.flatten(1), min(k, errors[0].numel()))
        return best // each, _pick(indices.flatten(1, 2), best)
