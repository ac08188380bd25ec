"""Frechet distance between the features of two sets of images, from sums alone."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.distributed import SharedGroup, all_reduce_sum_
from xq.precision import Float32


class Gaussian(NamedTuple):
    """The normal distribution that a set of features is taken for.

    Attributes:
        mean: Of each channel.
        covariance: Of each pair of channels.
    """

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]


class FeatureMoments(Float32):
    """Mean and covariance of features that come batch by batch, over all processes, in float64.

    Memory is a matrix of `dim x dim` numbers, however many features there are. Batches and
    processes are merged about their own means (Chan et al. 1983), so that nothing cancels.

    Args:
        dim: Channels of a feature.
        process_group: The processes that count together; all by default.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, dim: int, *, process_group: Any = None) -> None:
        super().__init__()
        self._shared_group = SharedGroup(process_group)
        self.dim = dim
        for name, shape in (("count", ()), ("mean", (dim,)), ("scatter", (dim, dim))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, features: Shaped[Tensor, "..."]) -> None:
        """Adds features `(n, dim)`; n may be 0.

        Raises:
            ValueError: If they have another shape or are not floating-point.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"FeatureMoments takes floating-point features (n, {self.dim}), got "
                f"{features.dtype} of shape {tuple(features.shape)}"
            )
        if not len(features):
            return
        features = features.to(self.mean.device, torch.float64)
        mean = features.mean(0)
        centred = features - mean
        total = self.count + len(features)
        step = mean - self.mean
        between = torch.outer(step, step) * (self.count * len(features) / total)
        self.scatter = self.scatter.double() + centred.T @ centred + between
        self.mean = self.mean + step * (len(features) / total)
        self.count = total

    @torch.no_grad()
    def compute(self) -> Gaussian:
        """Mean and unbiased covariance of all features so far, on all processes.

        Raises:
            ValueError: If there are fewer than two, or some are not finite.
        """
        group = self._shared_group.group
        count, total = self.count.clone(), self.count * self.mean
        all_reduce_sum_([count, total], group)
        mean = total / count
        step = self.mean - mean
        scatter = self.scatter + self.count * torch.outer(step, step)
        all_reduce_sum_([scatter], group)
        if count < 2:
            raise ValueError(
                f"FeatureMoments has seen {int(count)} features; a covariance needs two or more"
            )
        if not scatter.isfinite().all():
            raise ValueError(
                "FeatureMoments has seen features that are NaN or infinite; look for them in the "
                "network that made the features, or in its images"
            )
        return Gaussian(mean, scatter / (count - 1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class FrechetDistance(Float32):
    """Frechet distance between two sets of features, which come batch by batch.

    `update` both sets, `made` and `reference`, in any order. With InceptionV3's features this is
    FID; with any other network's it is not, and only values of one network compare. It is biased:
    fewer features make it larger, so only values of equally many compare.

    Args:
        dim: Channels of a feature.
        reference: Those of another distance, to compare several sets with one; its own by default.
        process_group: The processes that count together; all by default.

    Attributes:
        made: `FeatureMoments` of the set that is judged.
        reference: `FeatureMoments` of the set that it is compared with.

    Examples:
        >>> distance = FrechetDistance(dim=8)
        >>> for _ in range(4):
        ...     distance.made.update(torch.randn(100, 8))
        ...     distance.reference.update(torch.randn(100, 8) + 1)
        >>> bool(distance.compute() > 4)
        True
    """

    def __init__(
        self, dim: int, *, reference: FeatureMoments | None = None, process_group: Any = None
    ) -> None:
        super().__init__()
        if reference is not None and reference.dim != dim:
            raise ValueError(
                f"FrechetDistance compares features of one network, got dim={dim} and a reference "
                f"with dim={reference.dim}"
            )
        self.made = FeatureMoments(dim, process_group=process_group)
        self.reference = reference or FeatureMoments(dim, process_group=process_group)

    def compute(self) -> Float[Tensor, ""]:
        """The distance between all features so far, on all processes.

        Raises:
            ValueError: If a set has fewer than two, or some are not finite.
        """
        return frechet_distance(self.made.compute(), self.reference.compute())


@torch.no_grad()
def frechet_distance(first: Gaussian, second: Gaussian) -> Float[Tensor, ""]:
    """Squared Frechet distance of two normal distributions (Dowson and Landau 1982).

    `|mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))`. The eigenvalues of `C C'` are the squares of
    the singular values of `C^(1/2) C'^(1/2)`, of which no root has to be taken: with fewer samples
    than channels, where most of them are zero, roots of what rounding leaves would add up.

    Args:
        first: Such as `FeatureMoments(...).compute()` gives.
        second: The same, of as many channels.

    Raises:
        ValueError: If they have different numbers of channels.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            "frechet_distance compares features of one network, got means of shape "
            f"{tuple(first.mean.shape)} and {tuple(second.mean.shape)}"
        )
    overlap = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance).mT).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * overlap
    return distance.clamp(min=0)


def _root(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "rank dim"]:
    """A matrix R with `R.T @ R` equal to the covariance, of as many rows as its rank."""
    values, vectors = torch.linalg.eigh(covariance)
    # below this they are rounding
    counts = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[counts].sqrt()[:, None] * vectors.mT[counts]
