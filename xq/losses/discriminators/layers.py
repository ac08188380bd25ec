"""Layers of the discriminators."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xq.precision import float32_island

# images whose statistics are taken together, as in StyleGAN-T
_GROUP = 8


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """32 groups where these divide the channels, else the most of a power of two that do."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


class SpectralConv1d(nn.Module):
    """A circular 1-d convolution whose weight is divided by its largest singular value.

    Miyato et al. 2018, spectral normalization, with one step of power iteration at each call in
    training mode, after 15 at the start. The singular value is computed in float32, whatever
    autocast says; a weight of zeros stays zero.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel: An odd number of positions.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.weight_orig = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.register_buffer("weight_u", torch.empty(outputs))
        self.register_buffer("weight_v", torch.empty(inputs * kernel))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew, as `nn.Conv1d` does."""
        bound = self.weight_v.numel() ** -0.5
        self.weight_orig.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)
        self.weight_u.copy_(F.normalize(torch.randn_like(self.weight_u), dim=0))
        for _ in range(15):
            self._iterate()

    @torch.no_grad()
    def _iterate(self) -> None:
        matrix = self.weight_orig.flatten(1)
        self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12))
        self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b d n"]:
        with float32_island(x.device.type):
            if self.training:
                self._iterate()
            # copies, since a second call moves the buffers before the first one's backward pass
            u, v = self.weight_u.clone(), self.weight_v.clone()
            largest = torch.dot(u, self.weight_orig.flatten(1) @ v)
            weight = self.weight_orig / largest.where(largest != 0, 1.0)
        x = F.pad(x, (self.padding, self.padding), mode="circular")
        return F.conv1d(x, weight, self.bias)

    def extra_repr(self) -> str:
        outputs, inputs, kernel = self.weight_orig.shape
        return f"{inputs}, {outputs}, kernel={kernel}"


class LocalBatchNorm(nn.Module):
    """Batch normalization over groups of up to 8 images, without running means.

    StyleGAN-T's (Sauer et al. 2023): always with the statistics of the batch at hand. There a batch
    has up to 8 images, or a number that its groups divide; here the others are split as evenly
    as they can be.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
        groups = x.tensor_split(-(-len(x) // _GROUP))
        options: dict[str, Any] = {"training": True, "eps": 1e-6}
        normed = [F.batch_norm(g, None, None, self.weight, self.bias, **options) for g in groups]
        return torch.cat(normed)
