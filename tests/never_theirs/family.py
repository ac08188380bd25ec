"""One of every kind of quantizer, small, and what tests do with them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    CodeSampling,
    DiVeQ,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    ProductQuantizer,
    ResidualQuantizer,
    SimCodebook,
    rotation_trick,
)

EMA = partial(EMACodebook, decay=0.8)
LEAVES: dict[str, Callable[[], Any]] = {
    "vq": lambda: VQ(4, 17),
    "unit vq": lambda: VQ(4, 17, normalize=True),
    "cosine vq": lambda: VQ(4, 17, metric="cosine"),
    "ema": lambda: VQ(4, 17, codebook=EMA),
    "revived": lambda: VQ(4, 17, codebook=partial(GradientCodebook, revive=0.1)),
    "sim": lambda: VQ(4, 17, codebook=SimCodebook),
    "rotated": lambda: VQ(4, 17, estimator=rotation_trick),
    "diveq": lambda: VQ(4, 17, estimator=DiVeQ()),
    "drawn": lambda: VQ(4, 17, sampling=CodeSampling(1.0)),
    "regularized": lambda: VQ(4, 17, entropy_temperature=0.1),
    "ibq": lambda: IBQ(4, 17),
    "gumbel": lambda: GumbelVQ(4, 17),
    "lfq": lambda: LFQ(4),
    "bsq": lambda: BSQ(4),
    "fsq": lambda: FSQ([5, 4, 3, 2]),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, want: dict[str, Tensor]) -> None:
    assert list(module.state_dict()) == list(want)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, want[key]), key


def nest(leaf: Any) -> Any:
    """A residual of it where there can be one, a product otherwise."""
    if isinstance(leaf, IBQ | GumbelVQ):
        return ProductQuantizer(leaf, P=2)
    return ResidualQuantizer(ProductQuantizer(leaf, P=2), 2)


def step(quantizer: Any, x: Tensor) -> Any:
    """A training step without an optimizer."""
    out = quantizer(x)
    loss = out.z.square().sum() + out.losses.total()
    if loss.requires_grad:
        loss.backward()
    return out
