"""Codes drawn at random, the nearer ones more often."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.quantizers.blocks import block_length, exact
from xq.quantizers.lookup.table import Table, relative


class CodeSampling(nn.Module):
    """Draws each index from the softmax of `-|u - code|^2 / temperature` (Lee et al. 2022, RQ-VAE).

    For `VQ(sampling=...)`, in training mode with gradients alone: `encode`, eval mode and `no_grad`
    take the nearest code. `z` is the drawn code, so `decode(indices)` equals `z` always.

    Takes one random number a vector, which it looks up in the summed probabilities of all codes: as
    Gumbel noise on each distance would draw, without as many random numbers.

    Args:
        temperature: Above 0; the attribute may follow a schedule.
        generator: Source of randomness, on the input's device; torch's own by default, as it must
            be for activation checkpointing and compiled graphs. Copies have their own in its state.

    Raises:
        ValueError: If the temperature is not above 0.

    Examples:
        >>> vq = VQ(8, 512, sampling=CodeSampling(0.5))
        >>> vq.sampling.temperature = 0.1  # as it cools down
    """

    def __init__(self, temperature: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.temperature = checked_temperature("CodeSampling", temperature)
        self.generator = generator

    def forward(self, u: Float[Tensor, "*batch dim"], table: Table) -> Int[Tensor, "*batch"]:
        """Indices of drawn codes, distances being those of the table's metric."""
        # doubles, since float32 would never draw what is rarer than 1 in 2^24
        drawn = torch.rand(
            u.shape[:-1], dtype=torch.float64, device=u.device, generator=self.generator
        )
        flat = u.detach().reshape(-1, u.shape[-1])
        points = relative(flat, table.metric, table.centre)
        rows = table.rows[: len(table.codes), : u.shape[-1] + 1] * (2 / self.temperature)
        found = torch.ops.xq.sample(points, rows, drawn.flatten())
        return found.view(u.shape[:-1])

    def config(self) -> dict[str, Any]:
        """Constructor arguments, without the generator, which no file keeps."""
        return {"temperature": self.temperature}

    def extra_repr(self) -> str:
        return f"{self.temperature}"


def checked_temperature(owner: str, temperature: float) -> float:
    """`temperature`; raises a `ValueError` unless it is above 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{owner} needs a temperature above 0, got {temperature}")
    return temperature


@exact
def _sample(points: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
    """For each point a row, a block of points at a time; `drawn` are uniform in [0, 1).

    What is last in a row, less the product with the others, is minus the row's score in a softmax.
    """
    found = torch.empty(len(points), dtype=torch.int64, device=points.device)
    codes, half_norms, length = rows[:, :-1], rows[:, -1], block_length(rows)
    blocks = zip(points.split(length), drawn.split(length), found.split(length), strict=True)
    for part, uniform, out in blocks:
        scores = torch.addmm(-half_norms, part, codes.t())
        below = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        # the sum is one but for rounding; the first code whose sum exceeds the number
        wanted = uniform[:, None] * below[:, -1:]
        torch.searchsorted(below, wanted, right=True, out=out[:, None])
    return found.clamp_(max=len(rows) - 1)


def _sample_fake(points: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
    return points.new_empty(len(points), dtype=torch.int64)


# an op, so that a compiled graph has one node for all blocks
_LIBRARY = torch.library.Library("xq", "FRAGMENT")
_LIBRARY.define("sample(Tensor points, Tensor rows, Tensor drawn) -> Tensor")
_LIBRARY.impl("sample", _sample, "CompositeExplicitAutograd")
torch.library.register_fake("xq::sample", _sample_fake, lib=_LIBRARY)
