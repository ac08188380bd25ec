"""What reconstructions are worth: sums over pictures, and networks that look at them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from common.data import to_float
from common.fidelity import (
    FeatureFile,
    Inception,
    InceptionScore,
    distances,
    load_inception,
    note,
)
from xq.distributed import all_reduce_sum_
from xq.losses import LPIPS, Teacher, TimmTeacher
from xq.metrics import FeatureMoments, FrechetDistance, psnr, ssim

PAIRED_NOTES = {
    "psnr": "reconstructions rounded to bytes, RGB, range 255; of each picture, then the mean",
    "ssim": "bytes, range 255, Gaussian window of 11 x 11, mean over RGB; of each picture, then "
    "the mean",
}


class Networks(NamedTuple):
    """What looks at pictures; None for what was not asked for.

    Attributes:
        lpips: For pairs.
        teacher: Any network of timm, for a Frechet distance between sets.
        teacher_name: What it is called.
        inception: torch-fidelity's.
    """

    lpips: LPIPS | None = None
    teacher: Teacher | None = None
    teacher_name: str = ""
    inception: Inception | None = None


def load_networks(args: argparse.Namespace, device: torch.device) -> Networks:
    """Those that the command of `evaluate.py` asks for.

    Raises:
        OSError: If a file is missing, or cannot be downloaded.
        ValueError: If a name is unknown, or a file does not fit.
    """
    lpips = teacher = inception = None
    if args.lpips:
        lpips = LPIPS(args.lpips, weights=args.lpips_weights, heads=args.lpips_heads).to(device)
    if args.timm:
        teacher = TimmTeacher(args.timm, weights=args.timm_weights).to(device)
    if args.inception:
        inception = Inception(load_inception(args.inception, device), device)
    return Networks(lpips, teacher, args.timm or "", inception)


class Seen(NamedTuple):
    """Features of a batch: those that are Gaussian for a distance, and logits of classes."""

    features: dict[str, Float[Tensor, "b _"]]
    logits: Float[Tensor, "b classes"] | None


class Reference:
    """The set that others are compared with.

    Args:
        networks: That look at it.
        count: How many pictures it has.
        folder: For a file of features, where one is needed.
        fid: What a Frechet distance over Inception's features is called here, "rfid" or "gfid".
        device: Where sums are.
    """

    def __init__(
        self, networks: Networks, count: int, folder: Path, fid: str, device: torch.device
    ) -> None:
        self.networks, self.count, self.folder, self.fid = networks, count, folder, fid
        self.device = device
        dims = {}
        if networks.teacher:
            dims[f"fd_{networks.teacher_name}"] = networks.teacher.token_dim
        if networks.inception:
            dims[fid] = networks.inception.dim
        self.moments = {name: FeatureMoments(dim).to(device) for name, dim in dims.items()}
        self.file = self.new_file("reference", count)

    def new_file(self, name: str, count: int) -> FeatureFile | None:
        """A file for Inception's features, if it looks at all."""
        inception = self.networks.inception
        return FeatureFile(self.folder / name, count, inception.dim) if inception else None

    @torch.no_grad()
    def see(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Seen:
        """What the networks see in pictures, of which there may be none."""
        pixels, count = pixels.to(self.device), len(pixels)
        # a network has no shape for an empty batch
        pixels = pixels if count else pixels.new_zeros(1, *pixels.shape[1:])
        features, logits = {}, None
        if self.networks.teacher:
            tokens = self.networks.teacher(to_float(pixels)).token
            features[f"fd_{self.networks.teacher_name}"] = tokens[:count]
        if self.networks.inception:
            pooled, logits = (x[:count] for x in self.networks.inception(pixels))
            features[self.fid] = pooled
        return Seen(features, logits)

    def update(self, pixels: UInt8[Tensor, "b 3 h w"]) -> None:
        """Adds this process's part of a batch."""
        seen = self.see(pixels)
        for name, moments in self.moments.items():
            moments.update(seen.features[name])
        if self.file:
            self.file.append(seen.features[self.fid])

    def notes(self, count: int) -> dict[str, str]:
        """How each network is fed."""
        found = {}
        if self.networks.lpips:
            found["lpips"] = f"bytes to [-1, 1], LPIPS 0.1 with {self.networks.lpips.net}; the mean"
        if teacher := self.networks.teacher:
            size, name = teacher.size, self.networks.teacher_name
            found[f"fd_{name}"] = (
                f"bytes, bicubic to {size} x {size} with antialiasing, mean and deviation of "
                f"timm's {name}, its pooled features; comparable within this table, it is no FID"
            )
        if self.networks.inception:
            found[f"{self.fid}, is, kid, precision, recall"] = note(count, self.count)
        return found


class Scores:
    """Sums over one set of pictures, compared with the reference.

    Args:
        name: Of the set.
        reference: What it is compared with.
        count: How many pictures it has.
    """

    def __init__(self, name: str, reference: Reference, count: int) -> None:
        self.name, self.reference = name, reference
        self.sums: dict[str, Tensor] = {}
        self.pictures = torch.zeros((), dtype=torch.float64, device=reference.device)
        self.distances = {
            each: FrechetDistance(moments.dim, reference=moments).to(reference.device)
            for each, moments in reference.moments.items()
        }
        inception = reference.networks.inception
        self.score = InceptionScore(count, inception) if inception else None
        self.file = reference.new_file(name.replace(" ", "_"), count)
        self.pairs: dict[str, Callable[[Any, Any], Tensor]] = {"psnr": each_psnr, "ssim": each_ssim}
        if lpips := reference.networks.lpips:
            self.pairs["lpips"] = lambda made, pixels: lpips.distances(
                to_float(made), to_float(pixels)
            )

    @torch.no_grad()
    def compare(
        self, made: UInt8[Tensor, "b 3 h w"], pixels: UInt8[Tensor, "b 3 h w"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Adds reconstructions beside their pictures; what each of them is worth."""
        values = {}
        for name, measure in self.pairs.items():
            found = measure(made, pixels) if len(made) else self.pictures.new_zeros(0)
            values[name] = found
            self.sums[name] = self.sums.get(name, 0) + found.double().sum()
        self.pictures += len(made)
        return values

    def update(self, made: UInt8[Tensor, "b 3 h w"], rows: range) -> None:
        """Shows the networks this process's part of a batch."""
        seen = self.reference.see(made)
        for name, distance in self.distances.items():
            distance.made.update(seen.features[name])
        if self.score and self.file and seen.logits is not None:
            self.score.update(seen.logits, rows)
            self.file.append(seen.features[self.reference.fid])

    def compute(self) -> dict[str, float]:
        """All numbers, over all processes; those of files on the first one alone."""
        found, pictures = {}, self.pictures.clone()
        sums = {name: total.clone() for name, total in self.sums.items()}
        all_reduce_sum_([pictures, *sums.values()])
        found |= {name: (total / pictures).item() for name, total in sums.items()}
        found |= {name: one.compute().item() for name, one in self.distances.items()}
        if self.score and self.file and self.reference.file:
            found |= self.score.compute()
            found |= distances(self.file, self.reference.file)
        return found


def each_psnr(made: UInt8[Tensor, "b 3 h w"], pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
    """Of each picture."""
    pairs = zip(made.double(), pixels.double(), strict=True)
    return torch.stack([psnr(one, other, 255.0) for one, other in pairs])


def each_ssim(made: UInt8[Tensor, "b 3 h w"], pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
    """Of each picture."""
    return ssim(made, pixels, 255.0)
