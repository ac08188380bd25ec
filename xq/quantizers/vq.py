"""VQ: the nearest row of a codebook."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from xq.config import describe
from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, fit
from xq.quantizers.codebook import Codebook, GradientCodebook, has_parameters
from xq.quantizers.estimators import straight_through
from xq.quantizers.lookup import METRICS, Table, nearest, prepare
from xq.quantizers.memo import once


class VQ(Quantizer):
    """Replaces each vector by the nearest row of a codebook (van den Oord et al. 2017).

    Args:
        dim: Channels of the input and of the codes.
        codebook_size: Number of codes.
        metric: "euclidean", or "cosine": searches by angle and returns the code as it is stored
            (XQ-GAN's multi-scale VQ).
        normalize: Unit vectors in and out (ViT-VQGAN, LlamaGen, XQ-GAN's single-scale VQ): the
            input is normalized with gradient, the stored codes whenever they are used.
        codebook: Makes the codebook from its size and `dim`: `GradientCodebook`, or such as
            `partial(EMACodebook, decay=0.99)`.
        estimator: How gradients cross, a function `(u, z) -> z`.

    Raises:
        ValueError: If a size is below 1 or `metric` is unknown.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        metric: str = "euclidean",
        normalize: bool = False,
        codebook: Callable[[int, int], Codebook] = GradientCodebook,
        estimator: Callable[[Tensor, Tensor], Tensor] = straight_through,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"VQ knows the metrics {METRICS}, got metric={metric!r}")
        self.dim, self.codebook_size = dim, codebook_size
        self.metric, self.normalize = metric, normalize
        self.codebook = self._made(codebook)
        self.estimator = estimator
        # unit codes cannot follow a shrinking residual by themselves
        self.shrink = 0.5 if normalize else 1.0

    def _made(self, factory: Any) -> Codebook:
        if isinstance(factory, Codebook):
            raise ValueError(
                f"VQ makes its own codebook, got one: pass {type(factory).__name__}, or "
                f"partial({type(factory).__name__}, ...) for its options"
            )
        book = factory(self.codebook_size, self.dim)
        if (book.codebook_size, book.dim) != (self.codebook_size, self.dim):
            raise ValueError(
                f"VQ asked for a codebook of {self.codebook_size} x {self.dim}, "
                f"its factory made {book.codebook_size} x {book.dim}"
            )
        return book

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.normalize(x, dim=-1) if self.normalize else x

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        z, indices, _ = self._chosen(u)
        return Quantized(z, indices, fit(u, z, learned=has_parameters(self.codebook)))

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        return self._chosen(u)

    def _chosen(self, u: Tensor) -> Quantized:
        codes, table = once(self._searchable, u.dtype)
        indices = nearest(u, table)
        z = F.embedding(indices, codes)
        self.codebook.observe(u, indices)
        zero = u.new_zeros(())
        return Quantized(z, indices, Losses(zero, zero, zero))

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return F.embedding(indices, once(self._codes))

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        return self.estimator(u, z)

    def _codes(self) -> Float[Tensor, "codebook_size dim"]:
        codes = self.codebook.codes()
        return F.normalize(codes, dim=-1) if self.normalize else codes

    def _searchable(self, dtype: torch.dtype) -> tuple[Tensor, Table]:
        codes = once(self._codes).to(dtype)
        return codes, prepare(codes, "cosine" if self.normalize else self.metric)

    @property
    def domain(self) -> str:
        return "sphere" if self.normalize else "real"

    @property
    def estimators(self) -> Any:
        return self.estimator

    @property
    def regularizes(self) -> bool:
        return False

    def config(self) -> dict[str, Any]:
        return describe(
            {
                "dim": self.dim,
                "codebook_size": self.codebook_size,
                "metric": self.metric,
                "normalize": self.normalize,
                "codebook": self.codebook,
                "estimator": self.estimator,
            }
        )

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("metric", self.metric, "euclidean"),
                ("normalize", self.normalize, False),
            )
            if value != default
        )
        return f"{self.dim}, {self.codebook_size}{options}"
