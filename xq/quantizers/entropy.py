"""Entropies of a soft assignment to all 2^d sign codes, exact and factorised.

With the log-odds `a` of each bit, the softmax over the 2^d codes is a product over bits. So the
entropy of one token is a sum of d binary entropies, and the mean distribution over tokens is one
matrix product of two tables of 2^(d/2) probabilities a token. Nothing of 2^d x tokens is ever made.
Equals the full softmax of MAGVIT-v2 (Yu et al. 2024, section 3.1) and BSQ (Zhao et al. 2024,
section 3.3), without their additive epsilons. Everything is in nats.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xq.distributed import sum_over_processes
from xq.quantizers.bits import indices_to_signs
from xq.quantizers.constants import constant

# 2^24 probabilities take 64 MiB; beyond, ask for groups
MAX_GROUP = 24
# a bit at these log-odds is certain to 40 digits, and its entropy is below them
_CERTAIN = 100.0


class CodeEntropy(NamedTuple):
    """Entropies in nats, summed over groups of bits.

    Attributes:
        per_token: Mean entropy of a token's own distribution; low when tokens are certain.
        batch: Entropy of the mean distribution; high when all codes are used alike.
        maximum: The largest value of either: d ln 2.
    """

    per_token: Float[Tensor, ""]
    batch: Float[Tensor, ""]
    maximum: float

    def penalty(self) -> Float[Tensor, ""]:
        """`per_token - batch` lifted by `maximum`, so at least zero, with the same gradient."""
        return self.per_token + (self.maximum - self.batch)


def sign_entropy(
    logits: Float[Tensor, "*batch dim"],
    group_size: int | None = None,
    *,
    across_processes: bool = True,
) -> CodeEntropy:
    """Per-token and batch entropy over the 2^dim sign codes.

    Args:
        logits: Log-odds of each bit being positive.
        group_size: Bits whose joint distribution is kept; `dim` (exact) by default. With smaller
            groups, which must divide `dim`, the batch entropy is the sum over groups: an upper
            bound of the exact one, equal to it where groups are independent (BSQ, equation 9).
        across_processes: Whether the batch is that of all processes, with gradient, at the price of
            a reduction; otherwise it is that of this one.

    Raises:
        ValueError: If `group_size` does not divide `dim`, or exceeds 24.

    Examples:
        >>> entropy = sign_entropy(torch.randn(1000, 12))
        >>> bool(entropy.per_token < entropy.batch < entropy.maximum)
        True
    """
    dim = logits.shape[-1]
    size = check_group_size(dim, group_size)
    logits = logits.reshape(-1, dim).clamp(-_CERTAIN, _CERTAIN)
    maximum = dim * math.log(2)
    per_token = _binary_entropy(logits).sum() / max(len(logits), 1)
    tokens = logits.new_ones(len(logits)).sum()
    mass = torch.cat([_code_mass(group) for group in logits.split(size, dim=-1)])
    batch = batch_entropy(mass, tokens, 2.0**-size, maximum, across_processes=across_processes)
    return CodeEntropy(per_token, batch, maximum)


def batch_entropy(
    mass: Float[Tensor, " codes"],
    tokens: Float[Tensor, ""],
    even: float,
    maximum: float,
    *,
    across_processes: bool,
) -> Float[Tensor, ""]:
    """Entropy of the mean distribution over tokens, summed over groups of codes.

    Args:
        mass: Each code's probability summed over tokens.
        tokens: How many there are.
        even: The probability of a code where all are used alike.
        maximum: The entropy then.
        across_processes: Whether mass and tokens are summed over all processes.
    """
    sums = torch.cat([mass, tokens[None]])
    if across_processes:
        # a process without tokens still takes part
        sums = sum_over_processes(sums)
    mean, tokens = sums[:-1] / sums[-1].clamp(min=1), sums[-1]
    # as a divergence from even use, whose terms and gradients vanish there instead of cancelling; a
    # code without mass adds no logarithm, whose floor keeps its gradient finite
    surplus = (mean / even).clamp(min=torch.finfo(mean.dtype).tiny).log()
    batch = maximum - (mean * surplus - mean + even).sum()
    # no tokens anywhere: nothing to regularize, still connected to the graph
    return batch.where(tokens > 0, maximum)


def check_group_size(dim: int, group_size: int | None) -> int:
    """The number of bits in a group, checked."""
    size = dim if group_size is None else group_size
    if size < 1 or dim % size:
        raise ValueError(f"group_size={size} must divide dim={dim}")
    if size > MAX_GROUP:
        raise ValueError(
            f"the entropy over 2**{size} codes is too large; "
            f"pass group_size, a divisor of {dim} up to {MAX_GROUP}"
        )
    return size


def entropy_in_bits(entropy: CodeEntropy) -> dict[str, float]:
    """For logs: both entropies in bits and as a share of the maximum (reads them, so it waits).

    Args:
        entropy: Such as `lfq.entropy(lfq.bound(x))`.

    Examples:
        >>> lfq = LFQ(12)
        >>> sorted(entropy_in_bits(lfq.entropy(torch.randn(100, 12))))
        ['batch_bits', 'batch_share', 'per_token_bits', 'per_token_share']
    """
    per_token, batch = entropy.per_token.item(), entropy.batch.item()
    return {
        "per_token_bits": per_token / math.log(2),
        "per_token_share": per_token / entropy.maximum,
        "batch_bits": batch / math.log(2),
        "batch_share": batch / entropy.maximum,
    }


def _binary_entropy(logits: Tensor) -> Tensor:
    """Of a bit with these log-odds; no logarithm of a probability, nothing that cancels."""
    certainty = logits.abs()
    return F.softplus(-certainty) + certainty * (-certainty).sigmoid()


def _code_mass(logits: Float[Tensor, "n bits"]) -> Float[Tensor, " codes"]:
    """The summed probability of each sign pattern over tokens, bit 0 lowest."""
    half = logits.shape[1] // 2
    low, high = _joint(logits[:, :half]), _joint(logits[:, half:])
    return (high.t() @ low).reshape(-1)


def _joint(logits: Float[Tensor, "n bits"]) -> Float[Tensor, "n codes"]:
    """Probabilities of all sign patterns, bit 0 lowest."""
    return (logits @ constant(_halved_signs, logits.shape[1], like=logits).t()).softmax(-1)


def _halved_signs(bits: int, **options: Any) -> Float[Tensor, "codes {bits}"]:
    codes = torch.arange(2**bits, device=options["device"])
    return indices_to_signs(codes, bits).to(**options) - 0.5
