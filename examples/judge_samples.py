"""How far sampled pictures are from real ones, beside a baseline that knows no dependencies.

python examples/judge_samples.py --generator runs/var/generator --tokenizer DIR --tokens STORE

A small classifier learns the classes from real pictures. Its features give a Frechet distance to
held-out pictures, and its answers the share of samples that look like their class. It is no FID.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common.data import to_float
from common.generators import load_generator
from common.network import SmallDecoder, SmallEncoder
from common.samples import find_samples, picture
from jaxtyping import Float, Int
from sample import add_sampling, sample
from torch import Tensor, nn

from xq.metrics import FrechetDistance
from xq.models import Tokenizer
from xq.token_store import TokenStore

FEATURES = 64
# side of the block means that are the other features
BLOCKS = 8


class Classifier(nn.Module):
    """Three convolutions, a mean, and a linear map."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, FEATURES)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(FEATURES, classes)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b features"]:
        """What the classes are read from."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        return self.last(self.features(images))


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


class Verdict(NamedTuple):
    """What is said of some pictures.

    Attributes:
        like_their_class: The share that the classifier takes for what they should be.
        frechet: Distance of the classifier's features from those of held-out pictures.
        pixels: Distance of the means of 8 x 8 blocks.
    """

    like_their_class: float
    frechet: float
    pixels: float


class Judge:
    """Compares pictures with held-out ones.

    Args:
        classifier: Gives features and classes.
        held_out: Pictures and labels.
        count: How many of them to compare with.
    """

    def __init__(self, classifier: Classifier, held_out: tuple[Tensor, Tensor], count: int) -> None:
        self.classifier, self.count = classifier, min(count, len(held_out[1]))
        chosen = torch.randperm(len(held_out[1]))[: self.count]
        self.references = self._features(held_out[0][chosen])

    def __call__(self, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]) -> Verdict:
        features = self._features(images)
        device = self.classifier.last.weight.device
        with torch.no_grad():
            found = self.classifier.last(features[0].to(device)).argmax(1).cpu()
        like = (found == labels).double().mean().item()
        return Verdict(like, *map(distance, features, self.references))

    @torch.no_grad()
    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = self.classifier.last.weight.device
        parts = [self.classifier.features(part.to(device)).cpu() for part in images.split(256)]
        return torch.cat(parts), F.adaptive_avg_pool2d(images.mean(1), BLOCKS).flatten(1)


def distance(made: Float[Tensor, "n dim"], real: Float[Tensor, "m dim"]) -> float:
    """The Frechet distance of two sets of features."""
    frechet = FrechetDistance(made.shape[1])
    frechet.made.update(made)
    frechet.reference.update(real)
    return float(frechet.compute())


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


def learned(
    data: tuple[Tensor, Tensor], classes: int, steps: int, device: torch.device
) -> Classifier:
    """A classifier, trained with flips."""
    images, labels = data
    classifier = Classifier(classes).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        batch = images[rows].to(device)
        flip = torch.rand(len(batch), 1, 1, 1, device=device) < 0.5
        batch = torch.where(flip, batch.flip(3), batch)
        loss = F.cross_entropy(classifier(batch), labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


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
