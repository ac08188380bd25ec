"""A picture to tokens and back: draws original and reconstruction, and prints tokens and quality.

python examples/reconstruct.py PICTURE                      with the weights that xq brings
python examples/reconstruct.py                              a photograph of scikit-image
python examples/reconstruct.py PICTURE --tokenizer DIR      what save_pretrained wrote
python examples/reconstruct.py PICTURE --checkpoint FILE    a released file, such as VAR's
python examples/reconstruct.py PICTURE --preset msvr10p2    an architecture, with random weights
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common.data import find_pictures
from common.pictures import save_progress
from common.tokenizers import PRESETS, load_tokenizer
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from xq.images import pad_to_multiple, to_images
from xq.metrics import psnr
from xq.models import Tokenizer

# a side that the strides of all tokenizers divide
PROBE = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Reconstructs one picture."""
    args = _parse(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        path = args.picture or str(find_pictures("demo")[1][0])
        tokenizer, name = load_tokenizer(args.tokenizer, args.checkpoint, args.preset)
        tokenizer, image = fitted(tokenizer.to(device), path, args.size)
        image = image.to(device)
        indices, made, seconds = reconstructed(tokenizer, image)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    count, size = indices.numel(), tokenizer.quantizer.codebook_size
    bits, pixels = count * math.log2(size), image[0, 0].numel()
    print(f"{path} at {image.shape[3]} x {image.shape[2]} pixels; {name}")
    print(
        f"{count} indices {tuple(indices.shape[1:])} of {size} values, {bits:.0f} bits, "
        f"{bits / pixels:.3f} a pixel where RGB has 24\n"
        f"{psnr(made[-1], image):.2f} dB PSNR; {seconds:.2f} s on {device}"
    )
    save_progress(Path(args.out), image, made)
    print(f"drawn in {args.out}")
    if args.tokens:
        np.savez(args.tokens, indices=indices.cpu().numpy(), codebook_size=size)
        print(f"tokens in {args.tokens}")


@torch.no_grad()
def fitted(
    tokenizer: Tokenizer, path: str, side: int
) -> tuple[Tokenizer, Float[Tensor, "1 3 h w"]]:
    """The picture at a size that the tokenizer takes, its shorter side about `side` pixels."""
    quantizer, size = tokenizer.quantizer, getattr(tokenizer.encoder, "image_size", None)
    if size is None and quantizer.scales:
        # a convolutional encoder takes larger pictures, if each scale grows alike
        probe = torch.zeros(1, 3, PROBE, PROBE, device=next(tokenizer.parameters()).device)
        stride = PROBE // tokenizer.encoder(probe).shape[1]
        native = stride * min(quantizer.grids[-1])
        factor = max(round(side / native), 1)
        grids = [(h * factor, w * factor) for h, w in quantizer.grids]
        tokenizer, size = tokenizer.with_scales(grids), [stride * n for n in grids[-1]]
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if size is not None:
            return tokenizer, to_images(ImageOps.fit(picture.convert("RGB"), tuple(size[::-1])))
        scale = side / min(picture.size)
        width, height = (max(round(n * scale), 1) for n in picture.size)
        return tokenizer, to_images(picture.convert("RGB").resize((width, height)))


@torch.no_grad()
def reconstructed(
    tokenizer: Tokenizer, image: Float[Tensor, "1 3 h w"]
) -> tuple[Tensor, list[Float[Tensor, "1 3 h w"]], float]:
    """Tokens, the pictures after each scale or step, and the seconds there and back."""
    h, w = image.shape[2:]
    start = time.perf_counter()
    indices = tokenizer.encode(pad_to_multiple(image, getattr(tokenizer.encoder, "stride", 1)))
    last = tokenizer.decode(indices)
    seconds = time.perf_counter() - start
    made = list(tokenizer.partials(indices)) if tokenizer.quantizer.depth > 1 else [last]
    return indices, [part[:, :, :h, :w].float().clamp(-1, 1) for part in made], seconds


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", nargs="?", help="a file; by default a demo photograph")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", help="folder from save_pretrained")
    which.add_argument("--checkpoint", help="file of another project")
    which.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--size", type=int, default=256, help="the shorter side, in pixels")
    parser.add_argument("--out", default="runs/reconstruction.png", help="the PNG to draw")
    parser.add_argument("--tokens", help="an .npz file for the tokens")
    args = parser.parse_args(arguments)
    if args.size < 1:
        parser.error(f"--size must be positive, got {args.size}")
    return args


if __name__ == "__main__":
    main()
