"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, DiffAugment)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from xq.precision import float32_island, widen


class DiffAug(nn.Module):
    """Shifts, recolours and cuts out parts of images, in a way that gradients pass through.

    Zhao et al. 2020, DiffAugment (arXiv 2006.10738), in the form of StyleGAN-T, VAR and XQ-GAN.
    Each of the three is done to the whole batch or not at all; how far, is drawn for each image:

    * translation by whole pixels, up to `translation` of the side, with zeros moving in;
    * colour: brightness +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5, around their
      means and unclamped, for images in [-1, 1];
    * a box of `cutout` of the sides set to zero.

    Real and generated images go through it in calls of their own. It augments in training mode and
    in eval mode alike: it is a part of the game, not of a model. Draws wait for no device. Under
    autocast it works in float32, and returns the dtype that it got.

    Args:
        probability: How likely each of the three is, 0 to 1.
        translation: Largest shift, as a share of height and width.
        cutout: Sides of the box, as a share of height and width; 0 leaves the box out.
        generator: Source of randomness, on the device of the images; torch's own by default. Not
            part of the configuration.

    Raises:
        ValueError: If an argument lies outside [0, 1].

    Examples:
        >>> augment = DiffAug(cutout=0.5, generator=torch.Generator().manual_seed(0))
        >>> augment(torch.rand(4, 3, 32, 32) * 2 - 1).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        probability: float = 1.0,
        *,
        translation: float = 0.125,
        cutout: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shares = {"probability": probability, "translation": translation, "cutout": cutout}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"DiffAug needs {name} in [0, 1], got {share}")
        self.probability, self.translation, self.cutout = probability, translation, cutout
        self.generator = generator

    def forward(self, images: Shaped[Tensor, "..."], blur: float = 0.0) -> Float[Tensor, "b c h w"]:
        """Augments images `(b, c, h, w)` in [-1, 1].

        Args:
            images: The real or the generated ones.
            blur: How strongly all of them are blurred first, 0 (not at all) to 1; `fading_blur`
                gives it for a step.

        Raises:
            ValueError: If the images have another layout or dtype, or `blur` lies outside [0, 1].
        """
        _check(images, blur)
        x = widen(images)
        if blur:
            x = gaussian_blur(x, blur)
        if self.probability:
            x = self._augmented(x)
        return x.to(images.dtype)

    def _augmented(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        options: dict[str, Any] = {"device": x.device, "generator": self.generator}
        gates = torch.rand(3, **options) <= self.probability
        draws = torch.rand(7, len(x), 1, 1, **options).to(x.dtype).unbind()
        x = _translated(x, draws[0], draws[1], self.translation).where(gates[0], x)
        x = _recoloured(x, draws[2], draws[3], draws[4]).where(gates[1], x)
        # drawn whether or not there is a box, so that what follows in the generator is the same
        return x.masked_fill(_box(x, draws[5], draws[6], self.cutout) & gates[2], 0.0)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without the generator, which no file keeps."""
        return {
            "probability": self.probability,
            "translation": self.translation,
            "cutout": self.cutout,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def fading_blur(step: int, start: int, fade: int = 0) -> float:
    """How strongly a discriminator's images are blurred at a step, for `DiffAug`.

    Full before the discriminator starts, then falling linearly to none, so that it sees coarse
    structure first; as VAR and XQ-GAN have it. At `step == start` it is still full.

    Args:
        step: The number of the step.
        start: The step at which the discriminator starts.
        fade: Over how many further steps the blur fades; 0 leaves it at `start` alone.

    Raises:
        ValueError: If `fade` is negative.
    """
    if fade < 0:
        raise ValueError(f"fading_blur needs fade >= 0 steps, got {fade}")
    return 1.0 - min(max(step - start, 0) / (fade + 1), 1.0)


def gaussian_blur(
    images: Float[Tensor, "b c h w"], strength: float = 1.0
) -> Float[Tensor, "b c h w"]:
    """Blurs by a bell curve that has half its height at `strength * sqrt(side / 2)` pixels.

    That is StyleGAN's blur, `2 ** -(r / sigma) ** 2`: a standard deviation of 0.85 sigma. It is cut
    off at 3 sigma and reflected at the border. Blurs of less than a pixel change nothing.
    """
    for axis in (-2, -1):
        images = _blurred(images, axis, strength)
    return images


def _blurred(x: Float[Tensor, "b c h w"], axis: int, strength: float) -> Float[Tensor, "b c h w"]:
    side = x.shape[axis]
    sigma = strength * math.sqrt(side / 2)
    # reflection takes less than the whole side, which only images of a few pixels notice
    radius = min(math.floor(3 * sigma), side - 1)
    if radius < 1:
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp2(-(offsets / sigma).square())
    kernel = kernel / kernel.sum()
    rows = x.transpose(axis, -1).flatten(0, -2).unsqueeze(1)
    padded = F.pad(rows, (radius, radius), mode="reflect")
    with float32_island(x.device.type):
        blurred = F.conv1d(padded, kernel.view(1, 1, -1))
    return blurred.view(x.transpose(axis, -1).shape).transpose(axis, -1)


def _translated(
    x: Float[Tensor, "b c h w"],
    down: Float[Tensor, "b 1 1"],
    right: Float[Tensor, "b 1 1"],
    share: float,
) -> Float[Tensor, "b c h w"]:
    height, width = x.shape[2:]
    rows, seen_rows = _moved(height, down, share)
    columns, seen_columns = _moved(width, right, share)
    pixels = rows.transpose(1, 2) * width + columns
    pixels = pixels.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    moved = x.flatten(2).gather(2, pixels).view_as(x)
    seen = seen_rows.transpose(1, 2) & seen_columns
    return moved.masked_fill(~seen.unsqueeze(1), 0.0)


def _moved(
    side: int, draw: Float[Tensor, "b 1 1"], share: float
) -> tuple[Shaped[Tensor, "b 1 side"], Bool[Tensor, "b 1 side"]]:
    """Which line each line comes from, and whether there is such a one."""
    most = round(side * share)
    shift = (draw * (2 * most + 1)).floor().long() - most
    source = torch.arange(side, device=draw.device) + shift
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def _recoloured(
    x: Float[Tensor, "b c h w"],
    brightness: Float[Tensor, "b 1 1"],
    saturation: Float[Tensor, "b 1 1"],
    contrast: Float[Tensor, "b 1 1"],
) -> Float[Tensor, "b c h w"]:
    x = x + (brightness.unsqueeze(1) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation.unsqueeze(1)) + grey
    level = x.mean((1, 2, 3), keepdim=True)
    return (x - level) * (0.5 + contrast.unsqueeze(1)) + level


def _box(
    x: Float[Tensor, "b c h w"],
    down: Float[Tensor, "b 1 1"],
    right: Float[Tensor, "b 1 1"],
    share: float,
) -> Bool[Tensor, "b 1 h w"]:
    """True in a box whose centre is anywhere in the image, so that it may stick out."""
    rows = _inside(x.shape[2], down, share).transpose(1, 2)
    return (rows & _inside(x.shape[3], right, share)).unsqueeze(1)


def _inside(side: int, draw: Float[Tensor, "b 1 1"], share: float) -> Bool[Tensor, "b 1 side"]:
    length = round(side * share)
    # an even box has its centre between two lines, of which there is one more
    first = (draw * (side + 1 - length % 2)).floor().long() - length // 2
    lines = torch.arange(side, device=draw.device)
    return (lines >= first) & (lines < first + length)


def _check(images: Tensor, blur: float) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            "DiffAug expects floating-point images (b, c, h, w) in [-1, 1], got "
            f"{images.dtype} of shape {tuple(images.shape)}"
        )
    if not 0 <= blur <= 1:
        raise ValueError(f"DiffAug needs blur in [0, 1], got {blur}; fading_blur(...) gives it")
