"""Aligns one branch of a product to a frozen teacher, and looks whether it sees more than before.

python examples/align_features.py                          the demo's pictures, random teacher
python examples/align_features.py --data DIR --teacher tf_efficientnet_lite0 --weights FILE

Trains the same small tokenizer twice, without and with the loss. Then a crop of each held-out tile
looks for another, grey crop of the same tile among those of all tiles, by the mean code of the
branch; and its likeness to the others is correlated with what the teacher holds of it.
A teacher with random weights sees colours and edges: with it, the demo shows that the branch takes
after its teacher, not that this is of use.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from common.network import SmallDecoder, SmallEncoder
from common.views import VIEW, VIEWS, load_views
from jaxtyping import Float
from torch import Tensor, nn

from xq.losses import ContrastiveLoss, FeatureAlignment, Features, Teacher, TimmTeacher
from xq.quantizers import BSQ, ProductQuantizer

# channels of a branch, a bit each
DIM = 16


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains without and with alignment and prints what came of it; returns these numbers."""
    args = _parse(arguments)
    torch.manual_seed(args.seed)
    try:
        teacher = load_teacher(args)
        train, held_out = load_views(args.data, args.tile, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"teacher {args.teacher} with {'trained' if args.weights else 'random'} weights")
    # what the teacher sees of each view stays the same, so it is computed once
    features = see(teacher, train.flatten(0, 1))
    seen = [see(teacher, views).token for views in held_out.unbind(1)]
    results = {"teacher": {"retrieval": retrieval(*seen), "likeness": 1.0}}
    for name, weight in (("unaligned", 0.0), ("aligned", args.weight)):
        model, numbers = train_tokenizer(teacher, train, features, weight, args)
        codes = [branch_code(model, views) for views in held_out.unbind(1)]
        found = {"retrieval": retrieval(*codes), "likeness": likeness(codes[0], seen[0])}
        results[name] = {**numbers, **found}
        print(f"{name:<10}" + "".join(f"  {k} {v:.3f}" for k, v in results[name].items()))
    print(f"{'teacher':<10}  retrieval {results['teacher']['retrieval']:.3f}")
    print(f"by chance   retrieval {1 / len(held_out):.3f}  ({len(held_out)} held-out tiles)")
    return results


def train_tokenizer(
    teacher: Teacher,
    train: Float[Tensor, "n views 3 h w"],
    features: Features,
    weight: float,
    args: argparse.Namespace,
) -> tuple[nn.ModuleList, dict[str, float]]:
    """Reconstructs, and aligns the last branch with this weight; the losses at its end."""
    torch.manual_seed(args.seed)
    quantizer = ProductQuantizer([BSQ(DIM), BSQ(DIM)])
    encoder, decoder = SmallEncoder(2 * DIM, 32), SmallDecoder(2 * DIM, 32)
    # both start at zero, which has no direction on BSQ's sphere
    nn.init.xavier_uniform_(encoder.last.weight)
    alignment = FeatureAlignment(teacher, DIM, loss=ContrastiveLoss(0.1))
    model = nn.ModuleList([encoder, quantizer, decoder, alignment])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # the tokenizer works at half the resolution
    images = F.avg_pool2d(train.flatten(0, 1), 2)
    history: list[tuple[float, float]] = []
    for _ in range(args.steps):
        # one view of each of some tiles: two of one would not stand in contrast
        tiles = torch.randperm(len(train))[: args.batch]
        rows = tiles * VIEWS + torch.randint(VIEWS, tiles.shape)
        z, _, losses = quantizer(encoder(images[rows]))
        seen = Features(features.token[rows], features.patches[rows])
        aligned = alignment(seen, quantizer.split(z)[-1])
        error = F.mse_loss(decoder(z), images[rows])
        loss = error + 0.1 * losses.total() + weight * aligned
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((error.item(), aligned.item()))
    few = max(args.steps // 20, 1)
    first, last = (torch.tensor(part).mean(0).tolist() for part in (history[:few], history[-few:]))
    return model, {"error": last[0], "alignment at first": first[1], "at last": last[1]}


@torch.no_grad()
def branch_code(model: nn.ModuleList, views: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
    """The mean code of the last branch, over places."""
    encoder, quantizer, *_ = (cast(Any, part) for part in model)
    z = [quantizer(encoder(F.avg_pool2d(part, 2))).z for part in views.split(64)]
    return quantizer.split(torch.cat(z))[-1].mean((1, 2))


def see(teacher: Teacher, views: Float[Tensor, "n 3 h w"]) -> Features:
    """The teacher's features, some views at a time."""
    parts = zip(*(teacher(part) for part in views.split(64)), strict=True)
    return Features(*(torch.cat(part) for part in parts))


def retrieval(queries: Float[Tensor, "n dim"], others: Float[Tensor, "n dim"]) -> float:
    """Share of the queries whose nearest other, by angle from the mean, is their own."""
    queries, others = (F.normalize(x - x.mean(0), dim=-1) for x in (queries, others))
    nearest = (queries @ others.T).argmax(1)
    return (nearest == torch.arange(len(queries))).float().mean().item()


def likeness(codes: Float[Tensor, "n dim"], tokens: Float[Tensor, "n inner"]) -> float:
    """Correlation between what the branch and what the teacher hold of each pair of tiles."""
    pairs = torch.triu_indices(len(codes), len(codes), 1)
    units = (F.normalize(x - x.mean(0), dim=-1) for x in (codes, tokens))
    return torch.corrcoef(torch.stack([(x @ x.T)[*pairs] for x in units]))[0, 1].item()


def load_teacher(args: argparse.Namespace) -> Teacher:
    """A model of timm, with weights from a file, or with random ones."""
    if args.weights:
        return TimmTeacher(args.teacher, weights=args.weights, size=VIEW)
    return TimmTeacher(timm.create_model(args.teacher), size=VIEW)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="demo", help='"demo" or a folder of pictures')
    parser.add_argument("--teacher", default="resnet10t", help="a name of timm")
    parser.add_argument("--weights", type=Path, help="its weights; random ones by default")
    parser.add_argument("--weight", type=float, default=0.1, help="of the alignment in the loss")
    parser.add_argument("--tile", type=int, default=128, help="side of a tile, in pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
