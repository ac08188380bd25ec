"""A picture coarse to fine: what a tokenizer has made of it after each scale or step."""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.data import CROP
from common.pictures import save_strip
from xq.models import Tokenizer


@torch.no_grad()
def save_partials(
    path: Path, tokenizer: Tokenizer, indices: Int[Tensor, "..."], image: Float[Tensor, "1 3 h w"]
) -> None:
    """The middle of a picture from more and more of its tokens, and as it was.

    Args:
        path: The PNG file.
        tokenizer: With the scales of this picture, if it has any.
        indices: The picture's tokens.
        image: The picture.
    """
    quantizer = tokenizer.quantizer
    rows, columns = (side // CROP for side in image.shape[2:])
    if quantizer.scales:
        sizes = [h * w for h, w in quantizer.grids]
        names = [f"{h // rows} x {w // columns}" for h, w in quantizer.grids]
        note = f"tokens for each {CROP} x {CROP} pixels, and the bits a pixel up to there"
    else:
        sizes = [1] * quantizer.depth
        names = [f"step {k + 1}" for k in range(quantizer.depth)]
        note = "codes added up so far, and their bits a pixel"
    total = indices.numel() * math.log2(quantizer.codebook_size) / image[0, 0].numel()
    so_far = [total * sum(sizes[: k + 1]) / sum(sizes) for k in range(len(sizes))]
    labels = [
        (name, f"{bits:.3f} bit" if bits < 1 else f"{bits:.2f} bits")
        for name, bits in zip(names, so_far, strict=True)
    ]
    side = min(rows, columns) * CROP
    top, left = ((length - side) // 2 for length in image.shape[2:])
    images = [made[0] for made in tokenizer.partials(indices)] + [image[0]]
    *parts, original = [each[:, top : top + side, left : left + side] for each in images]
    save_strip(path, original, parts, [*labels, ("original", "24 bits")], note)
