"""How much an adversarial loss weighs beside a reconstruction loss."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.distributed import all_reduce_sum_, world_size
from xq.precision import widen

# VQGAN's code; its paper has 1e-6
_EPS, _MOST = 1e-4, 1e4


def adaptive_weight(
    reconstruction_loss: Shaped[Tensor, "..."],
    adversarial_loss: Shaped[Tensor, "..."],
    last_layer: Shaped[Tensor, "..."],
    *,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """The weight at which both losses pull alike at the last layer (Esser et al. 2021, equation 7).

    `|grad(reconstruction)| / (|grad(adversarial)| + 1e-4)`, at most 1e4, detached. A loss without a
    gradient there gives a finite number. It waits for no device.

    Both graphs are walked down to the last layer alone and are kept for `backward`. Nothing is
    added to `.grad`, so that DistributedDataParallel's reductions wait for `backward`. In a
    network that is compiled as one graph all of its backward runs, twice: leave its last layer out
    of the graph. This function itself breaks a graph.

    With a gradient scaler pass both losses as scaled, so that no gradient underflows.

    Args:
        reconstruction_loss: All that compares the images, the perceptual loss too.
        adversarial_loss: The generator's loss.
        last_layer: The weight that makes the image, such as `decoder.last_layer`.
        across_processes: Whether the gradients are those of the batch of all processes, as in one
            process with all of it, at the price of a reduction; otherwise each process gets a
            weight of its own, as in VQGAN and XQ-GAN.

    Raises:
        ValueError: If `last_layer` is not one weight that learns, or a loss is no scalar with a
            gradient by it.

    Examples:
        >>> layer, x = nn.Linear(4, 4), torch.randn(8, 4)
        >>> reconstruction, adversarial = l2(layer(x), x), -layer(x).mean()
        >>> weight = adaptive_weight(reconstruction, adversarial, layer.weight)
        >>> loss = reconstruction + 0.5 * weight * adversarial
    """
    losses = {"reconstruction_loss": reconstruction_loss, "adversarial_loss": adversarial_loss}
    _check(losses, last_layer)
    gradients = [_gradient(name, loss, last_layer) for name, loss in losses.items()]
    both = torch.stack(gradients)
    if across_processes:
        # the mean is what data parallelism makes of gradients
        both = both / world_size()
        all_reduce_sum_([both])
    reconstruction, adversarial = torch.linalg.vector_norm(both, dim=1)
    return (reconstruction / (adversarial + _EPS)).clamp(max=_MOST)


def _gradient(name: str, loss: Tensor, last_layer: Tensor) -> Float[Tensor, " n"]:
    (found,) = torch.autograd.grad(loss.sum(), last_layer, retain_graph=True, allow_unused=True)
    if found is None:
        raise ValueError(
            f"adaptive_weight got a {name} that does not depend on last_layer; pass the weight "
            "that makes the image, and a loss of that image"
        )
    return widen(found.detach()).flatten()


def _check(losses: dict[str, Tensor], last_layer: Any) -> None:
    if not isinstance(last_layer, Tensor):
        raise ValueError(
            f"adaptive_weight takes one weight as last_layer, got a {type(last_layer).__name__}; "
            "pass a tensor, such as decoder.last_layer or layer.weight"
        )
    if not last_layer.requires_grad:
        raise ValueError(
            "adaptive_weight got a last_layer that is frozen (requires_grad is False), at which "
            "gradients cannot be compared; unfreeze it, or give the adversarial loss a fixed weight"
        )
    for name, loss in losses.items():
        if loss.numel() != 1:
            raise ValueError(
                f"adaptive_weight takes a scalar {name}, got shape {tuple(loss.shape)}; "
                "pass its mean"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"adaptive_weight got a {name} without a graph; compute it with gradients on and "
                "do not detach it, or leave the weight out where nothing is learned"
            )
