"""The residual discriminator of StyleGAN2."""

import math
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.losses.discriminators.checks import check_images
from xq.models.cnn_blocks import check_sizes


class StyleGANDiscriminator(nn.Module):
    """One logit an image, from residual blocks down to 4 x 4 (Karras et al. 2020, StyleGAN2).

    As in LlamaGen and XQ-GAN, with their parameter names: a blur before each strided convolution,
    but neither the equalized learning rate nor the standard deviation over the batch of the paper;
    weights start as PyTorch's convolutions do. 36.5 M parameters at 256 x 256. There is
    `16384 / side` channels at a resolution, 512 at most.

    Args:
        image_size: Side of the images, a power of two from 8 to 1024; others are refused.
        image_channels: Channels of the images.
        max_channels: The most channels at any resolution; fewer make a smaller network.

    Raises:
        ValueError: If a size does not fit.
    """

    def __init__(
        self, image_size: int = 256, *, image_channels: int = 3, max_channels: int = 512
    ) -> None:
        super().__init__()
        check_sizes(
            self, image_size=image_size, image_channels=image_channels, max_channels=max_channels
        )
        if image_size not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(
                "StyleGANDiscriminator needs image_size as a power of two from 8 to 1024, got "
                f"{image_size}; resize or crop the images, or take PatchGAN"
            )
        self.image_size, self.image_channels = image_size, image_channels
        self.max_channels = max_channels

        sides = [image_size >> i for i in range(int(math.log2(image_size)) - 1)]
        widths = [min(max_channels, 16384 // side) for side in sides]
        start = [nn.Conv2d(image_channels, widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
        blocks = [_Block(*pair) for pair in pairwise(widths)]
        self.blocks = nn.Sequential(*start, *blocks)
        width = widths[-1]
        self.final_conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(
            nn.Linear(16 * width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "image_size": self.image_size,
            "image_channels": self.image_channels,
            "max_channels": self.max_channels,
        }

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b 1"]:
        """Logits of images `(b, image_channels, image_size, image_size)` in [-1, 1].

        Raises:
            ValueError: If the images have another layout, dtype or size.
        """
        check_images(self, images, self.image_channels, 1)
        if images.shape[2] != self.image_size or images.shape[3] != self.image_size:
            raise ValueError(
                f"StyleGANDiscriminator was built for images of {self.image_size} x "
                f"{self.image_size} pixels, got {tuple(images.shape[2:])}; resize or crop them, or "
                "build it with another image_size"
            )
        x = self.final_conv(self.blocks(images))
        return self.final_linear(x.flatten(1))


class _Block(nn.Module):
    """Two convolutions and a blurred halving, beside a 1x1 convolution of every second pixel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        conv = nn.Conv2d(outputs, outputs, 3, stride=2, padding=1)
        self.downsample = nn.Sequential(_Blur(), conv)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        return (self.downsample(self.net(x)) + self.conv_res(x)) * math.sqrt(0.5)


class _Blur(nn.Module):
    """Every pixel averaged with its neighbours by 1, 2, 1 in both directions."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return binomial_blur(x)


def binomial_blur(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Convolves each channel with `[1, 2, 1] x [1, 2, 1] / 16`, reflected at the border."""
    # sums of slices: they save nothing for the backward pass and make no kernel on the device
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = (x[:, :, :-2] + x[:, :, 2:]) * 0.25 + x[:, :, 1:-1] * 0.5
    return (x[..., :-2] + x[..., 2:]) * 0.25 + x[..., 1:-1] * 0.5
