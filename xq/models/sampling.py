"""What generators share: guidance, the filters of top-k and top-p, and seeded draws."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xq.precision import widen

# of uniform noise: at zero not even the only code that is left would win, at one any code at all
_LEAST, _MOST = 2.0**-25, 1 - 2.0**-24


def guided(
    conditional: Float[Tensor, "*batch codes"],
    unconditional: Float[Tensor, "*batch codes"],
    scale: float,
) -> Float[Tensor, "*batch codes"]:
    """Classifier-free guidance (Ho and Salimans 2022): `u + scale * (c - u)`, in float32.

    So 1 is the conditional prediction, bit for bit. What VAR calls cfg is `scale - 1`.
    """
    conditional, unconditional = widen(conditional), widen(unconditional)
    return conditional + (scale - 1) * (conditional - unconditional)


def growing_guidance(guidance: float, power: float, count: int) -> list[float]:
    """Weights of guidance for `count` tokens, from 1 towards `guidance` along half a cosine.

    `1 + (guidance - 1) * (1 - cos(pi * (t / count)**power)) / 2`, as RAR takes it over from MDT
    (Gao et al. 2023); the greater the power, the later it grows.

    Args:
        guidance: What it grows to.
        power: How late it grows, above 0.
        count: How many tokens.

    Raises:
        ValueError: If `power` is not positive.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"growing_guidance needs a power above 0, got {power}")
    shares = ((1 - math.cos(math.pi * (t / count) ** power)) / 2 for t in range(count))
    return [1 + (guidance - 1) * share for share in shares]


def filtered(
    logits: Float[Tensor, "*batch codes"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "*batch codes"]:
    """The logits in float32, minus infinity where a code is not to be drawn.

    What ties with the last code that stays, stays too.

    Args:
        logits: Of any length; a softmax makes them probabilities.
        top_k: Keeps so many most probable codes; all by default.
        top_p: Of these, keeps the most probable ones whose sum first reaches this share of their
            sum (Holtzman et al. 2020, nucleus sampling); all by default.
    """
    logits = widen(logits)
    count = logits.shape[-1]
    most, share = min(top_k or count, count), 1.0 if top_p is None else top_p
    if most == count and share == 1:
        return logits
    best = logits.topk(most, dim=-1, sorted=share < 1).values
    if share < 1:
        shares = best.softmax(-1)
        before = shares.cumsum(-1) - shares
        # sorted, so that what stays is a prefix, of at least one
        best = torch.where(before < share, best, best[..., :1])
    return logits.masked_fill(logits < best.amin(-1, keepdim=True), -torch.inf)


def draw(
    logits: Float[Tensor, "*batch codes"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*batch"]:
    """Draws an index from each row of logits; without waiting for the device, as multinomial does.

    Args:
        logits: As of `filtered`.
        temperature: What they are divided by before.
        top_k: As of `filtered`; with 1 the most probable code, and nothing is drawn.
        top_p: As of `filtered`.
        generator: On the device of the logits; torch's own by default.
    """
    logits = widen(logits)
    if top_k == 1:
        return logits.argmax(-1)
    scores = filtered(logits / temperature, top_k=top_k, top_p=top_p)
    # logarithms of uniform noise: exponential noise itself is slow to draw on a CPU
    noise = torch.empty_like(scores).uniform_(generator=generator).clamp_(_LEAST, _MOST)
    return scores.sub_(noise.log_().neg_().log_()).argmax(-1)


def check_sampling(
    owner: object,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Refuses what cannot be sampled with.

    Raises:
        ValueError: If a value lies outside its range.
    """
    name = type(owner).__name__
    if not 0 < guidance < float("inf"):
        raise ValueError(
            f"{name} needs a guidance above 0, got {guidance}; 1 is none, and what VAR calls cfg "
            "is guidance - 1"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"{name} needs a temperature above 0, got {temperature}; top_k=1 takes the most "
            "probable code"
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"{name} needs top_k to be a positive integer, got {top_k!r}; None keeps all codes"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{name} needs top_p above 0 and up to 1, got {top_p}; None keeps all")
