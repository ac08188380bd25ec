"""Bad input gets an error that names the class, the value and the way out; nothing changes."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from xq.quantizers import VQ, EMACodebook, ProductQuantizer, Quantizer, ResidualQuantizer

LEAF = VQ(4, 8, codebook=EMACodebook)
FLAT = ResidualQuantizer(VQ(4, 8), 3)
PYRAMID = ResidualQuantizer(VQ(4, 8), multiscale=(1, 2, 4))
TREE = ProductQuantizer(PYRAMID, P=2)
STEPS_OF_PYRAMIDS = ResidualQuantizer(PYRAMID, 2)

FORWARD: dict[str, tuple[Quantizer, torch.Tensor, str]] = {
    "channels": (
        LEAF,
        torch.randn(2, 5),
        r"4 channels in the last axis, got .*\(2, 5\); wrap it in Projected\(VQ\(...\), ",
    ),
    "channel-first": (
        LEAF,
        torch.randn(2, 4, 8, 8),
        r"got shape \(2, 4, 8, 8\); wrap it in ChannelFirst\(VQ\(...\)\)",
    ),
    "a number": (LEAF, torch.tensor(1.0), r"got shape \(\)"),
    "integers": (LEAF, torch.zeros(2, 4, dtype=torch.int32), "floating-point.*got torch.int32"),
    "grid": (
        PYRAMID,
        torch.randn(2, 8, 8, 4),
        r"with scales \(1, 2, 4\) expects shape \(b, 4, 4, 4\), got \(2, 8, 8, 4\); with_scales",
    ),
    "flat tokens": (TREE, torch.randn(2, 16, 8), r"expects shape \(b, 4, 4, 8\), got \(2, 16, 8\)"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_input_that_does_not_fit(name: str) -> None:
    quantizer, x, message = FORWARD[name]
    before = [t.clone() for t in quantizer.state_dict().values()]
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=message):
            call(x)
    after = quantizer.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_encode_refuses_what_is_not_finite(value: float) -> None:
    x = torch.randn(3, 4)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"VQ.encode got 1 values .* NaN or infinite, among 12"):
        LEAF.encode(x)


def test_forward_does_not_look_at_values() -> None:
    x = torch.full((3, 4), float("nan"))
    assert VQ(4, 8)(x).indices.shape == (3,)


DEPTH: dict[str, tuple[object, str]] = {
    "0": (0, r"ResidualQuantizer has depths 1 to 3, .*got depth=0"),
    "4": (4, r"depths 1 to 3, .* got depth=4"),
    "-1": (-1, "got depth=-1"),
    "a fraction": (2.0, "or a tensor with one a sample, got depth=2.0"),
    "a list": ([1, 2], r"got depth=\[1, 2\]"),
    "length": (torch.ones(5, dtype=torch.int64), r"one integer a sample, shape \(2,\).*\(5,\)"),
    "floats": (torch.ones(2), "got torch.float32"),
}


@pytest.mark.parametrize("name", DEPTH)
def test_depths_that_do_not_fit(name: str) -> None:
    depth, message = DEPTH[name]
    with pytest.raises(ValueError, match=message):
        FLAT(torch.randn(2, 4), depth)


def test_a_single_vector_has_no_depth() -> None:
    with pytest.raises(ValueError, match="needs a batch axis"):
        FLAT(torch.randn(4), 2)


ints = partial(torch.zeros, dtype=torch.int64)
DECODE: dict[str, tuple[Quantizer, Callable[[], torch.Tensor], str]] = {
    "floats": (
        LEAF,
        lambda: torch.zeros(3),
        "VQ.decode expects integer indices, got torch.float32",
    ),
    "bools": (LEAF, lambda: torch.zeros(3, dtype=torch.bool), "got torch.bool"),
    "negative": (LEAF, lambda: ints(3) - 1, r"indices in 0..7, got -1..-1"),
    "too large": (LEAF, lambda: ints(3) + 8, r"indices in 0..7, got 8..8"),
    "no steps": (
        FLAT,
        lambda: ints(3, 0),
        r"shape \(..., 3\), or fewer leading steps, got \(3, 0\)",
    ),
    "too many steps": (FLAT, lambda: ints(3, 4), r"got \(3, 4\)"),
    "too few axes": (FLAT, lambda: ints(()), r"got \(\)"),
    "part of a scale": (
        PYRAMID,
        lambda: ints(2, 4),
        r"shape \(b, 21\), or those of some leading scales, got \(2, 4\)",
    ),
    "no scale": (PYRAMID, lambda: ints(2, 0), r"got \(2, 0\)"),
    "scales of a step": (STEPS_OF_PYRAMIDS, lambda: ints(2, 5, 2), r"got \(2, 5, 2\)"),
    "grids": (PYRAMID, lambda: ints(2, 4, 4), r"got \(2, 4, 4\)"),
    "branches": (TREE, lambda: ints(2, 21, 3), r"shape \(b, 21, 2\).*got \(2, 21, 3\)"),
}


@pytest.mark.parametrize("name", DECODE)
def test_indices_that_do_not_fit(name: str) -> None:
    quantizer, indices, message = DECODE[name]
    with pytest.raises(ValueError, match=message):
        quantizer.decode(indices())
    with pytest.raises(ValueError, match=message):
        quantizer.partials(indices())


def test_sizes_and_names_that_make_no_codebook() -> None:
    with pytest.raises(ValueError, match=r"GradientCodebook needs a positive codebook_size.*got 0"):
        VQ(4, 0)
    with pytest.raises(ValueError, match=r"EMACodebook needs a decay in .*got 1.0"):
        VQ(4, 8, codebook=partial(EMACodebook, decay=1.0))
    with pytest.raises(ValueError, match=r"VQ knows the metrics .* got metric='l1'"):
        VQ(4, 8, metric="l1")


def test_codebooks_that_are_made_already_or_of_another_size() -> None:
    # under the jaxtyping hook the annotation refuses the first
    with pytest.raises((ValueError, TypeError), match=r"VQ makes its own codebook|'codebook'"):
        VQ(4, 8, codebook=EMACodebook(8, 4))
    with pytest.raises((ValueError, TypeError), match=r"got codebook='ema'|'codebook'"):
        VQ(4, 8, codebook="ema")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="asked for a codebook of 8 x 4, its factory made 9"):
        VQ(4, 8, codebook=lambda size, dim: EMACodebook(size + 1, dim))


def test_numpy_integers_are_depths_too() -> None:
    x = torch.randn(2, 4)
    assert torch.equal(FLAT(x, np.int64(2)).z, FLAT(x, 2).z)


def test_a_leaf_has_no_token_count() -> None:
    with pytest.raises(ValueError, match="VQ has no scales"):
        _ = LEAF.num_tokens
