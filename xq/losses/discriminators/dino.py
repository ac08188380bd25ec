"""A discriminator on the features of a frozen vision transformer."""

import copy
import inspect
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.backbones import PathLike, timm_model
from xq.losses.discriminators.checks import check_choice, check_images
from xq.losses.discriminators.layers import LocalBatchNorm, SpectralConv1d, group_norm
from xq.losses.frozen import Frozen
from xq.models.cnn_blocks import check_sizes

# of photographs, for a ViT that says nothing else
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class DINODiscriminator(nn.Module):
    """A logit for each patch at several depths of a frozen ViT (Sauer et al. 2023, StyleGAN-T).

    As in VAR and XQ-GAN, whose heads' parameter names it has: at each depth the patch tokens plus
    the class token go through convolutions of their own, with spectral normalization (Miyato et al.
    2018). The heads are all there is to train, to save and to reduce over processes: 7.39 M
    parameters for a ViT-S. The ViT moves along with `.to()` and stays in evaluation mode.

    XQ-GAN's paper names DINOv2, its code and its results are those of DINO v1: that is the
    default; `backbone="vit_small_patch14_dinov2.lvd142m"` is the other. There DINO runs with the
    tanh form of GELU, here with the one it was trained with.

    Images of another size than the ViT's are averaged down to it, or enlarged bicubically. In
    training mode, with probability `crop`, larger ones are cropped instead, the whole batch in
    the same place. Draws wait for no device.

    Second derivatives (R1) need attention that has them, slower than the usual one:
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around forward and backward.

    Args:
        backbone: A timm ViT by name, or one as it is, of which a copy is frozen.
        weights: A local file for a ViT by name, safetensors or a state dict, as timm or the
            authors of the network have it. By default timm's own, downloaded once.
        depths: After how many blocks features are taken; 0 is the embedding.
        size: Height and width that the ViT gets, a multiple of its patch: 224 for patches of 8, 14
            and 16 pixels.
        norm: "batch" takes statistics over groups of up to 8 images, in evaluation mode too, and so
            needs two images or more; "group" has each image alone, in 32 groups where these divide
            the channels, else the most of a power of two that do.
        crop: How likely a crop is in training mode, 0 to 1.
        generator: Source of randomness, on the device of the images; torch's own by default. Not
            part of the configuration.

    Raises:
        FileNotFoundError: If there is no file `weights`.
        ImportError: If timm is missing.
        OSError: If the weights cannot be downloaded; the message says how to do without.
        ValueError: If an argument lies outside its range, or the ViT or the file does not fit.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small_patch16_224.dino",
        *,
        weights: PathLike | None = None,
        depths: Sequence[int] = (0, 3, 6, 9, 12),
        size: int = 224,
        norm: str = "batch",
        crop: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, size=size)
        check_choice(self, "norm", norm, ("batch", "group"))
        if not 0 <= crop <= 1:
            raise ValueError(f"DINODiscriminator needs crop in [0, 1], got {crop}")
        if isinstance(backbone, nn.Module) and weights is not None:
            raise ValueError(
                "DINODiscriminator takes weights= for a backbone by name; load them into the "
                f"{type(backbone).__name__} before"
            )
        self.backbone_name = backbone if isinstance(backbone, str) else None
        self.weights = None if weights is None else os.fspath(weights)
        self.depths, self.size, self.norm, self.crop = tuple(depths), size, norm, crop
        self.generator = generator
        if isinstance(backbone, str):
            backbone = timm_model(type(self).__name__, backbone, weights=weights, img_size=size)
        else:
            backbone = copy.deepcopy(backbone)
        self.vit = Frozen(_Features(backbone, self.depths, size))
        width: Any = backbone.embed_dim
        self.heads = nn.ModuleList(_head(width, norm) for _ in self.depths)
        for name, colours in zip(("shift", "scale"), _statistics(backbone), strict=True):
            self.register_buffer(name, colours.view(1, 3, 1, 1), persistent=False)
        # constants need no broadcast by DistributedDataParallel, which looks here
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith("vit.")
        ]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON, without the generator.

        Raises:
            NotImplementedError: If the ViT was handed in as a module.
        """
        if self.backbone_name is None:
            raise NotImplementedError(
                "DINODiscriminator cannot write a ViT that was handed in as JSON; build it by "
                "timm's name, with weights= for a local file"
            )
        return {
            "backbone": self.backbone_name,
            "weights": self.weights,
            "depths": list(self.depths),
            "size": self.size,
            "norm": self.norm,
            "crop": self.crop,
        }

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b logits"]:
        """Logits of RGB images `(b, 3, H, W)` in [-1, 1], depth after depth.

        Raises:
            ValueError: If the images have another layout or dtype, or a batch of one meets
                `norm="batch"`.
        """
        check_images(self, images, 3, 1)
        if self.norm == "batch" and len(images) == 1:
            raise ValueError(
                "DINODiscriminator with norm='batch' compares the images of a batch and got one "
                "alone; use two or more, or build it with norm='group'"
            )
        x = (self._sized(images) - self.shift) / self.scale
        features = zip(self.heads, self.vit(x), strict=True)
        return torch.cat([head(tokens).flatten(1) for head, tokens in features], dim=1)

    def _sized(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
        size, (height, width) = self.size, images.shape[2:]
        if height == width == size:
            return images
        if min(height, width) < size:
            return F.interpolate(images, (size, size), mode="bicubic")
        resized = F.interpolate(images, (size, size), mode="area")
        if not (self.training and self.crop):
            return resized
        draw = torch.rand(3, device=images.device, generator=self.generator)
        return _cropped(images, size, draw[1:]).where(draw[0] < self.crop, resized)


class _Features(nn.Module):
    """Tokens of a ViT after some of its blocks: those of the patches plus the class token."""

    def __init__(self, vit: Any, depths: tuple[int, ...], size: int) -> None:
        super().__init__()
        _check_vit(vit, size)
        self.vit: Any = vit
        self.indices = _checked_depths(depths, len(vit.blocks))
        # timm counts features by blocks, and the embedding stands before the first
        vit.blocks = nn.Sequential(_Embedding(), *vit.blocks)
        self.has_class_token = getattr(vit, "cls_token", None) is not None

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c tokens"]]:
        features = self.vit.forward_intermediates(
            images,
            indices=self.indices,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [self._read(tokens).transpose(1, 2) for tokens in features]

    def _read(self, tokens: Any) -> Float[Tensor, "b tokens c"]:
        if not isinstance(tokens, tuple | list):
            return tokens
        patches, prefix = tokens
        return patches + prefix[:, :1] if self.has_class_token else patches


class _Embedding(nn.Module):
    """A block that does nothing."""

    def forward(self, x: Tensor, *context: Any, **options: Any) -> Tensor:
        return x


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
        return (self.fn(x) + x) * 0.5**0.5


def _head(width: int, norm: str) -> nn.Sequential:
    def block(kernel: int) -> nn.Sequential:
        normed = LocalBatchNorm(width) if norm == "batch" else group_norm(width, eps=1e-6)
        return nn.Sequential(SpectralConv1d(width, width, kernel), normed, nn.LeakyReLU(0.2))

    return nn.Sequential(block(1), _Residual(block(9)), SpectralConv1d(width, 1, 1))


def _cropped(
    images: Float[Tensor, "b 3 h w"], size: int, draws: Float[Tensor, "2"]
) -> Float[Tensor, "b 3 size size"]:
    for axis, draw in zip((2, 3), draws, strict=True):
        first = (draw * (images.shape[axis] - size + 1)).floor().long()
        # an index on the device: a slice would have to wait for the draw
        lines = first + torch.arange(size, device=images.device)
        images = images.index_select(axis, lines)
    return images


def _check_vit(vit: nn.Module, size: int) -> None:
    name = type(vit).__name__
    intermediates = getattr(vit, "forward_intermediates", None)
    known = inspect.signature(intermediates).parameters if intermediates else {}
    if "return_prefix_tokens" not in known or not hasattr(vit, "blocks"):
        raise ValueError(
            f"DINODiscriminator needs a timm ViT, which has blocks and forward_intermediates(...), "
            f"got {name}"
        )
    embed: Any = vit.patch_embed
    height, width = embed.patch_size
    if size % height or size % width or min(size // height, size // width) < 2:
        least = math.lcm(height, width)
        raise ValueError(
            f"DINODiscriminator needs a size of at least two patches that the patch {height} x "
            f"{width} of {name} divides, got {size}; the nearest is {max(size // least, 2) * least}"
        )
    built = embed.img_size
    if built is not None and tuple(built) != (size, size) and not vit.dynamic_img_size:
        raise ValueError(
            f"DINODiscriminator was given a {name} for images of {tuple(built)} pixels: pass "
            f"size={built[0]}, or build it with img_size={size}"
        )


def _checked_depths(depths: tuple[int, ...], blocks: int) -> list[int]:
    rises = all(before < after for before, after in pairwise(depths))
    if not depths or not rises or depths[0] < 0 or depths[-1] > blocks:
        raise ValueError(
            f"DINODiscriminator needs depths that rise from 0 (embedding) to at most {blocks}, the "
            f"blocks of its ViT, got {depths}"
        )
    return list(depths)


def _statistics(vit: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the colours that a ViT was trained with, for images in [-1, 1]."""
    config: Any = getattr(vit, "pretrained_cfg", None) or {}
    mean, deviation = (config.get(key, usual) for key, usual in _IMAGENET.items())
    return 2 * torch.tensor(mean) - 1, 2 * torch.tensor(deviation)
