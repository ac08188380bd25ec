"""The losses of a quantizer, for those that are not made of `xq.quantizers`."""

import math
from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.precision import float32_island, widen
from xq.quantizers.base import fit
from xq.quantizers.entropy import CodeEntropy, batch_entropy

# below the logarithm of any probability that float64 can hold
_NEVER = -1e3


def codebook_loss(
    u: Shaped[Tensor, "..."],
    z: Shaped[Tensor, "..."],
    keep: Shaped[Tensor, "..."] | None = None,
    *,
    commitment: float = 0.25,
    codebook: float = 1.0,
) -> Float[Tensor, ""]:
    """What moves vectors and codes towards each other (van den Oord et al. 2017, equation 3).

    The quantizers of this library return it: it is `losses.total()` without the regularizer.

    Args:
        u: What was quantized.
        z: The codes as looked up, before gradients are let through: `u + (z - u).detach()` would
            give the gradient of the codebook to `u`.
        keep: Samples (first axis) that count; all by default.
        commitment: Weight of the term that moves `u`; beta in the paper.
        codebook: Weight of the term that moves `z`.

    Raises:
        ValueError: If shapes differ, or numbers are no floats.

    Examples:
        >>> u, codes = torch.randn(8, 4), torch.randn(16, 4)
        >>> loss = codebook_loss(u, codes[nearest(u, codes)])
    """
    if u.shape != z.shape or not (u.is_floating_point() and z.is_floating_point()):
        raise ValueError(
            f"codebook_loss expects vectors and their codes as floats of one shape, got {u.dtype} "
            f"of {tuple(u.shape)} and {z.dtype} of {tuple(z.shape)}"
        )
    if keep is not None and keep.shape != u.shape[:1]:
        raise ValueError(
            f"codebook_loss expects keep with one value a sample, shape ({len(u)},), "
            f"got {tuple(keep.shape)}"
        )
    with float32_island(u.device.type):
        losses = fit(widen(u), widen(z), keep)
    return losses.total(commitment=commitment, codebook=codebook)


class CodebookLoss(nn.Module):
    """`codebook_loss` with its weights.

    Args:
        commitment: Weight of the term that moves what was quantized.
        codebook: Weight of the term that moves its codes; 0.0 where averages do (EMA).
    """

    def __init__(self, commitment: float = 0.25, codebook: float = 1.0) -> None:
        super().__init__()
        self.commitment, self.codebook = commitment, codebook

    def forward(
        self,
        u: Shaped[Tensor, "..."],
        z: Shaped[Tensor, "..."],
        keep: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        return codebook_loss(u, z, keep, commitment=self.commitment, codebook=self.codebook)

    def extra_repr(self) -> str:
        return f"commitment={self.commitment}, codebook={self.codebook}"


def code_entropy(
    logits: Float[Tensor, "*batch codes"], *, across_processes: bool = True
) -> CodeEntropy:
    """Entropies of the softmax of `logits` over all codes; -inf for a code that is left out.

    Args:
        logits: Scores of each code, such as minus a squared distance over a temperature.
        across_processes: Whether the batch is that of all processes, with gradient, at the price of
            a reduction; otherwise it is that of this one.
    """
    codes = logits.shape[-1]
    log_p = logits.reshape(-1, codes).log_softmax(-1)
    p, maximum = log_p.exp(), math.log(codes)
    per_token = -(p * log_p.clamp(min=_NEVER)).sum() / max(len(p), 1)
    tokens = p.new_ones(len(p)).sum()
    batch = batch_entropy(p.sum(0), tokens, 1 / codes, maximum, across_processes=across_processes)
    return CodeEntropy(per_token, batch, maximum)


def entropy_loss(
    logits: Shaped[Tensor, "..."],
    entropy: Callable[[Tensor], CodeEntropy] = code_entropy,
    *,
    per_token: float = 1.0,
    batch: float = 1.0,
) -> Float[Tensor, ""]:
    """Low where tokens are certain of their code and all codes are used alike, zero at best.

    The entropy penalty of MAGVIT-v2 (Yu et al. 2024, section 3.1), in nats. With both weights 1 it
    is what the quantizers of this library return as `losses.regularizer`.

    Args:
        logits: What `entropy` takes, the last axis that of codes (or bits).
        entropy: `code_entropy` for a score for each code, `sign_entropy` for the log-odds of each
            bit, or the `entropy` of a quantizer, for what its `bound` returns.
        per_token: Weight of the mean entropy of a token.
        batch: Weight of what the entropy of the mean over tokens falls short of its maximum.

    Raises:
        ValueError: If `logits` are no floats, or have no axis of codes.

    Examples:
        >>> u, codes = torch.randn(8, 4), torch.randn(16, 4)
        >>> loss = entropy_loss(-torch.cdist(u, codes).square() / 0.1)
    """
    if not logits.is_floating_point() or logits.ndim == 0:
        raise ValueError(
            f"entropy_loss expects floats (..., codes), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    with float32_island(logits.device.type):
        found = entropy(widen(logits))
    return per_token * found.per_token + batch * (found.maximum - found.batch)


class EntropyLoss(nn.Module):
    """`entropy_loss` with its entropy and weights.

    Args:
        entropy: `code_entropy`, `sign_entropy` (with `functools.partial` for groups of bits), or
            the `entropy` of a quantizer.
        per_token: Weight of the mean entropy of a token.
        batch: Weight of what the entropy of the mean over tokens falls short of its maximum.
    """

    def __init__(
        self,
        entropy: Callable[[Tensor], CodeEntropy] = code_entropy,
        *,
        per_token: float = 1.0,
        batch: float = 1.0,
    ) -> None:
        super().__init__()
        self.entropy, self.per_token, self.batch = entropy, per_token, batch

    def forward(self, logits: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
        return entropy_loss(logits, self.entropy, per_token=self.per_token, batch=self.batch)

    def extra_repr(self) -> str:
        return f"per_token={self.per_token}, batch={self.batch}"
