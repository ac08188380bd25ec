"""Masked batches on two processes: one may have no valid token at all."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from xq.quantizers import BSQ, VQ, EMACodebook, Masked, ProductQuantizer, ResidualQuantizer

pytestmark = pytest.mark.distributed

EMA = partial(EMACodebook, decay=0.8, revive=0.0)
TREES: dict[str, Callable[[], Any]] = {
    "averages": lambda: ProductQuantizer(ResidualQuantizer(VQ(2, 6, codebook=EMA), 2), P=2),
    "batch entropy": lambda: BSQ(4),
}
# the valid tokens of each process, of the first and second step
VALID = (([], range(9)), (range(3), range(5)))


def tokens(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2 * step + rank)
    x = torch.randn(3, 3, 4, generator=generator)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[list(VALID[step][rank])] = True
    return x, mask.view(3, 3)


def work(rank: int, join: Callable[[], None]) -> dict[str, Any]:
    torch.manual_seed(0)
    quantizers = {name: Masked(make()) for name, make in TREES.items()}
    join()
    regularizers = []
    for step in range(2):
        x, mask = tokens(step, rank)
        x.requires_grad_()
        for quantizer in quantizers.values():
            z, _, losses = quantizer(x, mask=mask)
            (z.sum() + losses.total()).backward()
            regularizers.append(losses.regularizer.detach())
    return {"state": dict(quantizers["averages"].state_dict()), "regularizers": regularizers}


def test_averages_of_valid_tokens_alone_and_no_hang(on_processes: Any) -> None:
    results = on_processes(work)
    torch.manual_seed(0)
    alone = Masked(TREES["averages"]())
    for step in range(2):
        parts = [tokens(step, rank) for rank in range(2)]
        x, mask = (torch.cat(both) for both in zip(*parts, strict=True))
        alone(x, mask=mask)
    for key, tensor in alone.state_dict().items():
        for result in results:
            torch.testing.assert_close(result["state"][key], tensor, atol=1e-6, rtol=1e-5)
    assert all(value.isfinite() for result in results for value in result["regularizers"])
