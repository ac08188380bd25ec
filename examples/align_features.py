"""Aligns one branch of a product to a frozen teacher, and looks whether it sees more than before.

python examples/align_features.py                          demo pictures, a teacher of random weights
python examples/align_features.py --data DIR --teacher tf_efficientnet_lite0 --weights FILE
python examples/align_features.py --teacher vit_small_patch14_dinov2 ...     any model of timm

Trains the same small tokenizer twice, without and with the loss. Then a crop of each held-out tile
looks for the other crop of the same tile among those of all tiles, by the mean code of the branch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common.data import find_pictures, read, to_float
from common.network import SmallDecoder, SmallEncoder
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from xq.losses import ContrastiveLoss, FeatureAlignment, Features, Teacher, TimmTeacher
from xq.quantizers import BSQ, ProductQuantizer

# the teacher sees views of this side, the tokenizer has them at half of it
VIEW = 128
# views of each tile to train on
VIEWS = 4
DIM = 16


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains without and with alignment and prints what came of it; returns these numbers."""
    args = _parse(arguments)
    torch.manual_seed(args.seed)
    try:
        teacher = load_teacher(args)
        train, held_out = load_views(args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    kind = "trained" if args.weights else "random: what follows shows that it works, not that it is"
    print(f"teacher {args.teacher}, weights {kind}{'' if args.weights else ' of use'}")
    # what the teacher sees of each view stays the same, so it is computed once
    features = see(teacher, train.flatten(0, 1))
    found = {"teacher": retrieval(*(see(teacher, views).token for views in held_out.unbind(1)))}
    results = {"teacher": {"retrieval": found["teacher"]}}
    for name, weight in (("unaligned", 0.0), ("aligned", args.weight)):
        results[name] = train_tokenizer(teacher, train, features, held_out, weight, args)
        print(f"{name:<10}" + "".join(f"  {k} {v:.3f}" for k, v in results[name].items()))
    print(f"{'teacher':<10}  retrieval {found['teacher']:.3f}")
    print(f"by chance   retrieval {1 / len(held_out):.3f}  ({len(held_out)} held-out tiles)")
    return results


def train_tokenizer(
    teacher: Teacher,
    train: Float[Tensor, "n views 3 h w"],
    features: Features,
    held_out: Float[Tensor, "m 2 3 h w"],
    weight: float,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Reconstructs, and aligns the last branch with this weight; the numbers of its end."""
    torch.manual_seed(args.seed)
    quantizer = ProductQuantizer([BSQ(DIM), BSQ(DIM)])
    encoder, decoder = SmallEncoder(2 * DIM, 32), SmallDecoder(2 * DIM, 32)
    alignment = FeatureAlignment(teacher, DIM, loss=ContrastiveLoss(0.1))
    model = nn.ModuleList([encoder, quantizer, decoder, alignment])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
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
    codes = [branch_code(model, views) for views in held_out.unbind(1)]
    numbers = {"error": last[0], "alignment at first": first[1], "at last": last[1]}
    return {**numbers, "retrieval": retrieval(*codes)}


@torch.no_grad()
def branch_code(model: nn.ModuleList, views: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
    """The mean code of the last branch, over places."""
    encoder, quantizer, *_ = model
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


def load_teacher(args: argparse.Namespace) -> Teacher:
    """A model of timm, with weights from a file, or with random ones."""
    if args.weights:
        return TimmTeacher(args.teacher, weights=args.weights, size=VIEW)
    return TimmTeacher(timm.create_model(args.teacher), size=VIEW)


def load_views(
    args: argparse.Namespace,
) -> tuple[Float[Tensor, "n views 3 h w"], Float[Tensor, "m 2 3 h w"]]:
    """Random crops of tiles: several of each to train on, two of every fourth, held out."""
    paths = [path for part in find_pictures(args.data) for path in part]
    cut = [_tiles(read(path), args.tile) for path in paths]
    tiles = torch.cat(cut)
    held_out = torch.arange(len(tiles)) % 4 == 3
    if held_out.sum() < 2:
        raise ValueError(
            f"--data {args.data} has {len(tiles)} tiles of {args.tile} pixels, below 8"
        )
    random = np.random.default_rng(args.seed)
    train = torch.stack([_views(tile, VIEWS, random) for tile in tiles[~held_out]])
    return train, torch.stack([_views(tile, 2, random) for tile in tiles[held_out]])


def _tiles(picture: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "n 3 side side"]:
    height, width = (length // side for length in picture.shape[1:])
    whole = picture[:, : height * side, : width * side]
    return whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _views(tile: UInt8[Tensor, "3 h w"], count: int, random: np.random.Generator) -> Tensor:
    found = []
    for _ in range(count):
        side = int(random.integers(int(0.6 * tile.shape[1]), int(0.9 * tile.shape[1])))
        y, x = (random.integers(tile.shape[1] - side + 1) for _ in range(2))
        crop = to_float(tile[None, :, y : y + side, x : x + side])
        crop = crop.flip(3) if random.random() < 0.5 else crop
        found.append(F.interpolate(crop, size=VIEW, mode="bilinear", antialias=True)[0])
    return torch.stack(found)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="demo", help='"demo" or a folder of pictures')
    parser.add_argument("--teacher", default="resnet10t", help="a name of timm")
    parser.add_argument("--weights", type=Path, help="its weights; random ones by default")
    parser.add_argument("--weight", type=float, default=0.1, help="of the alignment in the loss")
    parser.add_argument("--tile", type=int, default=128, help="side of a tile, in pixels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
