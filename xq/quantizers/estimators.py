"""How gradients cross a quantizer: the value of the code, the gradient of something smooth.

An estimator is a function `(u, z) -> z` of the (bounded) input and its code, and is applied once,
at the root of a tree. Each returns `z` bit for bit.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TINY = 1e-6
# below this length of u/|u| + z/|z| the two point (almost) in opposite directions
_OPPOSITE = 1e-3


def straight_through(
    u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """Copies the gradient of `z` to `u` (Bengio et al. 2013).

    Args:
        u: What was quantized, after `bound`.
        z: Its codes.
    """
    return _with_gradient_of(u, z)


def rotation_trick(
    u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """Turns and scales the gradient as `u` must be turned and scaled to reach `z`.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", section 4.
    Straight through where no rotation is defined: zero, tiny and opposite vectors.

    Args:
        u: What was quantized, after `bound`.
        z: Its codes.

    Examples:
        >>> vq = VQ(8, 64, estimator=rotation_trick)
    """
    fixed_u, fixed_z = u.detach(), z.detach()
    length_u, length_z = (v.norm(dim=-1, keepdim=True) for v in (fixed_u, fixed_z))
    unit_u, unit_z = F.normalize(fixed_u, dim=-1), F.normalize(fixed_z, dim=-1)
    between = unit_u + unit_z
    apart = between.norm(dim=-1, keepdim=True)
    safe = (length_u > _TINY) & (length_z > _TINY) & (apart > _OPPOSITE)
    mirror = between / apart.clamp(min=_OPPOSITE)

    # a Householder pair: reflects on the vector in between, then puts u's own part along z
    along_mirror = (u * mirror).sum(-1, keepdim=True)
    along_u = (u * unit_u).sum(-1, keepdim=True)
    turned = u - 2 * along_mirror * mirror + 2 * along_u * unit_z
    scaled = turned * (length_z / length_u.clamp(min=_TINY))
    return _with_gradient_of(scaled.where(safe, u), z)


def passthrough(
    u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """Leaves `z` as it is: for leaves whose `z` has a gradient to the input already (IBQ, Gumbel).

    Such a leaf says so with this function as its `estimators`. It is no step of a residual, whose
    input would receive that gradient once a step.

    Args:
        u: What was quantized, after `bound`.
        z: Its codes, with a gradient of their own.
    """
    return z


def passes_through(estimators: Any) -> bool:
    """Whether `passthrough` is among the estimators of a tree."""
    if isinstance(estimators, list):
        return any(map(passes_through, estimators))
    return estimators is passthrough


def _with_gradient_of(smooth: Tensor, z: Tensor) -> Tensor:
    # the difference is exactly zero, so the value stays that of z, bit for bit
    return z.detach() + (smooth - smooth.detach())
