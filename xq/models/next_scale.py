"""What a next-scale generator (VAR) reads: the sum of scales so far, at the size of the next."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.precision import float32_island
from xq.quantizers import Quantizer, Wrapper
from xq.quantizers.checks import checked_indices
from xq.quantizers.memo import one_call
from xq.quantizers.resample import area


class NextScale(NamedTuple):
    """What follows some leading scales.

    Attributes:
        input: One vector for each token of the next scale, row by row; without tokens after the
            last scale.
        z: The sum of all scales so far; after the last one what `decode` gives.
    """

    input: Float[Tensor, "b tokens dim"]
    z: Float[Tensor, "b h w dim"]


@torch.no_grad()
def teacher_forcing(
    quantizer: Quantizer | Wrapper, indices: Shaped[Tensor, "..."]
) -> Float[Tensor, "b tokens dim"]:
    """The inputs from which a generator learns to predict `indices` (Tian et al. 2024, VAR).

    The tokens of each scale but the first, for which a generator has an input of its own, are
    predicted from the sum of the scales before, reduced by area to their grid. Has no gradient: the
    tokenizer of a generator is fixed.

    Args:
        quantizer: A pyramid or a product of pyramids. Of a wrapper the tree within counts: inputs
            are channel-last and in the space of its codes.
        indices: Tokens `(b, t, *code)` of all scales or some leading ones.

    Returns:
        `(b, t - first, dim)`, where `first` is the number of tokens of the first scale.

    Raises:
        ValueError: If the quantizer's steps are no scales, or `indices` do not fit it.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 64), multiscale=(1, 2, 4))
        >>> tokens = quantizer.encode(torch.randn(2, 4, 4, 8))
        >>> teacher_forcing(quantizer, tokens).shape  # for all but the first of 21 tokens
        torch.Size([2, 20, 8])
    """
    tree, indices, count = _checked("teacher_forcing", quantizer, indices)
    # of the last scale nothing is predicted
    before = indices[:, : _tokens(tree, count - 1)]
    inputs = [torch.zeros(len(indices), 0, tree.dim, device=indices.device)]
    with float32_island(indices.device.type), one_call():
        sums = tree.dequantize_steps(before) if count > 1 else ()
        for z, grid in zip(sums, tree.grids[1:count], strict=True):
            inputs.append(area(z, grid).flatten(1, 2))
    return torch.cat(inputs, dim=1)


@torch.no_grad()
def next_scale_input(
    quantizer: Quantizer | Wrapper,
    indices: Shaped[Tensor, "..."],
    z: Shaped[Tensor, "..."] | None = None,
) -> NextScale:
    """What a generator reads before the next scale, given all scales so far.

    The last part of `teacher_forcing`. In a loop over scales, which hands over the sum that the
    step before returned, each scale is decoded once.

    Args:
        quantizer: As for `teacher_forcing`.
        indices: Tokens `(b, t, *code)` of the leading scales so far.
        z: The sum of all these but the newest one, as the call before this returned it; computed
            anew by default.

    Raises:
        ValueError: If the quantizer's steps are no scales, or an argument does not fit it.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 64), multiscale=(1, 2, 4))
        >>> tokens, z = torch.randint(64, (2, 1)), None  # the first scale
        >>> while tokens.shape[1] < quantizer.num_tokens:
        ...     inputs, z = next_scale_input(quantizer, tokens, z)
        ...     scale = torch.randint(64, inputs.shape[:2])  # yours: a generator's choice
        ...     tokens = torch.cat([tokens, scale], dim=1)
        >>> tokens.shape
        torch.Size([2, 21])
    """
    tree, indices, count = _checked("next_scale_input", quantizer, indices)
    h, w = tree.grids[-1]
    want = (len(indices), h, w, tree.dim)
    if z is not None and (tuple(z.shape) != want or count == 1):
        raise ValueError(
            f"next_scale_input expects z as the sum of all scales before the newest, {want}, and "
            f"None for the first; got {tuple(z.shape)} with {count} scales"
        )
    if z is None and count > 1:
        with float32_island(indices.device.type), one_call():
            z = tree.dequantize(indices[:, : _tokens(tree, count - 1)])
    newest = indices[:, _tokens(tree, count - 1) :]
    return advance(tree, newest, count - 1, z)


@torch.no_grad()
def advance(tree: Any, newest: Tensor, k: int, z: Tensor | None) -> NextScale:
    """What follows scale k, of which `newest` are the tokens; nothing is checked.

    Args:
        tree: As `pyramid_within` gives it.
        newest: `(b, tokens, *code)`.
        k: Which scale they are.
        z: The sum of all scales before; None if there are none.
    """
    with float32_island(newest.device.type), one_call():
        step = tree.dequantize_step(newest.unflatten(1, tree.grids[k]), k)
        # from zero, as in `decode`, so that even the sign of zeros agrees
        total = (torch.zeros_like(step) if z is None else z) + step
        following = area(total, tree.grids[k + 1]) if k + 1 < tree.depth else total[:, :0]
        return NextScale(following.flatten(1, 2), total)


def pyramid_within(name: str, quantizer: Any) -> Any:
    """The tree within all wrappers, whose steps are scales.

    Raises:
        ValueError: If they are not, or it is no quantizer.
    """
    if not isinstance(quantizer, Quantizer | Wrapper):
        raise ValueError(
            f"{name} needs a quantizer, got {type(quantizer).__name__}; of a tokenizer, pass its "
            ".quantizer"
        )
    tree = quantizer
    while isinstance(tree, Wrapper):
        tree = tree.quantizer
    if tree.step_axis != -1:
        raise ValueError(
            f"{name} needs a quantizer whose steps are scales, a ResidualQuantizer with multiscale "
            f"or a product of such; got {type(tree).__name__} with scales {tree.scales} and "
            f"code_shape {tree.code_shape}; an AR takes the tokens of any quantizer as they are"
        )
    return tree


def _checked(name: str, quantizer: Quantizer | Wrapper, indices: Tensor) -> tuple[Any, Tensor, int]:
    """The tree within all wrappers, int64 indices, and of how many scales they are."""
    tree = pyramid_within(name, quantizer)
    indices = checked_indices(tree, indices)
    count = next(k for k in range(1, tree.depth + 1) if _tokens(tree, k) == indices.shape[1])
    return tree, indices, count


def _tokens(tree: Any, count: int) -> int:
    """How many tokens the first `count` scales have."""
    return sum(h * w for h, w in tree.grids[:count])
