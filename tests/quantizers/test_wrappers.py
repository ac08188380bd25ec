"""ChannelFirst and Projected, around any tree."""

import pytest
import torch

from xq.quantizers import BSQ, LFQ, VQ, ChannelFirst, ProductQuantizer, Projected, ResidualQuantizer


def test_channel_first_moves_the_channels_and_nothing_else() -> None:
    tree = ProductQuantizer(ResidualQuantizer(BSQ(4), multiscale=(1, 2, 4)), P=2).eval()
    wrapped = ChannelFirst(tree).eval()
    x = torch.randn(2, 8, 4, 4)
    last = x.movedim(1, -1)
    assert torch.equal(wrapped(x).z, tree(last).z.movedim(-1, 1))
    assert torch.equal(wrapped.encode(x), tree.encode(last))
    indices = wrapped.encode(x)
    assert torch.equal(wrapped.decode(indices), wrapped(x).z)
    *_, whole = wrapped.partials(indices)
    assert torch.equal(whole, wrapped(x).z)
    names = "dim codebook_size code_shape scales grids bits num_tokens depth"
    for name in names.split():
        assert getattr(wrapped, name) == getattr(tree, name)
    wide = wrapped.with_scales((1, (2, 4)))
    assert wide.encode(torch.randn(1, 8, 2, 4)).shape == (1, 9, 2)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 5), (2, 4, 3, 5, 2)])
def test_channel_first_takes_any_grid(shape: tuple[int, ...]) -> None:
    wrapped = ChannelFirst(VQ(4, 8))
    z, indices, _ = wrapped(torch.randn(shape))
    assert z.shape == shape
    assert indices.shape == (shape[0], *shape[2:])


def test_partials_of_wrappers_are_exact_under_autocast() -> None:
    wrapped = Projected(ResidualQuantizer(VQ(3, 8), 3), 20)
    indices = wrapped.encode(torch.randn(4, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, whole = wrapped.partials(indices)
        assert torch.equal(whole, wrapped.decode(indices))
    assert torch.equal(whole, wrapped.decode(indices))


def test_projected_quantizes_in_fewer_dimensions() -> None:
    wrapped = Projected(LFQ(6), 20)
    x = torch.randn(3, 20, requires_grad=True)
    z, indices, losses = wrapped(x)
    inner = wrapped.quantizer(wrapped.project_in(x))
    torch.testing.assert_close(z, wrapped.project_out(inner.z))
    assert torch.equal(indices, inner.indices)
    torch.testing.assert_close(losses.commitment, inner.losses.commitment)
    (z.sum() + losses.total()).backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in wrapped.parameters())
    assert torch.equal(wrapped.decode(indices), z)


def test_wrappers_stack() -> None:
    wrapped = ChannelFirst(Projected(VQ(3, 8), 20))
    z, indices, _ = wrapped(torch.randn(2, 20, 5, 5))
    assert z.shape == (2, 20, 5, 5)
    assert indices.shape == (2, 5, 5)
    assert wrapped.dim == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wrappers_find_the_same_codes_in_half_precision(dtype: torch.dtype) -> None:
    wrapped = Projected(VQ(3, 64), 20)
    x = torch.randn(100, 20).to(dtype)
    want = wrapped.encode(x.float())
    assert torch.equal(wrapped.encode(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wrapped.encode(x.float()), want)
    assert wrapped(x).z.dtype == dtype
    assert torch.equal(wrapped.to(dtype).encode(x), want)


def test_bad_input_names_the_wrapper() -> None:
    with pytest.raises(ValueError, match=r"ChannelFirst\(VQ\) expects 4 channels in axis 1, got"):
        ChannelFirst(VQ(4, 8))(torch.randn(2, 5, 5, 4))
    with pytest.raises(ValueError, match=r"Projected expects 20 channels in the last axis"):
        Projected(VQ(4, 8), 20)(torch.randn(2, 20, 5))
    with pytest.raises(ValueError, match="Projected needs a positive dim, got 0"):
        Projected(VQ(4, 8), 0)
    # under the jaxtyping hook the annotation refuses it first
    with pytest.raises(TypeError, match=r"ChannelFirst wraps a quantizer, got Linear|'quantizer'"):
        ChannelFirst(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"ChannelFirst expects floating-point.*got torch.int64"):
        ChannelFirst(VQ(4, 8))(torch.zeros(2, 4, 3, dtype=torch.int64))
