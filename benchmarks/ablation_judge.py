"""What a tokenizer of the ablation is worth on held-out pictures."""

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from examples.common.data import CROP, read, to_bytes, to_float
from xq.losses import LPIPS, TimmTeacher
from xq.metrics import CodebookUsage, FrechetDistance, psnr
from xq.models import Tokenizer

# pictures that are looked at in one piece are at most this large
LARGEST = 256
# in the networks at a time
_AT_A_TIME = 4
# pictures of which every step of a residual is shown
_PARTIALS = 16


class Networks(NamedTuple):
    """What looks at pictures, in training as in judging; None for what there are no weights of.

    Attributes:
        lpips: For pairs.
        teacher: For sets.
        crop_teacher: The same for crops of their own size, in the alignment.
        name: What timm calls the teacher.
        device: Where all of it happens.
    """

    lpips: LPIPS | None = None
    teacher: TimmTeacher | None = None
    crop_teacher: TimmTeacher | None = None
    name: str = ""
    device: str = "cpu"


class Judge:
    """Compares reconstructions with pictures.

    Args:
        paths: The pictures, of which squares of one size are cut.
        networks: That compare.
    """

    def __init__(self, paths: Sequence[Path], networks: Networks) -> None:
        self.device = networks.device
        self.pixels = squares([read(path) for path in paths]).to(self.device)
        self.networks = networks
        self.features = self._features(self.pixels)
        self.all = torch.arange(len(self.pixels))

    @property
    def side(self) -> int:
        """Of the squares."""
        return self.pixels.shape[-1]

    def some(self, count: int) -> Tensor:
        """Rows of so many squares, spread over all."""
        return torch.linspace(0, len(self.pixels) - 1, min(count, len(self.pixels))).long()

    def whole(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer for squares: a pyramid gets as many more tokens as these have crops."""
        times = self.side // CROP
        scales = tuple((h * times, w * times) for h, w in tokenizer.quantizer.grids)
        return tokenizer.with_scales(scales).eval() if scales else tokenizer.eval()

    @torch.no_grad()
    def __call__(self, tokenizer: Tokenizer, rows: Tensor) -> dict[str, Any]:
        """Means over these squares, and which codes they use."""
        tokenizer = self.whole(tokenizer)
        usage, made, bits = CodebookUsage.of(tokenizer.quantizer).to(self.device), [], 0.0
        for part in self.pixels[rows].split(_AT_A_TIME):
            indices = tokenizer.encode(to_float(part))
            usage.update(indices)
            made.append(to_bytes(tokenizer.decode(indices)))
            bits += indices.numel() * log2(tokenizer.quantizer.codebook_size)
        numbers = self.compared(torch.cat(made), rows)
        return numbers | used(usage) | {"bits": bits / len(rows)}

    @torch.no_grad()
    def compared(self, made: UInt8[Tensor, "n 3 h w"], rows: Tensor) -> dict[str, float | None]:
        """How far pictures are from these squares: dB, LPIPS, Frechet distance."""
        real = self.pixels[rows]
        pairs = list(zip(to_float(made).split(1), to_float(real).split(1), strict=True))
        found: dict[str, float | None] = {
            "psnr": sum(float(psnr(*pair)) for pair in pairs) / len(pairs),
            "lpips": None,
            "fd": None,
        }
        if self.networks.lpips:
            distances = [self.networks.lpips.distances(*pair) for pair in pairs]
            found["lpips"] = float(torch.cat(distances).mean())
        features = self._features(made)
        if features is not None and self.features is not None and len(rows) > 1:
            distance = FrechetDistance(features.shape[1]).to(self.device)
            distance.made.update(features)
            distance.reference.update(self.features[rows])
            found["fd"] = float(distance.compute())
        return found

    @torch.no_grad()
    def partials(self, tokenizer: Tokenizer) -> list[dict[str, float]]:
        """DB of some squares after each step or scale, and the bits until then."""
        tokenizer = self.whole(tokenizer)
        quantizer = tokenizer.quantizer
        if quantizer.depth == 1:
            return []
        images = to_float(self.pixels[self.some(_PARTIALS)])
        indices = tokenizer.encode(images)
        bits = indices[0].numel() * log2(quantizer.codebook_size)
        tokens = torch.tensor([h * w for h, w in quantizer.grids] or [1] * quantizer.depth)
        shares = (tokens.cumsum(0) / tokens.sum()).tolist()
        made = tokenizer.partials(indices, chunk=_AT_A_TIME)
        return [
            {"bits": bits * share, "psnr": _mean_psnr(part.clamp(-1, 1), images)}
            for share, part in zip(shares, made, strict=True)
        ]

    @torch.no_grad()
    def _features(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"] | None:
        teacher = self.networks.teacher
        if teacher is None:
            return None
        return torch.cat([teacher(to_float(part)).token for part in pixels.split(_AT_A_TIME)])


def squares(pictures: Sequence[UInt8[Tensor, "3 h w"]]) -> UInt8[Tensor, "n 3 side side"]:
    """Pictures cut into squares, of as many pixels as all have, but so small that there are two."""
    side = min(LARGEST, *(min(p.shape[1:]) // CROP * CROP for p in pictures))
    while True:
        cut = [p.unfold(1, side, side).unfold(2, side, side) for p in pictures]
        found = torch.cat([c.permute(1, 2, 0, 3, 4).flatten(0, 1) for c in cut])
        if len(found) > 1 or side == CROP:
            return found
        side = side // 2 // CROP * CROP


def used(usage: CodebookUsage) -> dict[str, float]:
    """Of each codebook, at all scales together: the share of its codes, and their perplexity."""
    counts = usage.counts.sum(0) if usage.grids else usage.counts
    counts = counts.reshape(-1, usage.codebook_size).double()
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return {
        "used": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp().mean()),
    }


def _mean_psnr(made: Tensor, images: Tensor) -> float:
    pairs = zip(made, images, strict=True)
    return sum(float(psnr(*pair)) for pair in pairs) / len(images)
