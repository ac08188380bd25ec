"""What the discriminators ask of their images."""

from torch import Tensor, nn


def check_images(owner: nn.Module, images: Tensor, channels: int, smallest: int) -> None:
    """Refuses anything but floating-point images `(b, channels, H, W)` that are large enough.

    Raises:
        ValueError: If the layout, the dtype or the size does not fit.
    """
    name, shape = type(owner).__name__, tuple(images.shape)
    if images.ndim != 4 or shape[1] != channels:
        last = images.ndim == 4 and shape[3] == channels
        way_out = (
            "move the channels with images.permute(0, 3, 1, 2)"
            if last
            else "add a batch axis with images[None], or bring them to that number of channels"
        )
        raise ValueError(
            f"{name} expects images (b, {channels}, H, W), got shape {shape}; {way_out}"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{name} expects floating-point images in [-1, 1], got {images.dtype}; "
            "bytes become that with images / 127.5 - 1"
        )
    if not len(images):
        raise ValueError(f"{name} got an empty batch, of shape {shape}, which has no logits")
    if min(shape[2:]) < smallest:
        raise ValueError(
            f"{name} needs images of at least {smallest} x {smallest} pixels, got {shape[2:]}"
        )


def check_choice(owner: nn.Module, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is none of the choices."""
    if value not in choices:
        names = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(owner).__name__} needs {argument}={names}, got {value!r}")
