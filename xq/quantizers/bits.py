"""Signs to integers and back; bit i is channel i, the lowest first."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# one sign fewer than int64 has value bits, so that 2**d itself is still an int64
MAX_BITS = 62


def signs_to_indices(signs: Bool[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
    """The integers whose bit i is `signs[..., i]`, in exact int64 arithmetic."""
    shifts = torch.arange(signs.shape[-1], device=signs.device)
    return (signs.long() << shifts).sum(-1)


def indices_to_signs(indices: Int[Tensor, "*batch"], dim: int) -> Bool[Tensor, "*batch {dim}"]:
    """The lowest `dim` bits of each integer."""
    shifts = torch.arange(dim, device=indices.device)
    return ((indices[..., None] >> shifts) & 1).bool()
