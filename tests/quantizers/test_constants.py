"""Constants are made once, where they are needed, and never of what only stands for a tensor."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xq.quantizers import BSQ, VQ, ProductQuantizer, ResidualQuantizer, constants
from xq.quantizers.constants import constant


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_KEPT", {})


def pyramid() -> ProductQuantizer:
    return ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2, 5)), P=2)


def test_made_once_for_each_dtype_and_argument() -> None:
    x = torch.zeros(2)
    one = constant(torch.ones, 3, like=x)
    assert constant(torch.ones, 3, like=x) is one
    assert constant(torch.ones, 3, like=nn.Parameter(x)) is one
    assert constant(torch.ones, 3, like=x.double()).dtype == torch.float64
    assert constant(torch.ones, 3, like=x, dtype=torch.int64).dtype == torch.int64
    assert constant(torch.ones, 4, like=x).shape == (4,)
    assert constant(torch.zeros, 3, like=x).sum() == 0


def test_a_second_step_makes_nothing() -> None:
    quantizer = pyramid()
    x = torch.randn(2, 5, 5, 6)
    quantizer(x)
    before = dict(constants._KEPT)
    quantizer(x)
    copy.deepcopy(quantizer)(x)
    assert before
    assert constants._KEPT.keys() == before.keys()


def test_they_are_in_no_state() -> None:
    quantizer = pyramid()
    quantizer(torch.randn(2, 5, 5, 6))
    assert all("refine" in name for name in quantizer.state_dict())
    assert not list(quantizer.buffers())


def test_an_evaluation_first_spoils_no_training_step() -> None:
    quantizer = pyramid()
    x = torch.randn(2, 5, 5, 6)
    with torch.inference_mode():
        quantizer(x)
    z, _, losses = quantizer(x.requires_grad_())
    (z.square().sum() + losses.total()).backward()
    assert x.grad is not None


def test_nothing_fake_is_kept() -> None:
    fake_step()
    assert not any(isinstance(kept, FakeTensor) for kept in constants._KEPT.values())
    # nor does what was kept come in the way of fakes
    pyramid()(torch.randn(2, 5, 5, 6))
    assert constants._KEPT
    fake_step()


def fake_step() -> None:
    with FakeTensorMode():
        quantizer = ResidualQuantizer(BSQ(3), multiscale=(1, 2, 5))
        x = torch.randn(2, 5, 5, 3, requires_grad=True)
        z, _, losses = quantizer(x)
        (z.sum() + losses.total()).backward()


def test_a_functional_transform_first_spoils_nothing() -> None:
    quantizer = pyramid().eval()
    x = torch.randn(2, 5, 5, 6)

    def loss(x: Tensor) -> Tensor:
        return quantizer(x).z.square().sum()

    first = torch.func.grad(loss)(x)
    assert quantizer(x).z.shape == x.shape
    torch.testing.assert_close(torch.func.grad(loss)(x), first)


def test_built_on_meta_and_loaded() -> None:
    quantizer = pyramid()
    x = torch.randn(2, 5, 5, 6)
    want = quantizer(x).z
    with torch.device("meta"):
        assigned, emptied = pyramid(), pyramid()
        assert emptied(torch.randn(2, 5, 5, 6)).z.is_meta
    assigned.load_state_dict(quantizer.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(quantizer.state_dict())
    assert torch.equal(assigned(x).z, want)
    assert torch.equal(emptied(x).z, want)


def test_doubles_get_doubles() -> None:
    quantizer = pyramid().double()
    assert quantizer(torch.randn(2, 5, 5, 6, dtype=torch.float64)).z.dtype == torch.float64
    kept = [c for c in constants._KEPT.values() if c.is_floating_point()]
    assert kept
    assert all(c.dtype == torch.float64 for c in kept)


def test_a_scale_for_each_channel_is_made_once() -> None:
    branches = [VQ(2, 8, normalize=True), VQ(1, 8)]
    quantizer = ResidualQuantizer(ProductQuantizer(branches), depth=3)
    assert quantizer.step_shrink == (0.5, 0.5, 1.0)
    quantizer(torch.randn(4, 3))
    kept = len(constants._KEPT)
    assert kept
    quantizer(torch.randn(4, 3))
    assert len(constants._KEPT) == kept
