"""The discriminator of pix2pix, which judges patches."""

from itertools import pairwise
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.losses.discriminators.checks import check_choice, check_images
from xq.losses.discriminators.layers import group_norm
from xq.models.cnn_blocks import check_sizes


class PatchGAN(nn.Module):
    """A logit for each of many overlapping patches (Isola et al. 2017, section 3.2.2).

    As in VQGAN, LlamaGen and XQ-GAN, with their parameter names: 2.77 M parameters at the defaults,
    patches of 70 x 70 pixels, 30 x 30 of them in a 256 x 256 image. Weights start from
    N(0, 0.02), those of the normalization from N(1, 0.02), biases at zero.

    With `norm="batch"` real and generated images, in calls of their own, are normalized apart, each
    process has its own statistics, and the running means move at each call in training mode, as
    those of any `nn.BatchNorm2d`. `norm="group"` depends on neither batch nor process.

    Args:
        image_channels: Channels of the images.
        channels: Channels after the first convolution; they double up to eight times as many.
        depth: How many convolutions halve the resolution.
        norm: "batch", or "group": 32 groups where these divide the channels, else the most of a
            power of two that do.

    Raises:
        ValueError: If a size is not a positive integer or `norm` is unknown.
    """

    def __init__(
        self,
        image_channels: int = 3,
        *,
        channels: int = 64,
        depth: int = 3,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_sizes(self, image_channels=image_channels, channels=channels, depth=depth)
        check_choice(self, "norm", norm, ("batch", "group"))
        self.image_channels, self.channels, self.depth = image_channels, channels, depth
        self.norm = norm

        widths = [channels * min(2**i, 8) for i in range(depth + 1)]
        layers: list[nn.Module] = [_conv(image_channels, channels, 2), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths)):
            stride = 2 if i < depth - 1 else 1
            # what follows subtracts the mean of each channel, or not
            layers += [_conv(before, width, stride, bias=norm != "batch")]
            layers += [nn.BatchNorm2d(width) if norm == "batch" else group_norm(width)]
            layers += [nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, _conv(widths[-1], 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if isinstance(getattr(module, "bias", None), Tensor):
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    @property
    def smallest(self) -> int:
        """The smallest side of an image that has a logit."""
        return 3 * 2**self.depth

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "image_channels": self.image_channels,
            "channels": self.channels,
            "depth": self.depth,
            "norm": self.norm,
        }

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b 1 h w"]:
        """Logits of images `(b, image_channels, H, W)` in [-1, 1], of any size from `smallest`.

        Raises:
            ValueError: If the images have another layout, dtype or are too small.
        """
        check_images(self, images, self.image_channels, self.smallest)
        return self.main(images)


def _conv(inputs: int, outputs: int, stride: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=bias)
