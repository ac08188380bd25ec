"""How far sampled pictures are from real ones, beside a baseline that knows no dependencies.

python examples/judge_samples.py --generator runs/var/generator --tokenizer DIR --tokens STORE

A small classifier learns the classes from real pictures. Its features give a Frechet distance to
held-out pictures, and its answers the share of samples that look like their class. It is no FID.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from common.data import to_float
from common.generators import load_generator
from common.judge import Judge, learned
from common.network import SmallDecoder, SmallEncoder
from common.samples import find_samples, picture
from jaxtyping import Float, Int
from sample import add_sampling, sample
from torch import Tensor

from xq.models import Tokenizer
from xq.token_store import TokenStore


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Samples, measures, prints; returns the numbers."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    try:
        # your tokenizer's own classes go here
        classes = [SmallEncoder, SmallDecoder]
        tokenizer = Tokenizer.from_pretrained(args.tokenizer, classes=classes).to(device)
        model = load_generator(args.generator, tokenizer).to(device)
        store = TokenStore(args.tokens, tokenizer.quantizer)
        real, held_out = (read(source, args.size) for source in (args.data, args.held_out))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    judge = Judge(learned(real, model.classes, args.steps, device), held_out, args.count)

    rows = torch.randperm(len(store))[: args.count].tolist()
    tokens = torch.stack([store[row][0] for row in rows])
    labels = torch.tensor([store[row][1] for row in rows])
    chosen = torch.randperm(len(real[1]))[: args.count]
    numbers = {
        "real": judge(real[0][chosen], real[1][chosen]),
        "real, as tokens": judge(decoded(tokenizer, tokens, args.batch), labels),
        "sampled": judge(sample(model, tokenizer, labels.to(device), args), labels),
        "tokens shuffled": judge(decoded(tokenizer, shuffled(tokens), args.batch), labels),
    }
    print(f"{args.count} pictures, against {judge.count} held out")
    print(f"{'':18s}{'like their class':>18s}{'Frechet':>10s}{'of pixels':>11s}")
    for name, (like, frechet, pixels) in numbers.items():
        print(f"{name:18s}{like:18.1%}{frechet:10.3f}{pixels:11.3f}")
    return {name: found._asdict() for name, found in numbers.items()}


@torch.inference_mode()
def decoded(tokenizer: Tokenizer, tokens: Tensor, size: int) -> Float[Tensor, "n 3 h w"]:
    """Pictures of tokens."""
    device = next(tokenizer.parameters()).device
    return tokenizer.decode(tokens.to(device), chunk=size).float().clamp(-1, 1).cpu()


def shuffled(tokens: Int[Tensor, "n ..."]) -> Int[Tensor, "n ..."]:
    """Each index at its place, but of any picture: frequencies stay, what depends on what goes."""
    flat = tokens.flatten(1)
    order = torch.rand(flat.shape).argsort(0)
    return flat.gather(0, order).reshape(tokens.shape)


def read(source: str, side: int) -> tuple[Float[Tensor, "n 3 h w"], Int[Tensor, " n"]]:
    """All pictures of a source, and their labels."""
    samples = find_samples(source)
    found = [(picture(file, side), label) for file, label in samples.read(range(len(samples)))]
    return to_float(torch.stack([one for one, _ in found])), torch.tensor([n for _, n in found])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--generator", required=True, help="folder of the generator")
    add("--tokenizer", required=True, help="folder of the tokenizer")
    add("--tokens", required=True, help="the store that the generator has learned from")
    add("--data", default="fashion-mnist", help="pictures that the classifier learns from")
    add("--held-out", default="fashion-mnist-test", help="pictures to compare with")
    add("--size", type=int, default=32, help="side that pictures get")
    add("--count", type=int, default=1000, help="of pictures in each comparison")
    add("--steps", type=int, default=600, help="that the classifier learns for")
    add_sampling(parser)
    args = parser.parse_args(arguments)
    for name in ("size", "count", "steps", "batch"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
