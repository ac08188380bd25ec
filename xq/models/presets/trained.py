"""A small tokenizer whose weights come with the package; beside them, tiny.md is its model card."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.linear import LinearDecoder, LinearEncoder, Sum
from xq.models.presets.row import Row
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ, EMACodebook, ResidualQuantizer

# channels of a token, and the side of its square of pixels
_DIM, _STRIDE = 32, 8
_WEIGHTS = Path(__file__).with_name("tiny.safetensors")


def tiny(pretrained: bool = False) -> Tokenizer:
    """A residual quantizer of eight steps, f8, small enough to come with the package.

    An image of 256 x 256 pixels is 32 x 32 x 8 tokens of 1024 codes, 81920 bits. Without scales and
    without attention it takes images of any size that 8 divides, from 8 x 16 pixels on, the larger
    ones in proportional time; the first steps alone give coarser images. Convolutions stand beside
    a linear path, with which training begins.

    Args:
        pretrained: Whether it is trained, on 640 photographs, and in eval mode; otherwise its
            weights are random, and its convolutions give zero. Nothing is downloaded.

    Raises:
        FileNotFoundError: If the weights are not installed.
        ValueError: If they are damaged.
    """
    encoder = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "z_channels": 64}
    decoder = {"channels": 48, "multipliers": (1, 2), "blocks": 1, "z_channels": 96}
    both = {"patch": _STRIDE // 2, "attention": False}
    forth, back = CNNEncoder(_DIM, **encoder, **both), CNNDecoder(_DIM, **decoder, **both)
    tokenizer = Tokenizer(
        Sum(linear=LinearEncoder(_DIM, _STRIDE), cnn=forth.zero_output_()),
        ResidualQuantizer(VQ(_DIM, 1024, codebook=EMACodebook), depth=8),
        Sum(linear=LinearDecoder(_DIM, _STRIDE), cnn=back.zero_output_()),
    )
    return _trained(tokenizer, _WEIGHTS) if pretrained else tokenizer


def _trained(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(
            f"tiny(pretrained=True) finds no {path}, which comes with the package; install xq again"
        )
    try:
        # half precision on the disk, the modules' own once loaded
        tokenizer.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, install xq again: {error}") from error
    return tokenizer.eval()


ROWS = (Row("tiny", tiny, 256, None, ""),)
