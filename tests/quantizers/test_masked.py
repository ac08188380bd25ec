"""Masked: all is as if the valid tokens alone had been quantized."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from xq.quantizers import (
    BSQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    Masked,
    Perturbed,
    ProductQuantizer,
    Projected,
    Quantizer,
    ResidualQuantizer,
    beam_encode,
    rotation_trick,
)

EMA = partial(EMACodebook, decay=0.8)
TREES: dict[str, Callable[[], Any]] = {
    "vq": lambda: VQ(6, 16, estimator=rotation_trick),
    "cosine": lambda: VQ(6, 16, metric="cosine"),
    "ema": lambda: VQ(6, 16, codebook=EMA),
    "bsq": lambda: BSQ(6, temperature=0.5),
    "residual": lambda: ResidualQuantizer(VQ(6, 16, codebook=EMA), 3),
    "product": lambda: ProductQuantizer(ResidualQuantizer(BSQ(3), 2), P=2),
    "projected": lambda: Projected(ProductQuantizer(VQ(2, 8), P=2), 6),
}
MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_equals_the_packed_valid_tokens(name: str, training: bool) -> None:
    plain = TREES[name]().train(training)
    masked = Masked(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(3, 5, 6)
        # what stands in the padding must not matter
        x[~MASK] = torch.nan
        a, b = leaf(x[MASK]), leaf(x)
        want, got = plain(a), masked(b, mask=MASK)
        assert torch.equal(got.z[MASK], want.z)
        assert torch.equal(got.indices[MASK], want.indices)
        assert (got.z[~MASK] == 0).all()
        assert (got.indices[~MASK] == -1).all()
        for mine, theirs in zip(got.losses, want.losses, strict=True):
            assert torch.equal(mine, theirs)
        weight = torch.randn(3, 5, 6)
        ((want.z * weight[MASK]).sum() + want.losses.total()).backward()
        ((got.z * weight).sum() + got.losses.total()).backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(b.grad[MASK], a.grad)
        assert (b.grad[~MASK] == 0).all()
    for mine, theirs in zip(masked.quantizer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # pyright: ignore[reportArgumentType]
    for key, tensor in plain.state_dict().items():
        assert torch.equal(masked.state_dict()[f"quantizer.{key}"], tensor)


@pytest.mark.parametrize("name", TREES)
def test_coding(name: str) -> None:
    masked = Masked(TREES[name]())
    x = torch.randn(3, 5, 6)
    z, indices, _ = masked(x, mask=MASK)
    x[~MASK] = torch.inf
    assert torch.equal(masked.encode(x, mask=MASK), indices)
    assert torch.equal(masked.decode(indices), z)
    assert torch.equal(masked.decode(indices.to(torch.int16)), z)
    partials = list(masked.partials(indices))
    assert len(partials) == masked.depth
    assert torch.equal(partials[-1], z)
    assert all((partial[~MASK] == 0).all() for partial in partials)


def test_nothing_masked_changes_nothing() -> None:
    tree = TREES["residual"]()
    x = torch.randn(3, 5, 6)
    every = torch.ones(3, 5, dtype=torch.bool)
    got, want = Masked(copy.deepcopy(tree))(x, mask=every), tree(x)
    assert torch.equal(got.z, want.z)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.losses, want.losses)


@pytest.mark.parametrize("name", TREES)
def test_all_masked(name: str) -> None:
    masked = Masked(TREES[name]())
    before = {key: t.clone() for key, t in masked.state_dict().items()}
    x = torch.randn(3, 5, 6, requires_grad=True)
    none = torch.zeros(3, 5, dtype=torch.bool)
    z, indices, losses = masked(x, mask=none)
    assert not z.any()
    assert (indices == -1).all()
    assert losses.total() == 0
    (z.sum() + losses.total()).backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert all(p.grad is not None for p in masked.parameters())
    assert all(torch.equal(before[key], t) for key, t in masked.state_dict().items())
    assert torch.equal(masked.encode(x, mask=none), indices)
    assert torch.equal(masked.decode(indices), z)
    assert masked(x[:0], mask=none[:0]).z.shape == (0, 5, 6)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 4)])
def test_any_token_shape(shape: tuple[int, ...]) -> None:
    masked = Masked(ProductQuantizer(ResidualQuantizer(VQ(2, 8), 3), P=2))
    x, mask = torch.randn(*shape, 4), torch.rand(shape) < 0.5
    z, indices, _ = masked(x, mask=mask)
    assert z.shape == x.shape
    assert indices.shape == (*shape, 2, 3)
    assert torch.equal(masked.decode(indices), z)


def test_a_depth_for_each_sample_holds_for_its_tokens() -> None:
    tree = ResidualQuantizer(VQ(4, 16), 3)
    masked = Masked(copy.deepcopy(tree))
    x, depth = torch.randn(3, 5, 4), torch.tensor([3, 1, 2])
    got = masked(x, depth, mask=MASK)
    want = tree(x[MASK], depth[:, None].expand(3, 5)[MASK])
    assert torch.equal(got.z[MASK], want.z)
    torch.testing.assert_close(got.losses, want.losses)
    assert torch.equal(masked(x, 2, mask=MASK).z[MASK], tree(x[MASK], 2).z)
    with pytest.raises(ValueError, match=r"one integer a sample, shape \(3,\), got shape \(7,\)"):
        masked(x, torch.ones(7, dtype=torch.int64), mask=MASK)


def test_channel_first_goes_around_it() -> None:
    masked = Masked(Projected(VQ(3, 16), 6))
    wrapped = ChannelFirst(masked)
    x = torch.randn(3, 5, 6)
    want = masked(x, mask=MASK)
    got = wrapped(x.mT, mask=MASK)
    assert torch.equal(got.z, want.z.mT)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(wrapped.encode(x.mT, mask=MASK), want.indices)
    assert torch.equal(wrapped.decode(got.indices), got.z)
    assert torch.equal(list(wrapped.partials(got.indices))[-1], got.z)


def test_a_beam_search_of_the_valid_tokens() -> None:
    tree = ResidualQuantizer(VQ(4, 16), 3)
    x = torch.randn(3, 5, 4)
    got = beam_encode(Masked(tree), x, 4, mask=MASK)
    assert torch.equal(got[MASK], beam_encode(tree, x[MASK], 4))
    assert (got[~MASK] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    masked = Masked(VQ(6, 16))
    x = torch.randn(3, 5, 6).to(dtype)
    z, indices, _ = masked(x, mask=MASK)
    assert z.dtype == dtype
    assert torch.equal(indices, masked.encode(x.float(), mask=MASK))


PYRAMID = ResidualQuantizer(VQ(4, 8), multiscale=(1, 2))
BUILT: dict[str, tuple[Callable[[], Any], str]] = {
    "pyramid": (
        lambda: Masked(PYRAMID),
        r"ResidualQuantizer with scales \(1, 2\) takes whole grids",
    ),
    "channel-first": (lambda: Masked(ChannelFirst(VQ(4, 8))), r"write ChannelFirst\(Masked"),
    "twice": (lambda: Masked(Masked(VQ(4, 8))), "without their samples, which Masked has to see"),
    "perturbed": (lambda: Masked(Perturbed(VQ(4, 8), 3)), "which Perturbed has to see"),
    "projected": (lambda: Projected(Masked(VQ(4, 8)), 6), r"write Masked\(Projected"),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_does_not_stack(name: str) -> None:
    make, message = BUILT[name]
    with pytest.raises(ValueError, match=message):
        make()


MASKS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, r"a bool tensor of shape \(3, 5\) that is True for valid tokens, got None"),
    "integers": ({"mask": MASK.int()}, r"got torch.int32 \(3, 5\)"),
    "shape": ({"mask": MASK[:, :4]}, r"got torch.bool \(3, 4\)"),
    "channels": ({"mask": MASK[..., None]}, r"got torch.bool \(3, 5, 1\)"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_do_not_fit(name: str) -> None:
    arguments, message = MASKS[name]
    masked, x = Masked(VQ(6, 16)), torch.randn(3, 5, 6)
    for call in (masked, masked.encode):
        with pytest.raises(ValueError, match=message):
            call(x, **arguments)


def test_other_bad_input() -> None:
    masked = Masked(ResidualQuantizer(VQ(6, 16), 2))
    with pytest.raises(ValueError, match=r"expects tokens \(\*batch, 6\), got shape \(3, 6, 5\)"):
        masked(torch.randn(3, 6, 5), mask=MASK)
    with pytest.raises(ValueError, match=r"Masked expects floating-point vectors, got torch.int64"):
        masked(torch.zeros(3, 5, 6, dtype=torch.int64), mask=MASK)
    # a token with some steps, of which the others are padding
    with pytest.raises(ValueError, match=r"expects indices in 0..15, got -1..3"):
        masked.decode(torch.tensor([[3, -1], [-1, -1]]))
    with pytest.raises(ValueError, match=r"expects integer indices, got torch.float32"):
        masked.decode(torch.zeros(3, 2))
    for shape in ((), (3, 0), (3, 4)):
        with pytest.raises(ValueError, match=r"expects indices of shape \(\.\.\., 2\)"):
            masked.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask"):
        VQ(6, 16)(torch.randn(3, 5, 6), mask=MASK)
    x = torch.randn(3, 5, 6)
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="got 6 values that are NaN or infinite, among 42"):
        masked.encode(x, mask=MASK)


def test_all_ones_of_a_byte_are_no_padding() -> None:
    masked = Masked(VQ(2, 256))
    indices = torch.tensor([255, 0], dtype=torch.uint8)
    quantizer: Any = masked.quantizer
    assert isinstance(quantizer, Quantizer)
    assert torch.equal(masked.decode(indices), quantizer.decode(indices))
