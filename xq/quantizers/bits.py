"""Signs to integers and back; bit i is channel i, the lowest first."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xq.quantizers.constants import constant

# one sign fewer than int64 has value bits, so that 2**d itself is still an int64
MAX_BITS = 62


def signs_to_indices(signs: Bool[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
    """The integers whose bit i is `signs[..., i]`, in exact int64 arithmetic.

    Args:
        signs: True for a positive channel; at most 62 channels.

    Examples:
        >>> signs_to_indices(torch.tensor([[False, True, True, False]]))
        tensor([6])
    """
    return (signs * _values(signs.shape[-1], signs)).sum(-1)


def indices_to_signs(indices: Int[Tensor, "*batch"], dim: int) -> Bool[Tensor, "*batch {dim}"]:
    """The lowest `dim` bits of each integer.

    Args:
        indices: Integers of any width.
        dim: How many bits, so how many channels.

    Examples:
        >>> indices_to_signs(torch.tensor([6]), 4)
        tensor([[False,  True,  True, False]])
    """
    return (indices[..., None] & _values(dim, indices)) != 0


def _values(dim: int, like: Tensor) -> Int[Tensor, " dim"]:
    return constant(_powers, dim, like=like, dtype=torch.int64)


def _powers(dim: int, **options: Any) -> Tensor:
    return torch.ones(dim, **options) << torch.arange(dim, **options)
