"""LPIPS: how different two images look to a network trained on photographs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.losses.trunks import NETS, PathLike, Trunk, load_heads_, load_trunk_
from xq.precision import Float32, eager

# lpips' own; only features of length zero notice it
_EPS = 1e-10
# mean and deviation of ImageNet's colours, for images in -1..1
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# a GPU has more to fill, with more images at a time
_GPU = 8
# resampling overshoots a little; beyond this the images have another range
_LIMIT = 1.5


def lpips(
    image: Float[Tensor, "b 3 h w"],
    target: Float[Tensor, "b 3 h w"],
    trunk: Trunk,
    heads: Sequence[Float[Tensor, " _"]],
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
            # no matrix product, which autocast would round
            total = total + (difference.square().mean((2, 3)) * next(weights)).sum(1)
    return total


def _unit(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Vectors over channels of length 1, in float32: differences of rounded ones are noise."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    squares = features.square().sum(1, keepdim=True)
    # a root has no finite slope at zero; below a floor it has none
    length = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
    return features * (length + _EPS).reciprocal()


class LPIPS(Float32):
    """Learned perceptual image patch similarity, LPIPS (Zhang et al. 2018), version 0.1.

    The mean distance between the features that a frozen network has of two images in **-1..1**;
    for images in 0..1, pass `2 * x - 1`. There is no dropout, in training mode either, nothing to
    train, and nothing in `state_dict()`. `distances` gives a number an image.

    Memory stays bounded: the batch passes in parts, each gradient is computed together with its
    distance, and the backward pass only scales it, as often as it is asked for (an adaptive weight
    asks twice). So mind `torch.no_grad()` where nobody wants gradients; there are no second
    derivatives. A compiled graph leaves all of this to the compiler.

    The trunk follows bfloat16 autocast, and its features are compared in float32. Under float16,
    in which gradients of single pixels vanish, it stays in float32. Within a module that
    DistributedDataParallel wraps, pass that `broadcast_buffers=False`: the frozen weights are
    buffers, alike on all processes.

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

    Examples:
        >>> perceptual = LPIPS("vgg")  # doctest: +SKIP
        >>> loss = perceptual(image_hat, image)  # doctest: +SKIP
    """

    shift: Tensor
    scale: Tensor

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
        load_heads_(dict(self.named_buffers(recurse=False)), net, heads)
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
        with _no_float16(image.device.type):
            if torch.compiler.is_compiling():
                return self._distances(image, target)
            length = self._images_at_a_time(image)
            if torch.is_grad_enabled() and (image.requires_grad or target.requires_grad):
                return _WithGradient.apply(image, target, self._distances, length)  # pyright: ignore
            parts = zip(image.split(length), target.split(length), strict=True)
            return torch.cat([self._distances(*part) for part in parts])

    def _distances(
        self, image: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        heads = [getattr(self, f"lin{i}") for i in range(len(self.trunk.taps))]
        return lpips(image, target, self.trunk, heads)

    def _images_at_a_time(self, image: Tensor) -> int:
        height, width = image.shape[2:]
        pixels = NETS[self.net].pixels * (1 if image.device.type == "cpu" else _GPU)
        return max(pixels // (height * width), 1)

    def _normalized(self, image: Tensor) -> Float[Tensor, "b 3 h w"]:
        return (image.to(self.shift.dtype) - self.shift) / self.scale

    def _check(self, image: Tensor, target: Tensor) -> None:
        for name, x in (("image", image), ("target", target)):
            if not x.is_floating_point():
                raise ValueError(
                    f"LPIPS expects images of floats in -1..1, got {name} of {x.dtype}; "
                    "for bytes pass x / 127.5 - 1"
                )
            if x.ndim != 4 or x.shape[1] != 3:
                raise ValueError(
                    f"LPIPS expects images of shape (b, 3, h, w), got {name} of {tuple(x.shape)}; "
                    "a grey one goes in as x.expand(-1, 3, -1, -1)"
                )
        if image.shape != target.shape:
            raise ValueError(
                f"LPIPS compares images of one shape, got {tuple(image.shape)} and a target of "
                f"{tuple(target.shape)}"
            )
        smallest = NETS[self.net].smallest
        if min(image.shape[2:]) < smallest:
            raise ValueError(
                f"LPIPS with net={self.net!r} needs images of {smallest} x {smallest} or more, "
                f"got {tuple(image.shape[2:])}; enlarge both first"
            )
        if not self._range_is_checked and eager(target) and target.numel():
            low, high = (float(v) for v in torch.aminmax(target.detach()))
            if low < -_LIMIT or high > _LIMIT:
                raise ValueError(
                    f"LPIPS expects a target in -1..1, got values from {low:.4g} to {high:.4g}; "
                    "pass x / 127.5 - 1 of bytes, and no image normalized for a classifier"
                )
            self._range_is_checked = True

    def extra_repr(self) -> str:
        return f"net={self.net!r}"


class _WithGradient(torch.autograd.Function):
    """Distances whose gradient is computed with them, a few images at a time.

    A distance depends on its own images alone, so backward is a product with one number an image.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        target: Tensor,
        measure: Callable[[Tensor, Tensor], Tensor],
        length: int,
    ) -> Float[Tensor, " b"]:
        wanted = ctx.needs_input_grad[:2]
        values, gradients = [], []
        for part in zip(image.split(length), target.split(length), strict=True):
            with torch.enable_grad():
                part = [x.detach().requires_grad_(w) for x, w in zip(part, wanted, strict=True)]
                distances = measure(*part)
                total = distances.sum()
            gradients.append(torch.autograd.grad(total, [x for x in part if x.requires_grad]))
            values.append(distances.detach())
        ctx.save_for_backward(*(torch.cat(found) for found in zip(*gradients, strict=True)))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # with create_graph=True; what was saved would pass for a constant
        if torch.is_grad_enabled():
            raise NotImplementedError("LPIPS has no second derivative, so no create_graph=True")
        each = grads[0][:, None, None, None]
        saved = iter(ctx.saved_tensors)
        image, target = (each * next(saved) if w else None for w in ctx.needs_input_grad[:2])
        return image, target, None, None


def _no_float16(device_type: str) -> Any:
    """A context without float16 autocast; bfloat16, which has float32's exponents, may stay."""
    if (
        torch.is_autocast_enabled(device_type)
        and torch.get_autocast_dtype(device_type) == torch.float16
    ):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
