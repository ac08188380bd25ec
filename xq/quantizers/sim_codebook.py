"""Codes that a linear map makes of fixed random vectors."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.quantizers.codebook import Codebook


class SimCodebook(Codebook):
    """Fixed random vectors through one learned linear map (SimVQ, Zhu et al. 2024, section 4).

    All codes move together whenever one is chosen, so none is left behind. The vectors are drawn
    from a normal distribution of variance 1 / dim and saved with the map, which has no bias.

    Args:
        codebook_size: Number of codes.
        dim: Their length.

    Raises:
        ValueError: If either is below 1.

    Examples:
        >>> vq = VQ(8, 512, codebook=SimCodebook)
        >>> vq(torch.randn(2, 64, 8)).indices.shape
        torch.Size([2, 64])
    """

    basis: Tensor

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, dim)
        self.register_buffer("basis", torch.empty(codebook_size, dim))
        self.transform = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new vectors and a new map."""
        nn.init.normal_(self.basis, std=self.dim**-0.5)
        self.transform.reset_parameters()

    def codes(self) -> Float[Tensor, "codebook_size dim"]:
        return self.transform(self.basis)

    def freeze(self, codes: Shaped[Tensor, "..."] | None = None) -> None:
        if codes is not None:
            raise ValueError(
                "SimCodebook moves all codes at once, so it cannot keep some: freeze() keeps all"
            )
        super().freeze()
        self.transform.requires_grad_(False)

    def unfreeze(self) -> None:
        super().unfreeze()
        self.transform.requires_grad_(True)
