"""Writes a data set as tokens; run it again after a kill and it goes on where it was.

python examples/encode_dataset.py                                  the demo's pictures
python examples/encode_dataset.py --tokenizer DIR --data DIR       your own, or WebDataset shards
torchrun --nproc_per_node 4 examples/encode_dataset.py ...         a part for each process
python examples/encode_dataset.py ... --decode                     tokens back to pictures
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common.data import CROP, to_float
from common.network import SmallDecoder, SmallEncoder
from common.pictures import save_grid
from common.samples import Samples, find_samples, picture
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from xq.metrics import psnr
from xq.models import Tokenizer
from xq.token_store import TokenStore

# pictures that --decode shows
SHOWN = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Encodes what is not encoded yet, or decodes some of it."""
    args = _parse(arguments)
    # as torchrun sets them; without it there is one process
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if not Path(args.tokenizer).is_dir():
        sys.exit(f"{args.tokenizer} is no folder; examples/demo.py makes a tokenizer")
    # your tokenizer's own classes go here
    classes = [SmallEncoder, SmallDecoder]
    try:
        tokenizer = Tokenizer.from_pretrained(args.tokenizer, classes=classes).to(device)
        samples = find_samples(args.data)
    except (OSError, ValueError) as error:
        sys.exit(f"--tokenizer {args.tokenizer}, --data {args.data}: {error}")
    try:
        if args.decode:
            return decode(tokenizer, samples, args)
        return encode(tokenizer, samples, args, (rank, world), device)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from there")


@torch.inference_mode()
def encode(
    tokenizer: Tokenizer,
    samples: Samples,
    args: argparse.Namespace,
    part: tuple[int, int],
    device: torch.device,
) -> None:
    """Appends this process's part of the rows, from where it is on."""
    blank = torch.zeros(1, 3, args.size, args.size, device=device)
    shape = tokenizer.encode(blank).shape[1:]
    quantizer = tokenizer.quantizer
    grid = None if quantizer.scales else shape[: len(shape) - len(quantizer.code_shape)]
    with TokenStore.create(args.out, quantizer, grid, length=len(samples), part=part) as store:
        todo = store.rows[store.filled :]
        if part[0] == 0:
            share = f", part 1 of {part[1]}" if part[1] > 1 else ""
            print(f"{args.data}: {len(samples)} pictures{share}; {store} on {device}")
        start = time.perf_counter()
        with tqdm(total=len(store.rows), initial=store.filled, disable=part[0] > 0) as bar:
            for images, labels in batches(samples, todo, args):
                store.append(tokenizer.encode(images.to(device)), labels)
                bar.update(len(labels))
        seconds = time.perf_counter() - start
        speed = f"{len(todo) / seconds:.0f} a second" if todo else "it was complete"
        print(f"part {part[0] + 1} of {part[1]}: {len(todo)} pictures in {seconds:.1f} s, {speed}")


def batches(
    samples: Samples, rows: range, args: argparse.Namespace
) -> Iterator[tuple[Float[Tensor, "b 3 size size"], list[int]]]:
    """Pictures and labels in order; threads prepare a batch while the one before is encoded."""
    found = samples.read(rows)
    with ThreadPoolExecutor(args.threads) as pool:

        def begin() -> tuple[list[int], Iterator[Tensor]]:
            files = list(itertools.islice(found, args.batch))
            prepared = pool.map(partial(picture, side=args.size), [file for file, _ in files])
            return [label for _, label in files], prepared

        labels, prepared = begin()
        while labels:
            following = begin()
            yield to_float(torch.stack(list(prepared))), labels
            labels, prepared = following


@torch.inference_mode()
def decode(tokenizer: Tokenizer, samples: Samples, args: argparse.Namespace) -> None:
    """Draws some rows of a complete store below their originals."""
    store = TokenStore(args.out, tokenizer.quantizer)
    rows = torch.linspace(0, len(store) - 1, min(SHOWN, len(store))).long().tolist()
    tokens = torch.stack([store[row][0] for row in rows])
    made = tokenizer.decode(tokens.to(next(tokenizer.parameters()).device)).cpu()
    found = [next(samples.read(range(row, row + 1)))[0] for row in rows]
    originals = to_float(torch.stack([picture(file, args.size) for file in found]))
    path = Path(f"{args.out}.png")
    save_grid(path, originals, made)
    size = sum(file.stat().st_size for file in Path(args.out).glob("*.npy")) / len(store)
    print(f"{store}, {size:.0f} bytes a row on disk; pixels were {3 * args.size**2}")
    print(f"rows {', '.join(map(str, rows))}: {psnr(made, originals):.2f} dB; drawn in {path}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer", default="runs/msbr10p2/tokenizer", help="folder from save_pretrained"
    )
    parser.add_argument("--data", default="demo", help="demo, fashion-mnist, or a folder")
    parser.add_argument("--out", default="runs/demo.tokens", help="folder of the token store")
    parser.add_argument("--size", type=int, default=CROP, help="side that pictures get")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4, help="that read pictures")
    parser.add_argument("--decode", action="store_true", help="draw rows of the store instead")
    args = parser.parse_args(arguments)
    for name in ("size", "batch", "threads"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
