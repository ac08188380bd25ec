"""How far a reconstruction is from its image, element by element."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.precision import widen


def l1(image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean absolute difference over all elements, in float32 or wider.

    Args:
        image: Any shape.
        target: The same.

    Raises:
        ValueError: If the shapes differ, which would broadcast, or numbers are no floats.
    """
    return F.l1_loss(*_pair("l1", image, target))


def l2(image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean squared difference over all elements, in float32 or wider.

    Args:
        image: Any shape.
        target: The same.

    Raises:
        ValueError: If the shapes differ, which would broadcast, or numbers are no floats.
    """
    return F.mse_loss(*_pair("l2", image, target))


class L1(nn.Module):
    """`l1` as a module."""

    def forward(
        self, image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        return l1(image, target)


class L2(nn.Module):
    """`l2` as a module."""

    def forward(
        self, image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        return l2(image, target)


def _pair(name: str, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape:
        raise ValueError(
            f"{name} compares tensors of one shape, got {tuple(image.shape)} and a target of "
            f"{tuple(target.shape)}"
        )
    if not (image.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            f"{name} expects floats, got {image.dtype} and a target of {target.dtype}; "
            "for bytes pass x / 127.5 - 1"
        )
    image, target = widen(image), widen(target)
    dtype = torch.promote_types(image.dtype, target.dtype)
    return image.to(dtype), target.to(dtype)
