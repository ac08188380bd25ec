"""Projected: codes in a space of fewer dimensions than the features."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from xq.quantizers.base import Quantizer
from xq.quantizers.masked import Masked
from xq.quantizers.wrapper import Wrapper


class Projected(Wrapper):
    """Linear in, quantize, linear out (ViT-VQGAN's low-dimensional codes, Yu et al. 2022).

    Args:
        quantizer: A quantizer, or another wrapper.
        dim: Channels of the input and of `z`.

    Raises:
        ValueError: If `dim` is below 1, or a `Masked` stands within.

    Examples:
        >>> quantizer = Projected(VQ(8, 1024, normalize=True), 256)
        >>> quantizer(torch.randn(2, 64, 256)).z.shape
        torch.Size([2, 64, 256])
    """

    def __init__(self, quantizer: "Quantizer | Wrapper", dim: int) -> None:
        super().__init__(quantizer)
        if dim < 1:
            raise ValueError(f"Projected needs a positive dim, got {dim}")
        if any(isinstance(part, Masked) for part in quantizer.modules()):
            raise ValueError(
                "Projected would fill the padding with its bias: write Masked(Projected(...))"
            )
        self.project_in = nn.Linear(dim, self._inner.dim)
        self.project_out = nn.Linear(self._inner.dim, dim)

    @property
    def dim(self) -> int:
        """Channels of the input and of `z`."""
        return self.project_in.in_features

    def enter(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch inner"]:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"Projected expects {self.dim} channels in the last axis, got shape "
                f"{tuple(x.shape)}; ChannelFirst(Projected(...)) takes channel-first input"
            )
        return self.project_in(x)

    def leave(self, z: Float[Tensor, "*batch inner"]) -> Float[Tensor, "*batch dim"]:
        return self.project_out(z)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "dim": self.dim}
