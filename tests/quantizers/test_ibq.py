"""IBQ against its formula written out."""

import pytest
import torch
import torch.nn.functional as F
from test_entropy import LargestTensor

from xq.quantizers import (
    IBQ,
    VQ,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    blocks,
    ibq,
    passthrough,
)


def naive(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hard choice with the gradient of the soft one, times all codes."""
    soft = (x @ codes.t()).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), len(codes)).to(soft)
    return (hard + soft - soft.detach()) @ codes, hard.argmax(-1)


@pytest.mark.parametrize(("shape", "codes"), [((3, 7, 5), 13), ((1, 2), 1), ((9, 3), 40)])
def test_values_and_gradients_equal_the_formula(
    shape: tuple[int, ...], codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SCORES", 4 * codes)
    quantizer = IBQ(shape[-1], codes).double()
    weight = quantizer.codebook.weight
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(shape, dtype=torch.float64)
    z, indices, losses = quantizer(x)
    want, want_indices = naive(x, weight)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(z, want)
    found = torch.autograd.grad((z * cotangent).sum(), (x, weight), retain_graph=True)
    wanted = torch.autograd.grad((want * cotangent).sum(), (x, weight), retain_graph=True)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)

    hard = weight[indices]
    torch.testing.assert_close(losses.commitment, F.mse_loss(x, hard.detach()))
    torch.testing.assert_close(losses.codebook, F.mse_loss(hard, x.detach()))
    # the fit moves the chosen codes alone
    (grad,) = torch.autograd.grad(losses.codebook, weight)
    unused = torch.ones(codes).index_fill(0, indices.flatten(), 0).bool()
    assert not grad[unused].any()


def test_its_gradient_is_that_of_the_softmax() -> None:
    """Of the smooth function whose gradient it borrows, by finite differences."""
    codes = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    fixed, x = codes.detach(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    class Smooth(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, codes):
            ctx.save_for_backward(u, codes)
            return (u @ codes.t()).softmax(-1) @ fixed

        @staticmethod
        def backward(ctx, grad):
            return torch.ops.xq.propagate(*ctx.saved_tensors, grad)

    # the codes as values stay fixed, as scores they move: so their numbers are those of `fixed`
    assert torch.autograd.gradcheck(lambda x: Smooth.apply(x, codes), x)
    scores = torch.autograd.functional.jacobian(lambda c: (x @ c.t()).softmax(-1) @ fixed, codes)
    ours = torch.autograd.functional.jacobian(lambda c: Smooth.apply(x, c), codes)
    torch.testing.assert_close(ours, scores)


def test_every_code_learns_from_one_vector() -> None:
    quantizer = IBQ(4, 20, entropy_temperature=None)
    quantizer(torch.randn(1, 4)).z.square().sum().backward()
    assert (quantizer.codebook.weight.grad.abs().sum(-1) > 0).all()


def test_the_largest_product_wins_and_broken_codes_never() -> None:
    quantizer = IBQ(3, 50)
    with torch.no_grad():
        quantizer.codebook.weight.mul_(torch.linspace(0.1, 5, 50)[:, None]).add_(3.0)
        quantizer.codebook.weight[7] = quantizer.codebook.weight[3]
    x = 4 * torch.randn(200, 3)
    scores = x @ quantizer.codebook.weight.t()
    assert torch.equal(quantizer.encode(x), scores.argmax(-1))
    with torch.no_grad():
        quantizer.codebook.weight[20] = float("nan")
        quantizer.codebook.weight[21] = float("inf")
    scores[:, 20:22] = -torch.inf
    assert torch.equal(quantizer.encode(x), scores.argmax(-1))


def test_no_tensor_of_all_scores_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SCORES", 8 * 64)
    u, codes = torch.randn(100, 4), torch.randn(64, 4)
    with LargestTensor() as largest:
        ibq._propagate(u, codes, u)
    assert largest.elements == 8 * 64


REFUSED = {
    "step": lambda: ResidualQuantizer(IBQ(4, 8), 3),
    "shared": lambda: ResidualQuantizer(IBQ(4, 8), 3, shared=True),
    "pyramid": lambda: ResidualQuantizer(IBQ(4, 8), multiscale=(1, 2)),
    "product": lambda: ResidualQuantizer(ProductQuantizer([VQ(2, 8), IBQ(2, 8)]), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_no_step_of_a_residual(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot have (IBQ|ProductQuantizer) as a step"):
        REFUSED[name]()


def test_beside_other_steps_the_estimators_differ() -> None:
    with pytest.raises(ValueError, match="children with the same estimators"):
        ResidualQuantizer([VQ(4, 8), IBQ(4, 8)])


def test_in_a_product_each_branch_has_its_gradient() -> None:
    product = ProductQuantizer([VQ(2, 8), IBQ(3, 8)])
    alone: Quantizer = product.branches[1]  # pyright: ignore[reportAssignmentType]
    x = torch.randn(6, 5, requires_grad=True)
    product(x).z.square().sum().backward()
    part = x.detach()[:, 2:].clone().requires_grad_()
    alone(part).z.square().sum().backward()
    torch.testing.assert_close(x.grad[:, 2:], part.grad)
    torch.testing.assert_close(x.grad[:, :2], 2 * product(x).z[:, :2])


def test_passthrough_leaves_z_alone() -> None:
    u, z = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    assert passthrough(u, z) is z


def test_copies_start_apart_and_long_enough_to_tell_codes() -> None:
    one, two = ProductQuantizer(IBQ(8, 500), P=2).branches
    for branch in (one, two):
        assert 0.9 < branch.codebook.weight.std() < 1.1
    assert not torch.equal(one.codebook.weight, two.codebook.weight)
