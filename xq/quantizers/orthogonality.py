"""How far codes are from being orthogonal to one another."""

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def orthogonality(codes: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean squared cosine between two codes, for a loss (Shin et al. 2021, section 3.2).

    A mean over all pairs, in which the cosine of a code with itself counts as zero. More codes than
    channels cannot all be orthogonal: then its least is about `1 / dim - 1 / codebook_size`. Exact
    over all codes however many: it takes `dim**2` numbers where these are fewer than the pairs.

    Args:
        codes: `(codebook_size, dim)`, such as `vq.codebook.codes()` or some of its rows.

    Raises:
        ValueError: If `codes` is no such matrix.

    Examples:
        >>> vq = VQ(8, 64)
        >>> loss = 10.0 * orthogonality(vq.codebook.codes())
    """
    if codes.ndim != 2 or len(codes) == 0 or not codes.is_floating_point():
        raise ValueError(
            "orthogonality takes codes (codebook_size, dim), one or more, got "
            f"{codes.dtype} of shape {tuple(codes.shape)}; of several codebooks take the mean"
        )
    size, dim = codes.shape
    unit = F.normalize(codes, dim=-1)
    # unit @ unit.T and unit.T @ unit have the same sum of squares
    products = unit.t() @ unit if dim < size else unit @ unit.t()
    return products.square().sum() / size**2 - 1 / size
