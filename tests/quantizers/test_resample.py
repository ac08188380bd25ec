"""Resampling by matrices gives what `F.interpolate` gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xq.quantizers import BSQ, ChannelFirst, Refine, ResidualQuantizer
from xq.quantizers.resample import area, area_weights, bicubic, bicubic_weights

RESAMPLE = {"area": area, "bicubic": bicubic}
# the second lot takes one matrix for rows and one for columns
SIZES = [
    ((1, 1), (11, 11)),
    ((3, 3), (11, 11)),
    ((2, 5), (7, 4)),
    ((11, 11), (3, 3)),
    ((5, 4), (5, 9)),
    ((7, 6), (1, 6)),
    ((8, 8), (11, 11)),
    ((13, 13), (16, 16)),
    ((16, 9), (10, 20)),
    ((16, 16), (13, 13)),
]


def interpolated(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode=mode).permute(0, 2, 3, 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mode", RESAMPLE)
def test_values_and_gradients_are_those_of_interpolate(mode: str, sizes: tuple) -> None:
    (h, w), size = sizes
    x = torch.randn(2, h, w, 3, dtype=torch.float64, requires_grad=True)
    got, want = RESAMPLE[mode](x, size), interpolated(x, size, mode)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, x, upstream)
    (grad_want,) = torch.autograd.grad(want, x, upstream)
    torch.testing.assert_close(grad, grad_want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mode", RESAMPLE)
def test_float32_is_exact_to_its_last_digits(mode: str, sizes: tuple) -> None:
    (h, w), size = sizes
    x = torch.randn(2, h, w, 3)
    want = interpolated(x.double(), size, mode).float()
    torch.testing.assert_close(RESAMPLE[mode](x, size), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [area_weights, bicubic_weights])
def test_each_new_cell_is_a_mean(weights) -> None:
    for cells in range(1, 9):
        for new in range(1, 9):
            rows = weights(cells, new, dtype=torch.float64)
            assert rows.shape == (new, cells)
            torch.testing.assert_close(rows.sum(1), torch.ones(new, dtype=torch.float64))


@pytest.mark.parametrize("mode", RESAMPLE)
def test_the_same_size_changes_nothing(mode: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(RESAMPLE[mode](x, (3, 4)), x)
    # nor does the layout of the input matter, bit for bit
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for size in ((3, 4), (5, 5), (16, 20)):
        assert torch.equal(RESAMPLE[mode](turned, size), RESAMPLE[mode](x, size))
        assert RESAMPLE[mode](turned, size).is_contiguous()


@pytest.mark.parametrize("mode", RESAMPLE)
@pytest.mark.parametrize("size", [(1, 2), (16, 16)])
def test_an_empty_batch_stays_in_the_graph(mode: str, size: tuple[int, int]) -> None:
    x = torch.randn(0, 9, 5, 3, requires_grad=True)
    y = RESAMPLE[mode](x, size)
    assert y.shape == (0, *size, 3)
    y.sum().backward()
    assert x.grad is not None


def test_channel_first_input_decodes_bit_for_bit() -> None:
    quantizer = ChannelFirst(ResidualQuantizer(BSQ(16), multiscale=(1, 3, 11))).eval()
    z, indices, _ = quantizer(torch.randn(4, 16, 11, 11))
    assert torch.equal(quantizer.decode(indices), z)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_a_refinement_is_the_mixture_of_its_input_and_its_convolution(ratio: float) -> None:
    refine = Refine(3, ratio).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    want = (1 - ratio) * x + ratio * F.conv2d(x, refine.weight, refine.bias, padding=1)
    got = refine(x)
    torch.testing.assert_close(got, want)
    inputs = (x, *refine.parameters())
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
