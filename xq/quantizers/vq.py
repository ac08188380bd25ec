"""VQ: the nearest row of a codebook."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from xq.config import describe
from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, fit
from xq.quantizers.codebook import Codebook, has_parameters
from xq.quantizers.entropy import CodeEntropy
from xq.quantizers.estimators import rotation_trick, straight_through
from xq.quantizers.gradient_codebook import GradientCodebook
from xq.quantizers.lookup import METRICS, Table, nearest, prepare
from xq.quantizers.memo import once
from xq.quantizers.sampling import CodeSampling, checked_temperature
from xq.quantizers.usage_entropy import distance_entropy


class VQ(Quantizer):
    """Replaces a vector by the nearest row of a codebook (van den Oord et al. 2017, section 3.1).

    Args:
        dim: Channels of the input and of the codes.
        codebook_size: Number of codes.
        metric: "euclidean", or "cosine": searches by angle and returns the code as it is stored
            (XQ-GAN's multi-scale VQ).
        normalize: Unit vectors in and out (ViT-VQGAN, LlamaGen, XQ-GAN's single-scale VQ): the
            input is normalized with gradient, the stored codes whenever they are used.
        codebook: Makes the codebook from its size and `dim`: `GradientCodebook`, or such as
            `partial(EMACodebook, decay=0.99)`.
        estimator: How gradients cross, a function `(u, z) -> z` or a module such as `DiVeQ()`.
        sampling: Draws codes at random in training, the nearer ones more often; by default the
            nearest is taken.
        entropy_temperature: Of the softmax of negative squared distances whose `entropy` is the
            regularizer, in training mode with gradients; None for no regularizer.
        across_processes: Whether its batch entropy is that of all processes, at the price of a
            reduction a step; otherwise it is that of each.

    Raises:
        ValueError: If a size is below 1, `metric` is unknown, the temperature is not above 0, or
            codes are to be drawn with the rotation trick.

    Examples:
        >>> vq = VQ(8, 512, codebook=partial(EMACodebook, decay=0.99))
        >>> z, indices, losses = vq(torch.randn(2, 16, 16, 8))
        >>> z.shape, indices.shape
        (torch.Size([2, 16, 16, 8]), torch.Size([2, 16, 16]))
        >>> torch.equal(vq.decode(indices), z)
        True
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
        sampling: CodeSampling | None = None,
        entropy_temperature: float | None = None,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"VQ knows the metrics {METRICS}, got metric={metric!r}")
        if sampling is not None and estimator is rotation_trick:
            raise ValueError(
                "VQ does not draw codes with estimator=rotation_trick: a far code makes its "
                "gradient large, and training diverges; take straight_through, or sampling=None"
            )
        if entropy_temperature is not None:
            checked_temperature("VQ's entropy", entropy_temperature)
        self.dim, self.codebook_size = dim, codebook_size
        self.metric, self.normalize = metric, normalize
        self.codebook = self._made(codebook)
        self.estimator, self.sampling = estimator, sampling
        self.entropy_temperature = entropy_temperature
        self.across_processes = across_processes
        # unit codes cannot follow a shrinking residual by themselves
        self.shrink = 0.5 if normalize else 1.0

    def _made(self, factory: Callable[[int, int], Codebook]) -> Codebook:
        if isinstance(factory, Codebook):
            raise ValueError(
                f"VQ makes its own codebook, got one: pass {type(factory).__name__}, or "
                f"partial({type(factory).__name__}, ...) for its options"
            )
        if not callable(factory):
            raise ValueError(
                f"VQ makes its codebook by codebook=EMACodebook or such, got codebook={factory!r}"
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
        z, indices, losses = self._chosen(u)
        fitted = fit(u, z, learned=has_parameters(self.codebook))
        losses = Losses(fitted.commitment, fitted.codebook, losses.regularizer)
        return Quantized(z, indices, losses)

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        return self._chosen(u)

    def _chosen(self, u: Tensor) -> Quantized:
        if self.codebook.watcher is not None:
            self.codebook.watcher(self.codebook, u, self._metric)
        codes, table = once(self._searchable, u.dtype)
        is_training = self.training and torch.is_grad_enabled()
        if self.sampling is not None and is_training:
            indices = self.sampling(u, table)
        else:
            indices = nearest(u, table)
        z = F.embedding(indices, codes)
        self.codebook.observe(u, indices)
        regularizer = zero = u.new_zeros(())
        if self.entropy_temperature is not None and is_training:
            regularizer = self.entropy(u).penalty()
        return Quantized(z, indices, Losses(zero, zero, regularizer))

    def candidates(self, u: Float[Tensor, "*batch dim"], k: int) -> Int[Tensor, "*batch near"]:
        _, table = once(self._searchable, u.dtype)
        return nearest(u, table, k=min(k, self.codebook_size))

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return F.embedding(indices, once(self._codes))

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        return self.estimator(u, z)

    def entropy(self, u: Float[Tensor, "*batch dim"]) -> CodeEntropy:
        """Entropies of the soft assignment of `u` (bounded) to all codes, in nats.

        The assignment is the softmax of `-|u - code|^2 / entropy_temperature`, for the cosine
        metric of normalized vectors and codes. Exact, in bounded memory.

        Raises:
            ValueError: If `entropy_temperature` is None.
        """
        if self.entropy_temperature is None:
            raise ValueError(
                "VQ.entropy needs an entropy_temperature, got None; LlamaGen's is 0.01"
            )
        codes = once(self._codes).to(u.dtype)
        if self.metric == "cosine":
            u, codes = F.normalize(u, dim=-1), F.normalize(codes, dim=-1)
        return distance_entropy(
            u, codes, self.entropy_temperature, across_processes=self.across_processes
        )

    def _codes(self) -> Float[Tensor, "codebook_size dim"]:
        codes = self.codebook.codes()
        return F.normalize(codes, dim=-1) if self.normalize else codes

    def _searchable(self, dtype: torch.dtype) -> tuple[Tensor, Table]:
        codes = once(self._codes).to(dtype)
        return codes, prepare(codes, self._metric)

    @property
    def _metric(self) -> str:
        return "cosine" if self.normalize else self.metric

    @property
    def domain(self) -> str:
        return "sphere" if self.normalize else "real"

    @property
    def estimators(self) -> Any:
        # copies of a module agree: what they do counts, not which of them does it
        is_described = hasattr(self.estimator, "config")
        return describe(self.estimator) if is_described else self.estimator

    @property
    def regularizes(self) -> bool:
        return self.entropy_temperature is not None

    @property
    def noisy(self) -> bool:
        return self.sampling is not None or getattr(self.estimator, "noisy", False)

    def config(self) -> dict[str, Any]:
        return describe(
            {
                "dim": self.dim,
                "codebook_size": self.codebook_size,
                "metric": self.metric,
                "normalize": self.normalize,
                "codebook": self.codebook,
                "estimator": self.estimator,
                "sampling": self.sampling,
                "entropy_temperature": self.entropy_temperature,
                "across_processes": self.across_processes,
            }
        )

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("metric", self.metric, "euclidean"),
                ("normalize", self.normalize, False),
                ("entropy_temperature", self.entropy_temperature, None),
            )
            if value != default
        )
        return f"{self.dim}, {self.codebook_size}{options}"
