"""RandomProjectionQuantizer: fixed random targets for masked prediction."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.precision import Float32, eager, float32_island, widen
from xq.pretrained import Pretrained
from xq.quantizers.lookup import nearest


class RandomProjectionQuantizer(Float32, Pretrained):
    """Labels of vectors by a frozen random projection and frozen random codes (BEST-RQ).

    Chiu et al. 2022, section 3.1: `argmin |normalized(code) - normalized(x @ projection)|`, with
    a Xavier-uniform projection and standard normal codes. Nothing in it learns. It has no `z` like
    its input, hence it is no `Quantizer`: it only encodes.

    Args:
        dim: Channels of the input.
        codebook_size: Number of codes in each codebook.
        code_dim: Channels of a projection and of its codes.
        num_codebooks: How many pairs of a projection and a codebook, each giving an index.
        normalize: Gives each vector mean 0 and variance 1 over its channels first. The paper does
            so over the whole data set, channel by channel; for that, pass False and do it before.
        generator: Where the projections and codes are drawn from; torch's own by default.

    Raises:
        ValueError: If a size is below 1, or a single channel is to be normalized.

    Examples:
        >>> labels = RandomProjectionQuantizer(80, 8192, num_codebooks=4)
        >>> labels.encode(torch.randn(2, 100, 80)).shape
        torch.Size([2, 100, 4])
    """

    projection: Tensor
    codes: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        code_dim: int = 16,
        num_codebooks: int = 1,
        normalize: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "dim": dim,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "num_codebooks": num_codebooks,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(
                    f"RandomProjectionQuantizer needs a positive {name}, got {name}={size}"
                )
        if normalize and dim == 1:
            raise ValueError(
                "RandomProjectionQuantizer cannot normalize vectors of one channel, dim=1: "
                "pass normalize=False"
            )
        self.dim, self.codebook_size, self.code_dim = dim, codebook_size, code_dim
        self.num_codebooks, self.normalize = num_codebooks, normalize
        self.register_buffer("projection", torch.empty(num_codebooks, dim, code_dim))
        self.register_buffer("codes", torch.empty(num_codebooks, codebook_size, code_dim))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new projections and codes."""
        limit = math.sqrt(6 / (self.dim + self.code_dim))
        self.projection.uniform_(-limit, limit, generator=generator)
        self.codes.normal_(generator=generator)
        self.codes.copy_(F.normalize(self.codes, dim=-1))

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one vector's indices."""
        return (self.num_codebooks,)

    @property
    def bits(self) -> float:
        """Bits a vector."""
        return self.num_codebooks * math.log2(self.codebook_size)

    @torch.no_grad()
    def encode(self, x: Shaped[Tensor, "..."]) -> Int[Tensor, "*batch num_codebooks"]:
        """The indices of vectors `(*batch, dim)`, in float32 or wider; has no gradient.

        Raises:
            ValueError: If `x` does not fit, or (outside compiled graphs) is not finite.
        """
        self._check(x)
        with float32_island(x.device.type):
            u = self._normalized(widen(x))
            pairs = zip(self.projection.to(u.dtype), self.codes.to(u.dtype), strict=True)
            found = [nearest(u @ projection, codes, "cosine") for projection, codes in pairs]
        return torch.stack(found, dim=-1)

    def forward(self, x: Shaped[Tensor, "..."]) -> Int[Tensor, "*batch num_codebooks"]:
        """The same as `encode`."""
        return self.encode(x)

    def _normalized(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.layer_norm(x, (self.dim,)) if self.normalize else x

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"RandomProjectionQuantizer expects floating-point vectors, got {x.dtype}"
            )
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"RandomProjectionQuantizer expects {self.dim} channels in the last axis, got "
                f"shape {tuple(x.shape)}; x.movedim(1, -1) puts channels last"
            )
        if eager(x) and not x.isfinite().all():
            raise ValueError(
                f"RandomProjectionQuantizer got {int((~x.isfinite()).sum())} values that are NaN "
                f"or infinite, among {x.numel()}; look for the layer that made them"
            )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON, but for the generator: what it drew is the state."""
        return {
            "dim": self.dim,
            "codebook_size": self.codebook_size,
            "code_dim": self.code_dim,
            "num_codebooks": self.num_codebooks,
            "normalize": self.normalize,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items())
