"""Weights and images from a hash of their names, in integer arithmetic: alike on every machine."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 1 << 16


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in (-1, 1) from the CRC-32 of a name and the positions."""
    size, seed = int(np.prod(shape, dtype=int)), np.uint32(zlib.crc32(name.encode()))
    out = np.empty(size, np.float32)
    # in blocks that stay in the cache; unsigned integers of 32 bits wrap as the hash wants it
    for start in range(0, size, BLOCK):
        x = np.arange(start, min(start + BLOCK, size), dtype=np.uint32)
        x *= np.uint32(2654435761)
        x += seed
        for _ in range(2):
            x ^= x >> np.uint32(16)
            x *= np.uint32(0x45D9F3B)
        x ^= x >> np.uint32(16)
        out[start : start + BLOCK] = (x + 0.5) / 2.0**31 - 1.0
    return torch.from_numpy(out).reshape(shape)


def hashed_parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    u = hashed(name, shape)
    if name.endswith("weight") and len(shape) > 1:
        return u.mul_((3 * shape[0] / u.numel()) ** 0.5)
    if name.endswith(("weight", "gamma")) and len(shape) == 1:
        return 1 + 0.1 * u
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
