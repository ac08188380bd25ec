"""Random quantizers and inputs for property tests."""

from functools import partial

import torch
from hypothesis import strategies as st

from xq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    CodeSampling,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
    SimCodebook,
)
from xq.quantizers.estimators import passes_through

CODEBOOKS = {"ema": partial(EMACodebook, decay=0.8), "sim": SimCodebook}
SCALES = ((1, 2, 3), ((1, 1), (2, 1), (3, 2)), (1, 1, 4), (2,))


@st.composite
def leaves(draw: st.DrawFn) -> Quantizer:
    """Any leaf, small."""
    dim = draw(st.integers(2, 5))
    kinds = ["vq", "unit", "cosine", "ema", "unit ema", "lfq", "tanh", "bsq", "fsq"]
    kinds += ["sim", "regularized", "drawn", "ibq", "gumbel"]
    kind = draw(st.sampled_from(kinds))
    if kind == "fsq":
        levels = draw(st.lists(st.integers(2, 9), min_size=dim, max_size=dim))
        around_zero = () if 2 in levels else ("paper", "vqp")
        names = ("even", "symmetric", "ifsq", "clamp", *around_zero)
        return FSQ(levels, bound=draw(st.sampled_from(names)))
    if kind == "bsq":
        return BSQ(dim, temperature=draw(st.sampled_from([0.1, 1.0])))
    if kind == "ibq":
        temperature = draw(st.sampled_from([None, 0.01, 1.0]))
        return IBQ(dim, draw(st.integers(1, 17)), entropy_temperature=temperature)
    if kind == "gumbel":
        return GumbelVQ(dim, draw(st.integers(1, 17)), hard=draw(st.booleans()))
    if kind in ("lfq", "tanh"):
        return LFQ(dim, bound="tanh" if kind == "tanh" else None)
    return VQ(
        dim,
        draw(st.integers(1, 17)),
        metric="cosine" if kind == "cosine" else "euclidean",
        normalize="unit" in kind,
        codebook=CODEBOOKS.get(kind.split()[-1], GradientCodebook),
        sampling=CodeSampling(1.0) if kind == "drawn" else None,
        entropy_temperature=0.1 if kind == "regularized" else None,
    )


@st.composite
def trees(draw: st.DrawFn, levels: int = 3) -> Quantizer:
    """Any nest of at most `levels` composites."""
    if levels == 0 or draw(st.integers(0, 3)) == 0:
        return draw(leaves())
    child = draw(trees(levels=levels - 1))
    kind = draw(st.sampled_from(["residual", "pyramid", "product"]))
    if kind == "product" or passes_through(child.estimators):
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
