"""Trains one case of the ablation: the network, the crops and the steps are those of all others."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.ablation_cases import Case
from benchmarks.ablation_judge import Judge, Networks
from examples.common.clock import learning_rate
from examples.common.data import CROP, Crops
from examples.common.network import make_network, start_at_pca_
from examples.common.quantizers import start_codes_
from xq.losses import (
    Composite,
    FeatureAlignment,
    PatchGAN,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    l2,
)
from xq.models import Tokenizer
from xq.quantizers import DepthDropout

# share of the steps after which the discriminator begins
_DISCRIMINATOR_START = 2 / 3
_DISCRIMINATOR_RATE = 5e-4


@dataclass(frozen=True)
class Settings:
    """What all cases share.

    Attributes:
        steps: Of training.
        batch: Crops of 64 x 64 a step.
        channels: Of the network's first convolution.
        points: When some pictures are looked at on the way; the first is before training.
        shown: How many pictures that are.
        start: Crops whose principal components, and whose codes, all begin with.
        perceived: Crops of a batch that LPIPS sees.
        perceptual: Weight of LPIPS, where there are weights for it.
        semantic: Weight of the alignment.
        adversarial: What the adaptive weight of the discriminator is multiplied by.
        kept: Share of the samples that quantizer dropout takes, and the fewest steps it leaves.
    """

    steps: int
    batch: int = 16
    channels: int = 32
    points: int = 2
    shown: int = 16
    start: int = 256
    perceived: int = 8
    perceptual: float = 0.1
    semantic: float = 0.1
    adversarial: float = 0.5
    kept: tuple[float, int] = (0.1, 3)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"kept": list(self.kept), "crop": CROP}


def trained(case: Case, settings: Settings, paths: Sequence[Path], judge: Judge) -> dict[str, Any]:
    """What came of one case, as JSON.

    Args:
        case: Which.
        settings: Of all.
        paths: Pictures to train on.
        judge: Looks at the held-out ones.
    """
    begun = time.perf_counter()
    torch.manual_seed(case.seed)
    crops = Crops(paths, case.seed)
    tokenizer = _started(case, settings, crops, judge.device)
    training = Training(case, settings, tokenizer, judge.networks)
    curve = []
    rows = judge.some(settings.shown)
    steps = settings.steps * case.times
    for step in range(steps):
        if step * settings.points % steps < settings.points:
            curve.append({"step": step, **judge(tokenizer, rows)})
        training.step(crops.batch(settings.batch).to(judge.device), step / steps)
    curve.append({"step": steps, **judge(tokenizer, rows)})
    found = {
        "name": case.name,
        "family": case.family,
        "codes": case.codes,
        "variant_of": case.variant_of,
        "seed": case.seed,
        **judge(tokenizer, judge.all),
        "curve": curve,
        "partials": judge.partials(tokenizer),
    }
    return found | {"seconds": time.perf_counter() - begun}


class Training:
    """The optimizers and losses of one case.

    Args:
        case: Which.
        settings: Of all.
        tokenizer: Is trained.
        networks: Take part in it.
    """

    def __init__(
        self, case: Case, settings: Settings, tokenizer: Tokenizer, networks: Networks
    ) -> None:
        self.case, self.settings, self.done = case, settings, 0
        self.tokenizer: Any = tokenizer
        self.lpips = networks.lpips
        share, fewest = settings.kept
        depth = tokenizer.quantizer.depth
        self.dropout = DepthDropout(depth, share, fewest) if case.dropout else None
        self.alignment = _alignment(case, tokenizer, networks)
        learning = [tokenizer, self.alignment] if self.alignment else [tokenizer]
        parameters = nn.ModuleList(learning).parameters()
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-4)
        if case.discriminator:
            patches = PatchGAN(channels=32, depth=2, norm="group")
            self.discriminator = patches.to(networks.device)
            self.opponent = torch.optim.AdamW(
                self.discriminator.parameters(), lr=_DISCRIMINATOR_RATE, betas=(0.5, 0.9)
            )
        self.composite = Composite(
            reconstruction=1.0,
            perceptual=settings.perceptual,
            codebook=1.0,
            semantic=settings.semantic,
            adversarial=settings.adversarial,
        )

    def step(self, images: Float[Tensor, "b 3 h w"], progress: float) -> None:
        """One of the tokenizer, and of the discriminator once it takes part."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.case.training.lr, self.done, progress)
        self.done += 1
        self.tokenizer.train()
        judged = self.case.discriminator and progress >= _DISCRIMINATOR_START
        loss, made = self._loss(images, judged)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        self.optimizer.step()
        if judged:
            self._learn_to_judge(images, made)

    def _loss(self, images: Tensor, judged: bool) -> tuple[Tensor, Tensor]:
        depth = self.dropout(len(images), images.device) if self.dropout else None
        made, (z, _, losses) = self.tokenizer(images, depth)
        reconstruction = l2(made, images)
        seen = slice(self.settings.perceived)
        perceptual: Any = self.lpips(made[seen], images[seen]) if self.lpips else 0.0
        semantic: Any = 0.0
        if self.alignment:
            *_, last = self.tokenizer.quantizer.split(z)
            semantic = self.alignment(images, last)
        adversarial: Any = 0.0
        if judged:
            adversarial = generator_loss(self.discriminator(made))
            compared = reconstruction + self.settings.perceptual * perceptual
            layer = self.tokenizer.decoder.parts["cnn"].last.weight
            adversarial = adversarial * adaptive_weight(compared, adversarial, layer)
        total, _ = self.composite(
            reconstruction=reconstruction,
            perceptual=perceptual,
            codebook=losses.total(**self.case.training.weights),
            semantic=semantic,
            adversarial=adversarial,
        )
        return total, made.detach()

    def _learn_to_judge(self, images: Tensor, made: Tensor) -> None:
        loss = discriminator_loss(self.discriminator(images), self.discriminator(made))
        self.opponent.zero_grad(set_to_none=True)
        loss.backward()
        self.opponent.step()


def _started(case: Case, settings: Settings, crops: Crops, device: torch.device | str) -> Tokenizer:
    """A tokenizer at the principal components, its codes set by k-means."""
    quantizer = case.make()
    encoder, decoder = make_network(quantizer.dim, settings.channels)
    start_at_pca_(
        encoder,
        decoder,
        crops.batch(settings.start),
        branches=getattr(quantizer, "P", 1),
        whiten=case.training.whiten,
        rotate=case.training.rotate,
    )
    tokenizer = Tokenizer(encoder, quantizer, decoder).to(device)
    start_codes_(tokenizer, crops.batch(settings.start).to(device))
    return tokenizer


def _alignment(case: Case, tokenizer: Any, networks: Networks) -> FeatureAlignment | None:
    """Of the last branch, to what the teacher sees in crops of their own size."""
    if not case.alignment:
        return None
    assert networks.crop_teacher is not None
    found = FeatureAlignment(networks.crop_teacher, tokenizer.quantizer.dims[-1])
    return found.to(networks.device)
