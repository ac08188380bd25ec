"""Reconstructions from tokens that are nearly right, which pFID is measured on."""

import torch
from jaxtyping import Float
from torch import Tensor

from xq.models import Tokenizer
from xq.quantizers import Perturbed, Quantizer, Wrapper
from xq.quantizers.sharing import sharing

_SEED = 2503


def full_strength(progress: float) -> float:
    """The perturbation does not weaken."""
    return 1.0


def perturbation(text: str) -> tuple[float, int]:
    """ALPHA,DELTA as they stand on a command line."""
    alpha, delta = text.split(",")
    return float(alpha), int(delta)


class PerturbedTokens:
    """Replaces tokens as RobustTok does in training (Qiu et al. 2025), in every image.

    Each image has its own random numbers, whatever batch it is in.

    Args:
        tokenizer: With one code a token, of a quantizer that finds near codes, such as `VQ`.
        alpha: Probability that a token is replaced, 0 to 1.
        delta: By one of how many codes, those nearest to its vector.

    Raises:
        ValueError: If the tokenizer has other tokens, or a number lies outside its range.
    """

    def __init__(self, tokenizer: Tokenizer, alpha: float, delta: int) -> None:
        self.tokenizer = tokenizer
        self.name = f"perturbed, alpha {alpha:g}, delta {delta}"
        self.generator = torch.Generator(next(tokenizer.parameters()).device)
        self.quantizer = self._around(tokenizer.quantizer, alpha, delta)

    def _around(self, quantizer: Quantizer | Wrapper, alpha: float, delta: int) -> Wrapper:
        if isinstance(quantizer, Wrapper):
            return sharing(quantizer, quantizer=self._around(quantizer.quantizer, alpha, delta))
        # itself in training mode, the quantizer as it was, which learns nothing then
        return Perturbed(
            quantizer,
            delta,
            alpha=alpha,
            beta=1.0,
            schedule=full_strength,
            generator=self.generator,
        )

    def reconstruct(self, z: Float[Tensor, "b ..."], rows: range) -> Float[Tensor, "b c h w"]:
        """Images from perturbed tokens.

        Args:
            z: What the encoder made of the images.
            rows: Their places in the data set.
        """
        drawn = []
        for one, row in zip(z.split(1), rows, strict=True):
            self.generator.manual_seed(_SEED + row)
            # without gradients nothing is perturbed
            with torch.enable_grad():
                drawn.append(self.quantizer(one.detach()).indices)
        return self.tokenizer.decode(torch.cat(drawn))
