"""Draws pictures from a trained generator, one row a class.

python examples/sample.py --generator runs/var/generator --tokenizer DIR                all classes
python examples/sample.py ... --classes 3,7 --count 12 --guidance 2 --top-k 100 --seed 1
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common.generators import Generator, generate, load_generator
from common.network import SmallDecoder, SmallEncoder
from common.pictures import save_rows
from jaxtyping import Float, Int
from torch import Tensor

from xq.models import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Samples and draws."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # your tokenizer's own classes go here
        classes = [SmallEncoder, SmallDecoder]
        tokenizer = Tokenizer.from_pretrained(args.tokenizer, classes=classes).to(device)
        model = load_generator(args.generator, tokenizer).to(device)
        chosen = range(model.classes) if args.classes is None else args.classes
        labels = torch.tensor([c for c in chosen for _ in range(args.count)], device=device)
        start = time.perf_counter()
        images = sample(model, tokenizer, labels, args)
        seconds = time.perf_counter() - start
    except (OSError, ValueError) as error:
        sys.exit(f"--generator {args.generator}, --tokenizer {args.tokenizer}: {error}")
    path = Path(args.out)
    save_rows(path, images.unflatten(0, (-1, args.count)), [str(label) for label in chosen])
    speed = len(images) / seconds
    print(f"{len(images)} pictures in {seconds:.1f} s, {speed:.1f} a second on {device}; {path}")


@torch.inference_mode()
def sample(
    model: Generator, tokenizer: Tokenizer, labels: Int[Tensor, " b"], options: Any
) -> Float[Tensor, "b 3 h w"]:
    """A picture of each of these classes, clamped to [-1, 1].

    Args:
        model: The generator.
        tokenizer: Whose tokens it makes.
        labels: Classes, -1 for none.
        options: Those that `add_sampling` adds.
    """
    generator = torch.Generator(labels.device).manual_seed(options.seed)
    names = ("guidance", "temperature", "top_k", "top_p", "power")
    given = {name: getattr(options, name) for name in names}
    # of a RAR alone
    if options.power is None:
        del given["power"]
    made = []
    for part in labels.split(options.batch):
        tokens = generate(model, tokenizer.quantizer, part, generator=generator, **given)
        made.append(tokenizer.decode(tokens).float().clamp(-1, 1).cpu())
    return torch.cat(made)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options that `sample` takes."""
    add = parser.add_argument
    add("--guidance", type=float, default=1.0, help="how much the class counts; 1 is none")
    add("--power", type=float, help="how late guidance grows in a RAR (1)")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, help="draw among so many most probable codes (all)")
    add("--top-p", type=float, help="draw among the most probable codes of this share (all)")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64, help="pictures at a time")


def _classes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,3,7, got {text}") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", required=True, help="folder of the generator")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--classes", type=_classes, help="numbers, as in 0,3,7 (all classes)")
    parser.add_argument("--count", type=int, default=8, help="pictures of each class")
    parser.add_argument("--out", default="runs/samples.png", help="the PNG to draw")
    add_sampling(parser)
    args = parser.parse_args(arguments)
    for name in ("count", "batch"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
