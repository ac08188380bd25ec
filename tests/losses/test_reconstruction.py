import numpy as np
import pytest
import torch

from xq.losses import L1, L2, l1, l2


def numbers(module, image, target):
    return module(torch.from_numpy(image), torch.from_numpy(target))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4,), ()])
def test_against_numpy(shape):
    random = np.random.default_rng(0)
    image, target = random.normal(size=shape), random.normal(size=shape)
    assert numbers(L1(), image, target).item() == pytest.approx(np.abs(image - target).mean())
    assert numbers(L2(), image, target).item() == pytest.approx(((image - target) ** 2).mean())


@pytest.mark.parametrize("loss", [L1(), L2()])
def test_gradients(loss):
    image, target = torch.randn(2, 2, 3, 3, 5, dtype=torch.float64)
    image.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(loss, (image, target))


@pytest.mark.parametrize("loss", [L1(), L2()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(loss, dtype):
    image = torch.full((1, 3, 64, 64), 200.0, dtype=dtype, requires_grad=True)
    target = torch.zeros(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(image, target)
    assert found.dtype == torch.float32
    # its square is too large for float16, its gradient too small for a sum in half precision
    assert found.item() == (200.0 if isinstance(loss, L1) else 40000.0)
    found.backward()
    assert image.grad.dtype == dtype
    assert image.grad.isfinite().all()
    assert (image.grad > 0).all()


@pytest.mark.parametrize("loss", [L1(), L2()])
def test_extremes(loss):
    image = torch.tensor([1e18, -1e18, 0.0], requires_grad=True)
    found = loss(image, torch.zeros(3))
    found.backward()
    assert found.isfinite()
    assert image.grad.isfinite().all()
    assert loss(image.detach(), image.detach()) == 0


@pytest.mark.parametrize(("function", "name"), [(l1, "l1"), (l2, "l2")])
def test_bad_input(function, name):
    with pytest.raises(ValueError, match=rf"{name} compares .* \(2, 3, 4, 4\).*\(2, 1, 4, 4\)"):
        function(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=rf"{name} expects floats, got torch.uint8.*127\.5"):
        function(torch.zeros(2, dtype=torch.uint8), torch.zeros(2))


@pytest.mark.compile
@pytest.mark.parametrize("loss", [L1(), L2()])
def test_one_graph(loss):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    image, target = torch.randn(2, 2, 3, 5, 7)
    assert torch.equal(compiled(image.requires_grad_(), target), loss(image, target))
