"""Sizes of images and patches that models with learned positions are built for."""

from collections.abc import Sequence

from torch import Tensor, nn

from xq.models.cnn_blocks import check_images

Size = int | Sequence[int]
Pair = tuple[int, int]


def checked_pair(owner: nn.Module, name: str, size: Size) -> Pair:
    """A size as (height, width).

    Raises:
        ValueError: If it is neither a positive integer nor two of them.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(
            f"{type(owner).__name__} needs `{name}` to be a positive integer or two of them, "
            f"(height, width), got {size!r}"
        )
    return pair


def plain_size(pair: Pair) -> int | list[int]:
    """A pair as JSON has it, one number for squares."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def checked_grid(owner: nn.Module, image_size: Pair, patch_size: Pair) -> Pair:
    """How many patches an image is high and wide.

    Raises:
        ValueError: If patches do not cover it.
    """
    (height, width), (p, q) = image_size, patch_size
    if height % p or width % q:
        near = (max(height // p, 1) * p, max(width // q, 1) * q)
        raise ValueError(
            f"{type(owner).__name__} needs an image_size that is a multiple of the patch_size "
            f"{patch_size}, got {image_size}; {near} is one"
        )
    return height // p, width // q


def check_fixed_images(owner: nn.Module, images: Tensor, channels: int, image_size: Pair) -> None:
    """Refuses anything but floating-point images `(b, channels, *image_size)`.

    Raises:
        ValueError: If the layout, the dtype or the size does not fit.
    """
    check_images(owner, images, channels, 1)
    height, width = images.shape[2:]
    if (height, width) != image_size:
        raise ValueError(
            f"{type(owner).__name__} is built for images of {image_size}, got {(height, width)}; "
            f"resize or crop them, or build it with image_size={(height, width)}"
        )
