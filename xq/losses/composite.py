"""The weighted sum of a tokenizer's losses."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from xq.precision import widen


class CompositeLoss(NamedTuple):
    """A weighted sum and what it is made of.

    Attributes:
        total: The sum of weight times term.
        terms: Each term by name, without its weight and without gradient, for logs.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]


def composite(terms: Mapping[str, Any], weights: Mapping[str, Any]) -> CompositeLoss:
    """The weighted sum of named losses (Li et al. 2024, XQ-GAN, equation 6), in float32 or wider.

    Args:
        terms: A scalar for each weight, by name; at least one a tensor. A plain number stands for
            a term that is not computed now: 0.0 for the adversarial one before its start.
        weights: What each term is multiplied by. A term of weight 0.0 is logged, no more: it has
            no gradient, and does no harm where it is not finite.

    Raises:
        ValueError: If a term is missing, unknown, or no scalar.
    """
    _check_names(terms, weights)
    tensors = [term for term in terms.values() if isinstance(term, Tensor)]
    if not tensors:
        raise ValueError(f"composite needs a term that is a tensor, got {dict(terms)}")
    for name, term in terms.items():
        if isinstance(term, Tensor) and term.shape != ():
            raise ValueError(
                f"composite expects scalars, got {name} of shape {tuple(term.shape)}; take its mean"
            )
    total = widen(tensors[0].new_zeros(()))
    for name, weight in weights.items():
        if weight:
            total = total + weight * _widened(terms[name])
    return CompositeLoss(total, {name: _logged(terms[name], total) for name in weights})


class Composite(nn.Module):
    """`composite` with its weights, which are named as the terms will be.

    A weight that changes in training is a factor of its term, or is set anew:
    `loss.weights["adversarial"] = 0.1`.

    Args:
        weights: A finite number for each term.

    Raises:
        ValueError: If there is none, or one is not finite.

    Examples:
        >>> loss = Composite(reconstruction=1.0, quantizer=1.0, adversarial=0.5)
        >>> pixels, losses = torch.tensor(0.5), torch.tensor(0.25)
        >>> total, terms = loss(reconstruction=pixels, quantizer=losses, adversarial=0.0)
        >>> total, sorted(terms)
        (tensor(0.7500), ['adversarial', 'quantizer', 'reconstruction'])
    """

    def __init__(self, **weights: Any) -> None:
        super().__init__()
        if not weights:
            raise ValueError("Composite needs a weight for each term: Composite(perceptual=1.0)")
        for name, weight in weights.items():
            if isinstance(weight, Tensor) or not math.isfinite(weight):
                raise ValueError(
                    f"Composite needs finite numbers as weights, got {name}={weight!r}; "
                    "what is computed at each step is multiplied into the term"
                )
        self.weights = weights

    def forward(self, **terms: Any) -> CompositeLoss:
        """The weighted sum of these losses, one for each weight, and themselves.

        Raises:
            ValueError: If a term is missing, unknown, or no scalar.
        """
        return composite(terms, self.weights)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


def _check_names(terms: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    missing = [name for name in weights if name not in terms]
    if missing:
        raise ValueError(
            f"composite has a weight but no term for {', '.join(missing)}; "
            "pass 0.0 for a term that is not computed now"
        )
    unknown = [name for name in terms if name not in weights]
    if unknown:
        raise ValueError(
            f"composite has a term but no weight for {', '.join(unknown)}; the weights are for "
            f"{', '.join(weights)}, and with a weight of 0.0 a term is only logged"
        )


def _widened(term: Any) -> Any:
    return widen(term) if isinstance(term, Tensor) else term


def _logged(term: Any, like: Tensor) -> Float[Tensor, ""]:
    return term.detach() if isinstance(term, Tensor) else like.new_full((), term)
