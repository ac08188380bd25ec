"""LPIPS: how different two images look to a network trained on photographs."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xq.losses.trunks import NETS, PathLike, Trunk, load_heads_, load_trunk_
from xq.quantizers.precision import Float32, eager, float32_island

# lpips' own; only features of length zero notice it
_EPS = 1e-10
# mean and deviation of ImageNet's colours, for images in -1..1
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# pixels whose features are held at a time: an image of 256 x 256, on a GPU eight
_PIXELS, _PIXELS_GPU = 1 << 16, 1 << 19
# resampling overshoots a little; beyond this the images have another range
_LIMIT = 1.5


def lpips(
    image: Float[Tensor, "b 3 h w"],
    target: Float[Tensor, "b 3 h w"],
    trunk: Trunk,
    heads: Sequence[Float[Tensor, " channels"]],
) -> Float[Tensor, " b"]:
    """The distance of each image from its target (Zhang et al. 2018, equation 1).

    Args:
        image: Colours in -1..1, less the mean and divided by the deviation of ImageNet's.
        target: The same.
        trunk: Its layers in `features`, the numbers of those that are compared in `taps`.
        heads: The weight of each channel, for each of these layers.
    """
    total = image.new_zeros(len(image), dtype=torch.promote_types(image.dtype, torch.float32))
    weights = iter(heads)
    # both images layer by layer, so that the target's features are dropped on the way
    for i, layer in enumerate(trunk.features):
        image, target = layer(image), layer(target)
        if i in trunk.taps:
            difference = _unit(image) - _unit(target)
            total = total + difference.square().mean((2, 3)) @ next(weights)
    return total


def _unit(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Vectors over channels with length 1, in float32: half a mantissa would not tell them apart."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # the norm has gradient zero at zero, where the root of a sum of squares has NaN
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPS)


class LPIPS(Float32):
    """Learned perceptual image patch similarity, LPIPS (Zhang et al. 2018), version 0.1.

    The mean distance between the features that a frozen network has of two images in **-1..1**;
    for images in 0..1, pass `2 * x - 1`. There is no dropout, in training mode either, nothing to
    train, and nothing in `state_dict()`. `distances` gives a number an image.

    Memory stays bounded: a part of the batch at a time, the gradient is computed together with
    the distance, and the backward pass only scales it, as often as it is asked for (`adaptive_weight`
    asks twice). So call it under `torch.no_grad()` where nobody wants gradients; there are no second
    derivatives. A compiled graph leaves all that to the compiler.

    The trunk follows bfloat16 autocast, its features are compared in float32; under float16, in
    which gradients of single pixels vanish, it stays in float32. On a GPU
    `.to(memory_format=torch.channels_last)` may help.

    Args:
        net: "vgg" (as a loss), "alex" (as a measure) or "squeeze".
        weights: A local file of torchvision's vgg16, alexnet or squeezenet1_1, `.safetensors` or
            `.pth`. By default torchvision's own, downloaded once.
        heads: A local file with the linear heads, as the lpips package has them; by default its
            own. `pip install "xq[vision]"` brings it.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If there are neither `heads` nor the lpips package.
        OSError: If the download fails.
        ValueError: If `net` is unknown, or a file does not fit it.
    """

    def __init__(
        self, net: str = "vgg", *, weights: PathLike | None = None, heads: PathLike | None = None
    ) -> None:
        super().__init__()
        if net not in NETS:
            raise ValueError(f"LPIPS has the nets {', '.join(NETS)}, got net={net!r}")
        self.net = net
        self.trunk = Trunk(net)
        for i, channels in enumerate(NETS[net].channels):
            self.register_buffer(f"lin{i}", torch.empty(channels), persistent=False)
        load_heads_({name: b for name, b in self.named_buffers(recurse=False)}, net, heads)
        load_trunk_(self.trunk, net, weights)
        for name, colours in (("shift", _SHIFT), ("scale", _SCALE)):
            colours = torch.tensor(colours).view(1, 3, 1, 1)
            self.register_buffer(name, colours, persistent=False)
        self._range_is_checked = False

    def forward(
        self, image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        """The mean distance over the batch.

        Args:
            image: A reconstruction (b, 3, h, w); may leave -1..1.
            target: The original in -1..1, which the first call checks (later ones do not, since
                that would make a GPU wait).

        Raises:
            ValueError: If shapes, dtypes or the range do not fit.
        """
        return self.distances(image, target).sum() / max(len(image), 1)

    def distances(
        self, image: Shaped[Tensor, "..."], target: Shaped[Tensor, "..."]
    ) -> Float[Tensor, " b"]:
        """The distance of each image from its target, as `forward` takes them."""
        self._check(image, target)
        image, target = self._normalized(image), self._normalized(target)
        with _reduced_precision(image.device.type):
            if torch.compiler.is_compiling():
                return self._distances(image, target)
            if torch.is_grad_enabled() and (image.requires_grad or target.requires_grad):
                return _WithGradient.apply(image, target, self)  # pyright: ignore
            return torch.cat([self._distances(*part) for part in self.parts(image, target)])
