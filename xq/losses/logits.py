"""What adversarial losses ask of logits."""

from typing import Any

from torch import Tensor


def check_logits(name: str, **logits: Any) -> None:
    """Refuses what no discriminator gives; shapes must agree but for the batch.

    Raises:
        ValueError: If something is no floating-point tensor, is empty or looks like images.
    """
    for which, x in logits.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{name} takes the {which} logits as one tensor, got a {type(x).__name__}; "
                "those of several scales are joined by torch.cat([x.flatten(1) for x in scales], 1)"
            )
        shape = tuple(x.shape)
        if not x.is_floating_point():
            raise ValueError(f"{name} takes floating-point {which} logits, got {x.dtype}")
        if not x.numel():
            raise ValueError(f"{name} got no {which} logits, shape {shape}: skip empty batches")
        if x.ndim == 4 and shape[1] == 3:
            raise ValueError(
                f"{name} takes {which} logits, got shape {shape}, which looks like images; "
                "pass discriminator(images), or logits.flatten(1) if these are logits"
            )
    shapes = {which: tuple(x.shape) for which, x in logits.items()}
    if len({shape[1:] for shape in shapes.values()}) > 1:
        found = ", ".join(f"{which} {shape}" for which, shape in shapes.items())
        raise ValueError(
            f"{name} takes logits of one shape but for the batch, got {found}; "
            "give the discriminator real and generated images of one size"
        )
