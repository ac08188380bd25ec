"""Trains an image tokenizer on photographs, shows its pictures, saves it and reads it again.

python examples/demo.py                    five photographs, a sixth held out
python examples/demo.py --quantizer rq     another quantizer: one line of code
python examples/demo.py --data DIR         your own pictures
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.baselines import baselines
from common.clock import Clock, learning_rate
from common.data import CROP, Crops, find_pictures, read, tiles, to_bytes, to_float, whole_tiles
from common.log import Log
from common.network import STRIDE, SmallDecoder, SmallEncoder, make_network, start_at_pca_
from common.partials import save_partials
from common.pictures import save_curves, save_grid, save_stack
from common.quantizers import QUANTIZERS, RECIPES, Recipe, start_codes_
from common.speed import Speed
from common.usage import used_shares
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from xq.metrics import CodebookUsage, psnr
from xq.models import Tokenizer

# points of the curves, the first before training
EVALUATIONS = 12
# of these, how many write a grid of crops
GRIDS = 4
SECONDS = 225.0
# steps between two lines of metrics.jsonl
LOG_EVERY = 10
# held out pictures and tiles of theirs that are measured
MOST_PICTURES, MOST_TILES = 16, 512


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, writes everything and prints what came of it; returns the final numbers."""
    args = _parse(arguments)
    clock = Clock(args.steps, args.seconds)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files, held_out_files = find_pictures(args.data)
        crops = Crops(files, args.seed)
        pictures = [read(path) for path in held_out_files[:MOST_PICTURES]]
    except (OSError, ValueError) as error:
        sys.exit(f"--data {args.data}: {error}")
    held_out = to_float(tiles(pictures)[:MOST_TILES]).to(device)
    references = baselines(crops.batch(256).to(device), held_out, STRIDE)

    recipe = RECIPES[args.quantizer]
    quantizer = QUANTIZERS[args.quantizer]()
    encoder, decoder = make_network(quantizer.dim)
    start_at_pca_(
        encoder,
        decoder,
        crops.batch(512),
        branches=getattr(quantizer, "P", 1),
        whiten=recipe.whiten,
        rotate=recipe.rotate,
    )
    tokenizer = Tokenizer(encoder, quantizer, decoder).to(device)
    start_codes_(tokenizer, crops.batch(256).to(device))
    speed = _measured_speed(args, tokenizer, crops.batch(args.batch).to(device))

    out = Path(args.out or f"runs/{args.quantizer}")
    out.mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    print(
        f"{args.quantizer}, {size:.2f} M parameters; {len(files)} pictures to train on, "
        f"{len(held_out_files)} held out\n{device}, {speed.threads} threads, "
        f"{'bfloat16' if speed.bf16 else 'float32'}; writes to {out}"
    )
    records = train(tokenizer, recipe, crops, held_out, clock, speed, args, out)
    save_curves(out / "curves.png", records, references)
    tokenizer.eval().save_pretrained(out / "tokenizer")
    return report(tokenizer, crops, held_out, pictures[0], references, clock, out)


def train(
    tokenizer: Tokenizer,
    recipe: Recipe,
    crops: Crops,
    held_out: Float[Tensor, "n 3 h w"],
    clock: Clock,
    speed: Speed,
    args: argparse.Namespace,
    out: Path,
) -> list[dict[str, Any]]:
    """Trains until the clock says so; returns what was measured on the way."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    usage = CodebookUsage.of(tokenizer.quantizer).to(held_out.device)
    log = Log(out / "metrics.jsonl")
    shown = torch.linspace(0, len(held_out) - 1, min(len(held_out), 8)).long()
    points, quickest = 0, math.inf
    bar = tqdm(total=100, bar_format="{percentage:3.0f}% {bar} {elapsed}<{remaining}{postfix}")
    while True:
        progress = clock.progress()
        if progress * EVALUATIONS >= points:
            made, _ = reconstruct(tokenizer, held_out)
            quality = float(psnr(made, held_out))
            shares = used_shares(usage, tokenizer.quantizer) if usage.counts.any() else {}
            usage.reset()
            log.add(step=clock.step, seconds=clock.elapsed, held_out_psnr=quality, used=shares)
            if points % (EVALUATIONS // GRIDS) == 0 or progress >= 1:
                share = 100 if progress >= 1 else 100 * points // EVALUATIONS
                save_grid(out / f"grid_{share:03d}.png", held_out[shown], made[shown])
            points = int(progress * EVALUATIONS) + 1
        if progress >= 1:
            bar.n = 100
            bar.close()
            return log.records

        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr or recipe.lr, clock.step, progress)
        images = crops.batch(args.batch).to(held_out.device)
        tokenizer.train()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=speed.bf16):
            made, (_, indices, losses) = tokenizer(images)
        loss = F.mse_loss(made.float(), images) + losses.total(**recipe.weights)
        usage.update(indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        clock.step += 1
        quickest = min(quickest, time.perf_counter() - start)

        if clock.step % LOG_EVERY == 0:
            now, fit = float(loss.detach()), float(psnr(made.detach().float(), images))
            log.add(step=clock.step, loss=now, psnr=fit)
            speed.check(quickest)
            quickest = math.inf
            share = float(usage.compute().used.mean())
            bar.n = round(100 * progress)
            bar.set_postfix_str(
                f"step {clock.step}, loss {now:.4f}, {fit:.1f} dB, held out {quality:.1f} dB, "
                f"{share:.0%} of codes used"
            )


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, images: Float[Tensor, "n 3 h w"]
) -> tuple[Float[Tensor, "n 3 h w"], CodebookUsage]:
    """Images through tokens and back, in float32, and which codes they used."""
    tokenizer.eval()
    usage = CodebookUsage.of(tokenizer.quantizer).to(images.device)
    made = []
    for part in images.split(64):
        image, quantized = tokenizer(part)
        usage.update(quantized.indices)
        made.append(image)
    return torch.cat(made), usage


def report(
    tokenizer: Tokenizer,
    crops: Crops,
    held_out: Float[Tensor, "n 3 h w"],
    picture: UInt8[Tensor, "3 h w"],
    references: dict[str, float],
    clock: Clock,
    out: Path,
) -> dict[str, Any]:
    """Measures, writes pictures and tokens, prints; returns the numbers."""
    # a short trial is not worth many crops
    batches = min(16, clock.step // 16 + 1)
    fresh = torch.cat([crops.batch(64) for _ in range(batches)]).to(held_out.device)
    numbers: dict[str, Any] = {"steps": clock.step, "baselines": references}
    for name, images in (("training", fresh), ("held out", held_out)):
        made, usage = reconstruct(tokenizer, images)
        numbers[f"{name}: PSNR"] = float(psnr(made, images))
        numbers[f"{name}: codes used"] = used_shares(usage, tokenizer.quantizer)
    numbers |= write_picture(tokenizer, picture, out)

    print("\nPSNR in dB")
    rows = {**references, "this tokenizer": numbers["held out: PSNR"]}
    for name, value in rows.items():
        print(f"  {name:24s}{value:6.2f}  held out")
    print(f"  {'this tokenizer':24s}{numbers['training: PSNR']:6.2f}  training pictures")
    print(f"  {'this tokenizer':24s}{numbers['in one piece: PSNR']:6.2f}  held out, in one piece")
    print(
        f"codes used, in {len(fresh)} training crops and in {len(held_out)} held-out ones", end=""
    )
    print("; coarse scales have few tokens" if tokenizer.quantizer.scales else "")
    for name, share in numbers["training: codes used"].items():
        print(f"  {name:24s}{share:6.1%}{numbers['held out: codes used'][name]:8.1%}")
    print(
        f"tokens.npz: the held-out picture in {numbers['bits']:,.0f} bits, "
        f"{numbers['bits per pixel']:.3f} a pixel (24 before); decoded by the saved tokenizer "
        f"to {'the same' if numbers['same pixels'] else 'OTHER'} pixels"
    )
    print(f"{clock.step} steps, {clock.elapsed:.0f} s; everything is in {out.resolve()}:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name}")
    (out / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


@torch.no_grad()
def write_picture(
    tokenizer: Tokenizer, picture: UInt8[Tensor, "3 h w"], out: Path
) -> dict[str, Any]:
    """The held-out picture in one piece: its tokens, decoded again, and its partials.

    A pyramid gets as many times more tokens as the picture has tiles, so the bits a pixel stay.
    """
    device = next(tokenizer.parameters()).device
    pixels = whole_tiles(picture).to(device)
    rows, columns = (side // CROP for side in pixels.shape[1:])
    image = to_float(pixels)[None]
    scales = tuple((h * rows, w * columns) for h, w in tokenizer.quantizer.grids)
    whole = tokenizer.with_scales(scales) if scales else tokenizer
    made, _ = reconstruct(whole, image)
    save_stack(out / "picture.png", image[0], made[0])

    indices = whole.encode(image)
    dtype = np.min_scalar_type(tokenizer.quantizer.codebook_size - 1)
    np.savez(out / "tokens.npz", indices=indices.cpu().numpy().astype(dtype))

    saved = Tokenizer.from_pretrained(out / "tokenizer", classes=[SmallEncoder, SmallDecoder])
    saved = (saved.with_scales(scales) if scales else saved).to(device)
    with np.load(out / "tokens.npz") as file:
        read_back = torch.from_numpy(file["indices"]).to(device)
    again = saved.decode(read_back)

    bits = indices.numel() * math.log2(tokenizer.quantizer.codebook_size)
    if tokenizer.quantizer.depth > 1:
        save_partials(out / "partials.png", whole, indices, image)
    return {
        "in one piece: PSNR": float(psnr(made, image)),
        "bits": bits,
        "bits per pixel": bits / image[0, 0].numel(),
        "same pixels": torch.equal(to_bytes(again), to_bytes(made)),
    }


def _measured_speed(
    args: argparse.Namespace, tokenizer: Tokenizer, images: Float[Tensor, "b 3 h w"]
) -> Speed:
    """The fastest threads and precision, unless the command line tells them."""
    device = images.device.type

    def step(bf16: bool) -> None:
        # in eval mode, so that codebooks learn nothing from it
        tokenizer.eval()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            made = tokenizer(images).image
        made.float().square().mean().backward()
        tokenizer.zero_grad(set_to_none=True)

    if device == "cpu":
        return Speed(step, threads=args.threads, bf16=args.bf16)
    bf16 = torch.cuda.is_bf16_supported() if args.bf16 is None else args.bf16
    return Speed(step, threads=args.threads or torch.get_num_threads(), bf16=bf16)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="demo", help='"demo" (default) or a folder of images')
    parser.add_argument("--quantizer", default="msbr10p2", choices=QUANTIZERS)
    parser.add_argument("--steps", type=int, help="stop after so many training steps")
    parser.add_argument("--seconds", type=float, help=f"or so many seconds ({SECONDS:.0f})")
    parser.add_argument("--out", help="folder for what is written (runs/QUANTIZER)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="highest learning rate (from the recipe)")
    parser.add_argument("--threads", type=int, help="CPU threads (the fastest number)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (if faster)"
    )
    args = parser.parse_args(arguments)
    if args.steps is None and args.seconds is None:
        args.seconds = SECONDS
    for name in ("steps", "seconds", "batch", "lr", "threads"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    return args


if __name__ == "__main__":
    main()
