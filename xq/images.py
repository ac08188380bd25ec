"""Pictures to what tokenizers take, images `(b, 3, h, w)` in [-1, 1], and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# modes whose values are not bytes; `convert` would cut them off in silence
_WIDE_MODES = ("I", "F")


def to_images(pictures: Any) -> Float[Tensor, "b 3 h w"]:
    """Bytes to images in [-1, 1], channel-first, in float32.

    Args:
        pictures: A uint8 tensor or numpy array, `(b, h, w, 3)` or `(b, 3, h, w)`; a PIL picture, of
            which transparent parts lie on white; or a sequence of PIL pictures of one size. A
            single array or picture, without a batch axis, becomes a batch of one.

    Raises:
        ValueError: If they are no bytes, their layout is neither of the two (or could be both), or
            sizes differ.

    Examples:
        >>> bytes_ = torch.randint(256, (2, 60, 90, 3), dtype=torch.uint8)
        >>> images = to_images(bytes_)
        >>> images.shape
        torch.Size([2, 3, 60, 90])
        >>> torch.equal(to_uint8(images), bytes_.permute(0, 3, 1, 2))
        True
    """
    return _pixels(pictures).float() / 127.5 - 1


def to_uint8(images: Shaped[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Images in [-1, 1] to bytes, rounded to nearest; what lies outside becomes 0 or 255.

    Args:
        images: Any shape, floating-point.

    Raises:
        ValueError: If they are not floating-point, or hold a NaN.
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes floating-point images in [-1, 1], got {images.dtype}")
    if images.isnan().any():
        raise ValueError(
            f"to_uint8 got {int(images.isnan().sum())} NaN among {images.numel()} values; "
            "look for the layer that made them"
        )
    wide = images.float() if images.dtype.itemsize < 4 else images
    return ((wide + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Shaped[Tensor, "..."]) -> list["Image.Image"]:
    """Images `(b, 3, h, w)` in [-1, 1] as PIL pictures, as `to_uint8` rounds them.

    Args:
        images: `(b, 3, h, w)`, floating-point.

    Raises:
        ValueError: If their layout, dtype or values do not fit.
        ImportError: If pillow is not installed.
    """
    Image = _pil("to_pil")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"to_pil takes images (b, 3, h, w), got shape {tuple(images.shape)}; "
            "a single image needs a batch axis, images[None]"
        )
    pixels = to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def pad_to_multiple(images: Shaped[Tensor, "..."], multiple: int) -> Shaped[Tensor, "b c H W"]:
    """Repeats the right and the bottom edge until `multiple` divides height and width.

    So encoders of that stride take images of any size, and `[..., :h, :w]` of a reconstruction is
    what the image was.

    Args:
        images: `(b, c, h, w)`.
        multiple: Such as the encoder's `stride`.

    Raises:
        ValueError: If `multiple` is below 1, or the images have other axes or no pixels.

    Examples:
        >>> pad_to_multiple(torch.rand(2, 3, 60, 90), 16).shape
        torch.Size([2, 3, 64, 96])
    """
    if multiple < 1:
        raise ValueError(f"pad_to_multiple needs a positive integer, got multiple={multiple}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"pad_to_multiple takes images (b, c, h, w), got shape {tuple(images.shape)}"
        )
    rows, columns = (
        torch.arange(side + -side % multiple, device=images.device).clamp(max=side - 1)
        for side in images.shape[2:]
    )
    return images[:, :, rows[:, None], columns]


def _pixels(pictures: Any) -> UInt8[Tensor, "b 3 h w"]:
    if isinstance(pictures, Tensor):
        return _channels_first(pictures)
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8:
            raise _no_bytes(pictures.dtype)
        # a copy: the array may be read-only, which torch has no notion of
        return _channels_first(torch.from_numpy(pictures.copy()))
    if hasattr(pictures, "convert"):
        pictures = [pictures]
    if not isinstance(pictures, Sequence) or not all(hasattr(p, "convert") for p in pictures):
        raise ValueError(
            "to_images takes a uint8 tensor or numpy array, a PIL picture or a sequence of these, "
            f"got {type(pictures).__name__}"
        )
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(
            f"to_images takes pictures of one size, got {sorted(sizes)} (width, height); "
            "resize them, or bring them one by one"
        )
    return torch.stack([_from_pil(picture) for picture in pictures])


def _from_pil(picture: Any) -> UInt8[Tensor, "3 h w"]:
    if picture.mode.startswith(_WIDE_MODES):
        raise ValueError(
            f"to_images takes pictures of 8 bits a channel, got mode {picture.mode!r}; "
            "scale its values to bytes first"
        )
    if picture.mode != "RGB":
        Image = _pil("to_images")
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _channels_first(pixels: Tensor) -> UInt8[Tensor, "b 3 h w"]:
    if pixels.dtype != torch.uint8:
        raise _no_bytes(pixels.dtype)
    shape = tuple(pixels.shape)
    if pixels.ndim == 3:
        pixels = pixels[None]
    first, last = (pixels.ndim == 4 and pixels.shape[axis] == 3 for axis in (1, -1))
    if first == last:
        problem = "both fit" if first else "neither fits"
        raise ValueError(
            f"to_images takes (b, 3, h, w) or (b, h, w, 3), and of shape {shape} {problem}; "
            "permute the axes, make grey or transparent pictures RGB, or pass PIL pictures"
        )
    return pixels if first else pixels.permute(0, 3, 1, 2)


def _no_bytes(dtype: Any) -> ValueError:
    return ValueError(
        f"to_images takes bytes 0..255 of dtype uint8, got {dtype}; floats in [0, 1] become images "
        "with 2 * pixels - 1, wider integers bytes with pixels.to(torch.uint8)"
    )


def _pil(name: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{name} needs pillow: pip install pillow") from error
    return Image
