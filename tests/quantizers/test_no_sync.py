"""No training step makes a GPU wait: nothing in it depends on the values of tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    ChannelFirst,
    CodeSampling,
    DepthDropout,
    DiVeQ,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    ProductQuantizer,
    Projected,
    Quantizer,
    ResidualQuantizer,
    SimCodebook,
    rotation_trick,
)
from xq.quantizers.lookup import prepare
from xq.quantizers.lookup.chunked import nearest_chunked

# read a value, or give a result whose shape depends on values
SYNCHRONIZING = {
    "_local_scalar_dense",
    "item",
    "equal",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
}


class NoSync(TorchDispatchMode):
    """Refuses operations that would make a GPU wait, counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert name not in SYNCHRONIZING, name
        assert not masked, f"{name} with a mask"
        self.calls += 1
        return func(*args, **(kwargs or {}))


def trees() -> dict[str, Callable[[], Any]]:
    ema = partial(EMACodebook, decay=0.9)
    scales = (1, 2, (2, 4), 4)
    return {
        "VQ": lambda: VQ(4, 9),
        "VQ cosine": lambda: VQ(4, 9, metric="cosine", estimator=rotation_trick),
        "VQ normalize": lambda: VQ(4, 9, normalize=True),
        "VQ EMA": lambda: VQ(4, 9, codebook=ema),
        "VQ revived": lambda: VQ(4, 9, codebook=partial(GradientCodebook, revive=0.1)),
        "SimVQ": lambda: VQ(4, 9, codebook=SimCodebook),
        "VQ regularized": lambda: VQ(4, 9, entropy_temperature=0.1),
        "VQ drawn": lambda: VQ(4, 9, sampling=CodeSampling(1.0)),
        "IBQ": lambda: IBQ(4, 9),
        "Gumbel": lambda: GumbelVQ(4, 9),
        "FSQ": lambda: FSQ([5, 4, 3, 2]),
        "RQ of FSQ": lambda: ResidualQuantizer(FSQ([5, 4, 3, 3], bound="paper"), 3),
        "RQ DiVeQ": lambda: ResidualQuantizer(VQ(4, 9, estimator=DiVeQ()), 3),
        "LFQ": lambda: LFQ(4, bound="tanh"),
        "BSQ": lambda: BSQ(4, group_size=2),
        "RQ": lambda: ResidualQuantizer(VQ(4, 9, codebook=ema), 3),
        "RQ of LFQ": lambda: ResidualQuantizer(LFQ(4), 3),
        "PQ": lambda: ProductQuantizer(VQ(2, 9), P=2),
        "PQ of RQ": lambda: ProductQuantizer(ResidualQuantizer(VQ(2, 9, normalize=True), 3), P=2),
        "uneven": lambda: ResidualQuantizer(
            ProductQuantizer([VQ(1, 9), VQ(3, 9, normalize=True)]), 2
        ),
        "MSVQ": lambda: ResidualQuantizer(VQ(4, 9, codebook=ema), multiscale=scales),
        "MSBR2": lambda: ProductQuantizer(ResidualQuantizer(BSQ(2), multiscale=scales), P=2),
        "projected": lambda: Projected(ResidualQuantizer(VQ(2, 9), 3), 4),
    }


def step(quantizer: Any, x: torch.Tensor, depth: torch.Tensor | None) -> None:
    z, _, losses = quantizer(x, depth)
    (z.square().mean() + losses.total()).backward()


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", trees())
def test_a_training_step_reads_no_value(name: str, dropout: bool) -> None:
    quantizer = trees()[name]()
    x = torch.randn(3, 4, 4, 4, requires_grad=True)
    depth = DepthDropout(quantizer.depth, p=0.5, minimum=1)(3, x.device) if dropout else None
    # what is made once, such as tables of constants, may take what it takes
    step(quantizer, x, depth)
    with NoSync() as counted:
        step(quantizer, x, depth)
    assert counted.calls > 5
    assert x.grad is not None


def test_channel_first_reads_no_value() -> None:
    quantizer = ChannelFirst(VQ(4, 9))
    with NoSync():
        step(quantizer, torch.randn(3, 4, 5, 5, requires_grad=True), None)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_search_reads_no_value(metric: str, k: int) -> None:
    x, codes = torch.randn(3000, 4), torch.randn(700, 4)
    with NoSync():
        nearest_chunked(x, prepare(codes, metric), k)


def test_the_mode_would_notice() -> None:
    x = torch.randn(5)
    for reads in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.long().unique(),
    ):
        with pytest.raises(AssertionError), NoSync():
            reads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", trees())
def test_a_training_step_on_a_gpu_never_waits(name: str) -> None:
    quantizer: Quantizer = trees()[name]().cuda()
    x = torch.randn(3, 4, 4, 4, device="cuda", requires_grad=True)
    depth = DepthDropout(quantizer.depth, p=0.5, minimum=1)(3, x.device)
    step(quantizer, x, depth)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(quantizer, x, depth)
    finally:
        torch.cuda.set_sync_debug_mode("default")
