"""How near a reconstruction comes to its image, pixel by pixel and window by window."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# Wang et al. 2004: a Gaussian window of deviation 1.5 on 11 x 11 pixels, and two small constants
_SIGMA, _RADIUS = 1.5, 5
_SMALL_MEAN, _SMALL_DEVIATION = 0.01, 0.03


def psnr(
    image: Float[Tensor, "..."], target: Float[Tensor, "..."], span: float = 2.0
) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB, of the mean squared error over all elements.

    Args:
        image: Reconstruction.
        target: What it should be.
        span: Largest minus smallest value of an image; 2 for [-1, 1].

    Raises:
        ValueError: If their shapes differ.

    Examples:
        >>> psnr(torch.full((1, 3, 8, 8), 0.02), torch.zeros(1, 3, 8, 8))
        tensor(40.)
    """
    _check_alike("psnr", image, target)
    error = (image - target).square().mean()
    return 10 * (span**2 / error).log10()


def ssim(
    image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."], span: float = 2.0
) -> Float[Tensor, " b"]:
    """Structural similarity of each image (Wang et al. 2004), in float64; 1 for equal images.

    Of each channel by itself, with the paper's Gaussian window, over the places where it fits into
    the image; then the mean over places and channels. These are scikit-image's numbers with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=span`. A span that is
    too large makes any image look similar. The luminance term is made for values from 0 up: take
    bytes with a span of 255, as published numbers do, for those of [-1, 1] come out different.

    Args:
        image: Reconstructions `(b, c, h, w)`.
        target: What they should be.
        span: Largest minus smallest value that an image can have: 255 for bytes, 2 for [-1, 1].

    Raises:
        ValueError: If their shapes differ, they are smaller than the window, or the span is not
            positive.

    Examples:
        >>> images = torch.randint(256, (2, 3, 32, 32))
        >>> ssim(images, images, span=255.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    _check_alike("ssim", image, target)
    if span <= 0:
        raise ValueError(f"ssim needs a positive span, 2 for images in [-1, 1], got {span}")
    side = 2 * _RADIUS + 1
    if image.ndim != 4 or min(image.shape[2:]) < side:
        raise ValueError(
            f"ssim takes images (b, c, h, w) of {side} x {side} pixels or more, the size of its "
            f"window, got shape {tuple(image.shape)}"
        )
    x, y = image.double(), target.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x) - mean_x**2 + _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    first, second = (_SMALL_MEAN * span) ** 2, (_SMALL_DEVIATION * span) ** 2
    likeness = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    return (likeness / ((mean_x**2 + mean_y**2 + first) * (variances + second))).mean((1, 2, 3))


def _blurred(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
    """Means over the window, where it fits: along the rows, then along the columns."""
    return _window(x, x.shape[2]) @ (x @ _window(x, x.shape[3]).T)


def _window(like: Tensor, length: int) -> Float[Tensor, "places length"]:
    """A row for each place: products are several times faster than convolutions in float64."""
    steps = torch.arange(length, device=like.device)
    places = steps[: length - 2 * _RADIUS, None] + _RADIUS
    distance = (steps - places).to(like.dtype)
    weights = torch.exp(-(distance**2) / (2 * _SIGMA**2)) * (distance.abs() <= _RADIUS)
    return weights / weights.sum(1, keepdim=True)


def _check_alike(name: str, image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape:
        raise ValueError(
            f"{name} compares images of one shape, got {tuple(image.shape)} and "
            f"{tuple(target.shape)}"
        )
