"""Weights and images from a hash of their names, in integer arithmetic: alike on every machine."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in (-1, 1) from the CRC-32 of a name and the positions."""
    word, mask = np.uint64(0x45D9F3B), np.uint64(0xFFFFFFFF)
    x = np.arange(np.prod(shape, dtype=int), dtype=np.uint64) * np.uint64(2654435761)
    x = (x + np.uint64(zlib.crc32(name.encode()))) & mask
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * word) & mask
    x ^= x >> np.uint64(16)
    u = (x.astype(np.float64) + 0.5) / 2.0**31 - 1.0
    return torch.from_numpy(u.astype(np.float32)).reshape(shape)


def hashed_parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    u = hashed(name, shape)
    if name.endswith("weight"):
        return u * (3 * shape[0] / u.numel()) ** 0.5 if len(shape) > 1 else 1 + 0.1 * u
    return 0.5 * u if len(shape) > 1 else 0.1 * u


def hashed_images(name: str, shape: tuple[int, int, int, int]) -> Tensor:
    """Blocks of 8 x 8 pixels, a little noise and a ramp, in [-1, 1]."""
    *start, height, width = shape
    coarse = hashed(f"{name}/coarse", (*start, -(-height // 8), -(-width // 8)))
    coarse = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]
    return 0.7 * coarse + 0.2 * hashed(f"{name}/pix", shape) + 0.1 * torch.linspace(-1, 1, width)


@torch.no_grad()
def fill_hashed_(module: nn.Module, prefix: str = "") -> None:
    """Sets all parameters by their names."""
    for key, parameter in module.named_parameters():
        parameter.copy_(hashed_parameter(prefix + key, tuple(parameter.shape)))
