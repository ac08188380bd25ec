"""What a discriminator and a generator minimise, as functions of logits.

High logits mean real. Logits come in any shape, such as one an image or a map of patches, and count
alike: each loss is a mean over those of this process.
"""

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.losses.logits import check_logits
from xq.precision import widen

KINDS = ("hinge", "vanilla", "non_saturating")


def discriminator_loss(
    real: Shaped[Tensor, "..."], fake: Shaped[Tensor, "..."], kind: str = "hinge"
) -> Float[Tensor, ""]:
    """Half the errors on real and half those on generated images.

    * "hinge": `relu(1 - real)` and `relu(1 + fake)` (Lim and Ye 2017).
    * "vanilla", "non_saturating": `-log sigmoid(real)` and `-log(1 - sigmoid(fake))` (Goodfellow et
      al. 2014, equation 1). The two differ in the generator alone.

    The half is VQGAN's. In float32 whatever the logits are.

    Args:
        real: Logits of real images.
        fake: Logits of generated images, which were detached before the discriminator.
        kind: One of the above.

    Raises:
        ValueError: If `kind` is unknown or the logits are none.
    """
    _check_kind("discriminator_loss", kind)
    check_logits("discriminator_loss", real=real, fake=fake)
    real, fake = widen(real), widen(fake)
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake: Shaped[Tensor, "..."], kind: str = "hinge") -> Float[Tensor, ""]:
    """How far generated images are from being taken for real.

    * "hinge": `-fake`, of constant gradient.
    * "non_saturating": `-log sigmoid(fake)` (Goodfellow et al. 2014, section 3).
    * "vanilla": `log(1 - sigmoid(fake))` (equation 1 there), whose gradient vanishes where the
      discriminator is sure, so it is good for comparisons.

    VQGAN's generator minimises `-fake` with a vanilla discriminator, too: take "hinge" here then.
    In float32 whatever the logits are.

    Args:
        fake: Logits of generated images, with the graph that leads to the generator.
        kind: One of the above.

    Raises:
        ValueError: If `kind` is unknown or the logits are none.
    """
    _check_kind("generator_loss", kind)
    check_logits("generator_loss", fake=fake)
    fake = widen(fake)
    if kind == "hinge":
        return -fake.mean()
    if kind == "vanilla":
        return -F.softplus(fake).mean()
    return F.softplus(-fake).mean()


class _OfAKind(nn.Module):
    def __init__(self, kind: str = "hinge") -> None:
        super().__init__()
        _check_kind(type(self).__name__, kind)
        self.kind = kind

    def config(self) -> dict[str, str]:
        """The constructor's arguments, ready for JSON."""
        return {"kind": self.kind}

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class DiscriminatorLoss(_OfAKind):
    """`discriminator_loss` of one kind.

    Args:
        kind: "hinge", "vanilla" or "non_saturating".

    Raises:
        ValueError: If `kind` is unknown.

    Examples:
        >>> DiscriminatorLoss("hinge")(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, -2.0]))
        tensor(0.1250)
    """

    def forward(
        self, real: Shaped[Tensor, "..."], fake: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        return discriminator_loss(real, fake, self.kind)


class GeneratorLoss(_OfAKind):
    """`generator_loss` of one kind.

    Args:
        kind: "hinge", "vanilla" or "non_saturating".

    Raises:
        ValueError: If `kind` is unknown.

    Examples:
        >>> GeneratorLoss("hinge")(torch.tensor([2.0, 0.5]))
        tensor(-1.2500)
    """

    def forward(self, fake: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
        return generator_loss(fake, self.kind)


def _check_kind(name: str, kind: str) -> None:
    if kind not in KINDS:
        names = ", ".join(repr(known) for known in KINDS)
        raise ValueError(f"{name} has the kinds {names}, got {kind!r}")
