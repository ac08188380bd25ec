"""Random quantizers and inputs for property tests."""

from functools import partial

import torch
from hypothesis import strategies as st

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
)

SCALES = ((1, 2, 3), ((1, 1), (2, 1), (3, 2)), (1, 1, 4), (2,))


@st.composite
def leaves(draw: st.DrawFn) -> Quantizer:
    """Any leaf, small."""
    dim = draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["vq", "unit", "cosine", "ema", "unit ema", "lfq", "tanh", "bsq"]))
    if kind == "bsq":
        return BSQ(dim, temperature=draw(st.sampled_from([0.1, 1.0])))
    if kind in ("lfq", "tanh"):
        return LFQ(dim, bound="tanh" if kind == "tanh" else None)
    return VQ(
        dim,
        draw(st.integers(1, 17)),
        metric="cosine" if kind == "cosine" else "euclidean",
        normalize="unit" in kind,
        codebook=partial(EMACodebook, decay=0.8) if "ema" in kind else GradientCodebook,
    )


@st.composite
def trees(draw: st.DrawFn, levels: int = 3) -> Quantizer:
    """Any nest of at most `levels` composites."""
    if levels == 0 or draw(st.integers(0, 3)) == 0:
        return draw(leaves())
    child = draw(trees(levels=levels - 1))
    kind = draw(st.sampled_from(["residual", "pyramid", "product"]))
    if kind == "product":
        return ProductQuantizer(child, draw(st.integers(1, 3)), shared=draw(st.booleans()))
    if kind == "pyramid" and not child.scales:
        scales = draw(st.sampled_from(SCALES))
        refine = [Refine(child.dim) for _ in range(draw(st.integers(0, len(scales))))]
        shared = draw(st.sampled_from([None, False]))
        return ResidualQuantizer(child, multiscale=Pyramid(scales, refine), shared=shared)
    shared = draw(st.sampled_from([None, True]))
    return ResidualQuantizer(child, depth=draw(st.integers(1, 3)), shared=shared)


def inputs_for(quantizer: Quantizer, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """A batch that fits the quantizer."""
    generator = torch.Generator().manual_seed(seed)
    h, w = quantizer.grids[-1] if quantizer.scales else (2, 3)
    return torch.randn(batch, h, w, quantizer.dim, generator=generator)
