"""What needs no tokenizer: PSNR means little without it, since it varies by picture."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xq.metrics import psnr


def baselines(
    train: Float[Tensor, "m 3 h w"], images: Float[Tensor, "n 3 h w"], stride: int
) -> dict[str, float]:
    """PSNR of flat colour and of block means.

    Args:
        train: Their mean colour is the first baseline.
        images: What is reconstructed.
        stride: Side of a block: a baseline gets one colour where a tokenizer has one token.
    """
    colour = train.mean((0, 2, 3))[:, None, None].expand_as(images)
    means = F.avg_pool2d(images, stride)
    smooth = F.interpolate(means, scale_factor=stride, mode="bicubic")
    made = {
        "mean colour": colour,
        f"{stride} x {stride} means": F.interpolate(means, scale_factor=stride),
        f"{stride} x {stride} means, bicubic": smooth,
    }
    return {name: float(psnr(image, images)) for name, image in made.items()}
