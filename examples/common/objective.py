"""Equation 6 of XQ-GAN: what the tokenizer minimises, and what the discriminator does."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from common.parts import coloured
from xq.losses import (
    LPIPS,
    Composite,
    CompositeLoss,
    DiffAug,
    DiscriminatorLoss,
    GeneratorLoss,
    LeCam,
    adaptive_weight,
    l1,
    l2,
    ramp,
)
from xq.models import Tokenizer
from xq.quantizers import DepthDropout
from xq.quantizers.base import Losses

PIXELS = {"l1": l1, "l2": l2}


class Learner(nn.Module):
    """All that learns with the tokenizer in one forward pass, as data parallelism wants it.

    Args:
        tokenizer: It.
        alignments: A `FeatureAlignment` by name.
        branches: The branch of each.
        dropout: Draws depths, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        alignments: nn.ModuleDict,
        branches: Mapping[str, int],
        dropout: DepthDropout | None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.alignments, self.dropout = tokenizer, alignments, dropout
        self.branches = dict(branches)

    def forward(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Tensor, Int[Tensor, "..."], Losses, dict[str, Tensor]]:
        """Reconstructions, indices, the quantizer's losses and those of the alignments."""
        depth = self.dropout(len(images), images.device) if self.dropout else None
        made, (z, indices, losses) = self.tokenizer(images, depth)
        split: Any = getattr(self.tokenizer.quantizer, "split", lambda z: (z,))
        # images whose last scales were dropped say nothing about the whole
        keep = self.dropout.is_full(depth) if self.dropout else None
        aligned = {
            name: alignment(coloured(images), split(z)[self.branches[name]], keep)
            for name, alignment in self.alignments.items()
        }
        return made, indices, losses, aligned


class Judge(nn.Module):
    """Logits of real and of generated images in one forward pass.

    Args:
        discriminator: Which is asked.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


class Objective:
    """The weighted losses of both networks.

    Args:
        config: All settings.
        perceptual: LPIPS, or None.
        judge: The discriminator as it learns, or None.
        discriminator_start: The first step that asks it.
    """

    def __init__(
        self, config: Any, perceptual: LPIPS | None, judge: Judge | None, discriminator_start: int
    ) -> None:
        loss, settings = config.loss, config.discriminator
        if loss.pixels not in PIXELS:
            raise ValueError(f"loss.pixels is one of {', '.join(PIXELS)}; got {loss.pixels!r}")
        self.pixels, self.perceptual, self.judge = PIXELS[loss.pixels], perceptual, judge
        self.start, self.settings = discriminator_start, settings
        self.generator_loss = GeneratorLoss(settings.kind_of_loss)
        self.discriminator_loss = DiscriminatorLoss(settings.kind_of_loss)
        self.augment = DiffAug(settings.augment)
        self.lecam = LeCam()
        weights = {
            "reconstruction": loss.reconstruction,
            "perceptual": loss.perceptual,
            "commitment": loss.commitment,
            "codebook": loss.codebook,
            "regularizer": loss.regularizer,
            "adversarial": loss.adversarial if judge else 0.0,
            "semantic": config.semantic.weight,
            "detail": config.detail.weight,
        }
        self.composite = Composite(**weights)

    def judges(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.judge is not None and step >= self.start

    def of_tokenizer(
        self,
        images: Float[Tensor, "b c h w"],
        made: Float[Tensor, "b c h w"],
        losses: Losses,
        aligned: dict[str, Tensor],
        last_layer: Any,
        step: int,
    ) -> CompositeLoss:
        """What the tokenizer minimises."""
        reconstruction = self.pixels(made, images)
        perceptual: Any = 0.0
        if self.perceptual is not None:
            perceptual = self.perceptual(coloured(made), coloured(images))
        adversarial: Any = 0.0
        if self.judges(step) and self.composite.weights["adversarial"]:
            weights = self.composite.weights
            compared = weights["reconstruction"] * reconstruction
            compared = compared + weights["perceptual"] * perceptual
            adversarial = self._adversarial(made, compared, last_layer, step)
        return self.composite(
            reconstruction=reconstruction,
            perceptual=perceptual,
            commitment=losses.commitment,
            codebook=losses.codebook,
            regularizer=losses.regularizer,
            adversarial=adversarial,
            semantic=aligned.get("semantic", 0.0),
            detail=aligned.get("detail", 0.0),
        )

    def _adversarial(
        self, made: Tensor, compared: Tensor, last_layer: Any, step: int
    ) -> Float[Tensor, ""]:
        assert self.judge is not None
        self.judge.requires_grad_(False)
        found = self.generator_loss(self.judge.discriminator(self.augment(coloured(made))))
        self.judge.requires_grad_(True)
        if self.settings.adaptive:
            found = found * adaptive_weight(compared, found, last_layer)
        return found * ramp(step, self.start, self.settings.ramp)

    def of_discriminator(
        self, judge: nn.Module, images: Float[Tensor, "b c h w"], made: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """What the discriminator minimises, and what to log of it.

        Args:
            judge: `self.judge`, or what data parallelism made of it.
            images: Real ones.
            made: Generated ones, with or without a graph.
        """
        real, fake = judge(*(self.augment(coloured(x.detach())) for x in (images, made)))
        loss = self.discriminator_loss(real, fake)
        terms = {"discriminator": loss, "real": real.float().mean(), "fake": fake.float().mean()}
        if self.settings.lecam:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.settings.lecam * terms["lecam"]
        return loss, {name: value.detach() for name, value in terms.items()}
