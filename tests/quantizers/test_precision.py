"""The float32 island: outside autocast, without TF32, and everything put back afterwards."""

import pytest
import torch

from xq.precision import float32_island, widen


@pytest.mark.parametrize("wide", [True, False])
def test_tf32_is_off_inside_and_as_it_was_outside(wide: bool) -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    try:
        matmul.allow_tf32 = conv.allow_tf32 = wide
        with pytest.raises(KeyError, match="inside"):
            raise_inside()
        assert tf32() == (wide, wide)
        assert (matmul.allow_tf32, conv.allow_tf32) == (wide, wide)
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def raise_inside() -> None:
    with float32_island("cuda"):
        assert tf32() == (False, False)
        raise KeyError("inside")


def tf32() -> tuple[bool, bool]:
    """Of matrix products and of convolutions, whichever way this torch keeps the flags."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32", conv.conv.fp32_precision == "tf32"
    return matmul.allow_tf32, conv.allow_tf32


def test_autocast_is_off_inside() -> None:
    a = torch.randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with float32_island("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_nothing_is_narrower_than_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert widen(torch.zeros(1, dtype=dtype)).dtype == wide
