"""Trains a tokenizer for small pictures of one kind, whole and in memory: what a generator needs.

python examples/train_small_tokenizer.py                       Fashion-MNIST, for a VAR
python examples/train_small_tokenizer.py --quantizer vq        one scale, for an AR
python examples/train_small_tokenizer.py --data DIR            your own, up to some thousands
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common.clock import Clock, learning_rate
from common.data import to_float
from common.log import Log
from common.network import start_at_pca_
from common.pictures import save_grid
from common.quantizers import start_codes_
from common.samples import find_samples, picture
from common.split import split
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from xq.metrics import CodebookUsage, psnr
from xq.models import (
    CNNDecoder,
    CNNEncoder,
    LinearDecoder,
    LinearEncoder,
    Sum,
    Tokenizer,
)
from xq.quantizers import (
    BSQ,
    VQ,
    EMACodebook,
    ProductQuantizer,
    Pyramid,
    Refine,
    ResidualQuantizer,
)

EMA = partial(EMACodebook, decay=0.98)
SCALES = (1, 2, 3, 4)
# each with the side of a token in pixels: 8 x 8 tokens of one scale, or four scales up to 4 x 4
QUANTIZERS = {
    "vq": (lambda: VQ(16, 512, codebook=EMA), 4),
    "bsq": (lambda: BSQ(10, regularize=False), 4),
    "msvqp2": (lambda: ProductQuantizer(pyramid(VQ(12, 512, codebook=EMA)), P=2), 8),
    "msbqp2": (lambda: ProductQuantizer(pyramid(BSQ(9, regularize=False)), P=2), 8),
}
# signs want channels that are alike at the start
WHITEN = {"msvqp2": 0.0, "msbqp2": 1.0}
LOG_EVERY = 25
SHOWN = 10
# pictures whose vectors the codes start from
START = 1024


def pyramid(leaf: VQ | BSQ) -> ResidualQuantizer:
    """Four scales, with two convolutions between them."""
    return ResidualQuantizer(leaf, multiscale=Pyramid(SCALES, [Refine(leaf.dim) for _ in range(2)]))


def make_tokenizer(name: str, images: Float[Tensor, "b 3 h w"]) -> Tokenizer:
    """A convolutional network; with scales beside a linear path, begun at principal components.

    Linear tokens know nothing of their neighbours. Finer scales make up for that; where there is
    one scale, a generator has an easier time without the linear path, although PSNR is lower.
    """
    make_quantizer, stride = QUANTIZERS[name]
    quantizer = make_quantizer()
    sizes = {"channels": 32, "z_channels": 64, "blocks": 1}
    sizes |= {"multipliers": (1, 2), "patch": stride // 2}
    dim = quantizer.dim
    encoder, decoder = CNNEncoder(dim, **sizes), CNNDecoder(dim, **sizes)
    if quantizer.scales:
        encoder = Sum(linear=LinearEncoder(dim, stride), cnn=encoder.zero_output_())
        decoder = Sum(linear=LinearDecoder(dim, stride), cnn=decoder.zero_output_())
        start_at_pca_(encoder, decoder, images, branches=quantizer.P, whiten=WHITEN[name])
    tokenizer = Tokenizer(encoder, quantizer, decoder)
    start_codes_(tokenizer, images)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, draws and saves; returns the last numbers."""
    args = _parse(arguments)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        samples = find_samples(args.data)
        read = samples.read(range(len(samples)))
        pixels = torch.stack([picture(file, args.size) for file, _ in read])
        rows, held_out = split(len(pixels))
    except (OSError, ValueError) as error:
        sys.exit(f"--data {args.data}: {error}")
    chosen = torch.randperm(len(rows))[:START].tolist()
    start = to_float(pixels[[rows[i] for i in chosen]])
    tokenizer = make_tokenizer(args.quantizer, start).to(device)
    out = Path(args.out or f"runs/small/{args.quantizer}")
    out.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(f"{args.quantizer}, {size:.2f} M parameters; {len(pixels)} pictures; writes to {out}")
    numbers = train(tokenizer, pixels[rows], pixels[held_out], args, out)
    tokenizer.eval().save_pretrained(out / "tokenizer")
    print(f"{out / 'tokenizer'}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    return numbers


def train(
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "n 3 h w"],
    held_out: UInt8[Tensor, "m 3 h w"],
    args: argparse.Namespace,
    out: Path,
) -> dict[str, float]:
    """Trains for so many steps or seconds; returns what the held-out pictures say at the end."""
    device = next(tokenizer.parameters()).device
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    log, clock = Log(out / "metrics.jsonl"), Clock(args.steps, args.seconds)
    bar = tqdm(total=100, bar_format="{percentage:3.0f}% {bar} {elapsed}<{remaining}{postfix}")
    tokenizer.train()
    while (progress := clock.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, clock.step, progress)
        chosen = torch.randint(len(pixels), (args.batch,))
        images = to_float(pixels[chosen]).to(device)
        made, (_, _, losses) = tokenizer(images)
        loss = F.l1_loss(made, images) + F.mse_loss(made, images) + losses.total()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        clock.step += 1
        if clock.step % LOG_EVERY == 0:
            fit = float(psnr(made.detach(), images))
            log.add(step=clock.step, loss=float(loss.detach()), psnr=fit)
            bar.n = round(100 * progress)
            bar.set_postfix_str(f"step {clock.step}, loss {loss.detach():.4f}, {fit:.2f} dB")
    bar.close()
    return evaluate(tokenizer, held_out, clock.step, out)


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer, pixels: UInt8[Tensor, "m 3 h w"], steps: int, out: Path
) -> dict[str, float]:
    """PSNR, the share of codes in use, and a picture."""
    device = next(tokenizer.parameters()).device
    images = to_float(pixels).to(device)
    usage = CodebookUsage.of(tokenizer.quantizer).to(device)
    made = []
    for part in images.split(64):
        indices = tokenizer.eval().encode(part)
        usage.update(indices)
        made.append(tokenizer.decode(indices))
    made = torch.cat(made).clamp(-1, 1)
    shown = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    save_grid(out / "reconstructions.png", images[shown], made[shown])
    used = float(usage.compute().used.mean())
    return {"steps": steps, "held-out PSNR": float(psnr(made, images)), "codes used": used}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="fashion-mnist", help='"fashion-mnist" or a folder')
    parser.add_argument("--quantizer", default="msvqp2", choices=QUANTIZERS)
    parser.add_argument("--size", type=int, default=32, help="side that pictures get")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--seconds", type=float, help="or after so many seconds (240)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for what is written (runs/small/QUANTIZER)")
    args = parser.parse_args(arguments)
    if args.steps is None and args.seconds is None:
        args.seconds = 240.0
    for name in ("size", "steps", "seconds", "batch", "lr"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    return args


if __name__ == "__main__":
    main()
