"""Compares a tokenizer with JPEG files that are no larger, and with block means; prints a table.

python examples/compare_jpeg.py                           xq's own, on scikit-image's photographs
python examples/compare_jpeg.py --data DIR --size 256     the middles of your pictures
python examples/compare_jpeg.py --alex FILE --vgg FILE    with LPIPS, of local weights
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.adm import read_crop
from common.data import find_pictures, read, to_bytes, to_float, to_image, to_tensor
from common.tokenizers import load_tokenizer
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from xq.images import pad_to_multiple, to_uint8
from xq.losses import LPIPS
from xq.metrics import psnr, ssim
from xq.models import Tokenizer
from xq.quantizers import beam_encode

# paths that the search for codes keeps
BEAM = 8
Pixels = UInt8[Tensor, "1 3 h w"]


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Measures and prints; bits a pixel, PSNR, SSIM and what there is of LPIPS, by row."""
    args = _parse(arguments)
    try:
        tokenizer, name = load_tokenizer(args.tokenizer, None, None)
        weights = {"alex": args.alex, "vgg": args.vgg}
        nets = [LPIPS(net, weights=file) for net, file in weights.items() if file]
        pictures = list(find(args.data, args.size))
        found: dict[str, list[list[float]]] = {}
        for pixels in tqdm(pictures, unit="picture"):
            for row, bits, made in rows(tokenizer, pixels):
                numbers = [bits / pixels[0, 0].numel(), *compare(made, pixels, nets)]
                found.setdefault(row, []).append(numbers)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    means = {row: np.mean(numbers, 0).tolist() for row, numbers in found.items()}
    print(f"{name}; means over {len(pictures)} pictures\n")
    head = ["", "bits a pixel", "PSNR", "SSIM", *(f"LPIPS {net.net}" for net in nets)]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row, (bits, quality, *others) in means.items():
        shown = [row, f"{bits:.3f}", f"{quality:.2f}", *(f"{x:.3f}" for x in others)]
        print("| " + " | ".join(shown) + " |")
    return means


def find(source: str, size: int) -> Iterator[Pixels]:
    """Pictures: their middles, or as a whole where the size is 0."""
    paths = [p for part in find_pictures(source) for p in part]
    for path in paths:
        pixels = to_bytes(read_crop(path, str(path), size, 3)) if size else read(path)
        yield pixels[None]


@torch.no_grad()
def rows(tokenizer: Tokenizer, pixels: Pixels) -> Iterator[tuple[str, float, Pixels]]:
    """What each way makes of a picture, and the bits that it takes.

    The tokenizer with a quarter, with half and with all of its steps, and a JPEG file for each; and
    with the same bits, better chosen.
    """
    image, (h, w) = to_float(pixels), pixels.shape[2:]
    stride, depth = getattr(tokenizer.encoder, "stride", 1), tokenizer.quantizer.depth
    padded = pad_to_multiple(image, stride)
    means = F.avg_pool2d(padded, stride)
    smooth = F.interpolate(means, scale_factor=stride, mode="bicubic")
    # three bytes a block
    yield f"{stride} x {stride} means, bicubic", 24 * means[0, 0].numel(), cut(smooth, h, w)
    indices = tokenizer.encode(padded)
    parts = [cut(part, h, w) for part in tokenizer.partials(indices)]
    for k in sorted({max(depth // 4, 1), max(depth // 2, 1), depth}):
        bits = indices.numel() * k / depth * math.log2(tokenizer.quantizer.codebook_size)
        yield f"{k} of {depth} steps", bits, parts[k - 1]
        yield f"JPEG, no larger than {k} steps", *jpeg(pixels, bits)
    if depth > 1 and not tokenizer.quantizer.scales:
        indices = beam_encode(tokenizer.quantizer, tokenizer.encoder(padded), BEAM)
        yield f"{depth} of {depth} steps, beam {BEAM}", bits, cut(tokenizer.decode(indices), h, w)


def cut(image: Float[Tensor, "1 3 H W"], h: int, w: int) -> Pixels:
    """The part that is no padding, as bytes."""
    return to_uint8(image[:, :, :h, :w].clamp(-1, 1))


def jpeg(pixels: Pixels, bits: float) -> tuple[float, Pixels]:
    """The best JPEG file of at most so many bits, all of the file counted; else the smallest."""
    picture = to_image(pixels[0])
    low, high = 1, 95
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if 8 * len(_file(picture, middle)) <= bits else (low, middle - 1)
    file = _file(picture, low)
    with Image.open(BytesIO(file)) as opened:
        return 8.0 * len(file), to_tensor(opened.convert("RGB"))[None]


def compare(made: Pixels, pixels: Pixels, nets: Sequence[LPIPS]) -> list[float]:
    """PSNR, SSIM and LPIPS of bytes."""
    pair = to_float(made), to_float(pixels)
    first = [psnr(made.double(), pixels.double(), 255.0), ssim(made, pixels, 255.0)]
    with torch.no_grad():
        return [float(x) for x in (*first, *(net.distances(*pair) for net in nets))]


def _file(picture: Image.Image, quality: int) -> bytes:
    data = BytesIO()
    picture.save(data, "jpeg", quality=quality, optimize=True)
    return data.getvalue()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="demo", help='"demo" (default) or a folder of pictures')
    parser.add_argument("--size", type=int, default=0, help="side of the middles (0: all of it)")
    parser.add_argument("--tokenizer", help="folder from save_pretrained (xq's own, tiny)")
    for net in ("alex", "vgg"):
        parser.add_argument(f"--{net}", type=Path, help="a file of its weights, for LPIPS")
    args = parser.parse_args(arguments)
    if args.size < 0:
        parser.error(f"--size must be 0 or more, got {args.size}")
    return args


if __name__ == "__main__":
    main()
