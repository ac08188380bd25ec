"""The gradient penalty that keeps a discriminator flat around real images."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.precision import widen


def r1(images: Shaped[Tensor, "..."], logits: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """Half the squared gradient of logits by real images (Mescheder et al. 2018, equation 9).

    A mean over images, so that its weight is the paper's gamma. Where an image has several logits
    their mean is differentiated, as it is their mean that losses are of.

    It may be left out most of the time (Karras et al. 2020, section 3.1): every 16 steps with 16
    times the weight. Its graph is differentiated again, which torch.compile cannot do: for this
    call take the discriminator that is not compiled. In float32 but for what the discriminator
    itself does in half precision.

    Args:
        images: Real images, for which `requires_grad_()` was called before the discriminator ran.
        logits: What the discriminator gave for them, at least one an image.

    Raises:
        ValueError: If the logits do not depend on the images, or their numbers do not fit.

    Examples:
        >>> images = torch.rand(2, 3, 16, 16).requires_grad_()
        >>> penalty = 10.0 * r1(images, PatchGAN(channels=4, depth=1)(images))
    """
    _check(images, logits)
    total = widen(logits).sum() * (len(logits) / logits.numel())
    (gradient,) = torch.autograd.grad(total, images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "r1 got logits that do not depend on these images; pass what the discriminator gave "
            "for them after images.requires_grad_()"
        )
    return widen(gradient).square().sum() / (2 * len(images))


class R1(nn.Module):
    """`r1` as a module."""

    def forward(
        self, images: Shaped[Tensor, "..."], logits: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        return r1(images, logits)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, of which there are none."""
        return {}


def _check(images: Tensor, logits: Tensor) -> None:
    if not images.requires_grad:
        raise ValueError(
            "r1 needs the gradient by images: call images.requires_grad_() before the "
            "discriminator runs"
        )
    if not logits.requires_grad:
        raise ValueError(
            "r1 got logits without a graph: run the discriminator with gradients on, and do not "
            "detach its logits"
        )
    if not images.numel() or not logits.numel() or logits.shape[:1] != images.shape[:1]:
        raise ValueError(
            "r1 takes one image or more and the logits of each, got images of shape "
            f"{tuple(images.shape)} and logits of shape {tuple(logits.shape)}"
        )
