"""ResidualQuantizer against its recursion written out, values and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import BSQ, LFQ, VQ, ProductQuantizer, Pyramid, Refine, ResidualQuantizer


def test_multi_scale_equals_the_recursion_written_out() -> None:
    scales = (1, 2, 4)
    refine = [Refine(5) for _ in range(3)]
    residual = ResidualQuantizer(VQ(5, 16), multiscale=Pyramid(scales, refine))
    codes = residual.steps[0].codebook.weight
    torch.nn.init.normal_(codes)
    x = torch.randn(2, 4, 4, 5, requires_grad=True)
    z, indices, losses = residual(x)
    weight = torch.randn_like(z)
    ((z * weight).sum() + losses.total()).backward()
    got = [x.grad, *(p.grad.clone() for p in residual.parameters())]

    residual.zero_grad()
    y = x.detach().permute(0, 3, 1, 2).clone().requires_grad_()
    rest, total, tokens, loss = y.detach(), torch.zeros_like(y), [], 0.0
    for k, side in enumerate(scales):
        small = F.interpolate(rest, (side, side), mode="area").permute(0, 2, 3, 1)
        chosen = torch.cdist(small.reshape(-1, 5), codes).argmin(-1).view(2, side, side)
        up = F.interpolate(codes[chosen].permute(0, 3, 1, 2), (4, 4), mode="bicubic")
        up = 0.5 * up + 0.5 * F.conv2d(up, refine[k].weight, refine[k].bias, padding=1)
        rest, total = rest - up.detach(), total + up
        tokens.append(chosen.flatten(1))
        loss += 0.25 * F.mse_loss(y, total.detach()) + F.mse_loss(total, y.detach())
    straight = y + (total - y).detach()
    ((straight.permute(0, 2, 3, 1) * weight).sum() + loss / 3).backward()

    assert torch.equal(indices, torch.cat(tokens, dim=1))
    torch.testing.assert_close(z, total.permute(0, 2, 3, 1))
    torch.testing.assert_close(got[0], y.grad.permute(0, 2, 3, 1))
    for grad, parameter in zip(got[1:], residual.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_flat_steps_shrink_and_the_gradient_comes_once() -> None:
    residual = ResidualQuantizer(LFQ(3), depth=3)
    x = torch.tensor([[0.9, -0.3, 0.1]])
    z, indices, _ = residual(x)
    # 1 - .5 ..., -1 + .5 + .25, 1 - .5 - .25 (each step halves, zero is negative)
    torch.testing.assert_close(z, torch.tensor([[0.75, -0.25, 0.25]]))
    assert indices.shape == (1, 3)


def test_depth_drops_from_the_sum_and_from_the_losses() -> None:
    residual = ResidualQuantizer(VQ(4, 16), 3)
    x = torch.randn(4, 5, 4)
    depth = torch.tensor([1, 3, 2, 3])
    _, indices, losses = residual(x, depth)
    assert torch.equal(indices, residual.encode(x))
    partials = torch.stack(list(residual.partials(indices)))
    want = []
    for k in range(3):
        kept = depth > k
        want.append(F.mse_loss(partials[k][kept], x[kept]))
    torch.testing.assert_close(losses.commitment, torch.stack(want).mean())


def test_only_the_outermost_residual_obeys_the_depth() -> None:
    tree = ResidualQuantizer(ResidualQuantizer(VQ(4, 16), 3), 2)
    x = torch.randn(2, 4)
    inner_whole = tree.steps[0].decode(tree.encode(x)[:, 0])
    assert torch.equal(tree(x, depth=1).z, inner_whole)


def test_branches_of_a_product_obey_the_same_depth() -> None:
    tree = ProductQuantizer(ResidualQuantizer(VQ(4, 16), 3), P=2)
    x = torch.randn(3, 2, 8)
    depth = torch.tensor([1, 2, 3])
    z = tree(x, depth).z
    for branch, part, got in zip(tree.branches, tree.split(x), tree.split(z), strict=True):
        assert torch.equal(branch(part, depth).z, got)


def test_a_shared_step_is_stored_once() -> None:
    shared = ResidualQuantizer(VQ(4, 16), 5, shared=True)
    assert list(shared.state_dict()) == ["steps.0.codebook.weight"]
    assert shared.encode(torch.randn(3, 4)).shape == (3, 5)


def test_one_quantizer_is_shared_exactly_when_multi_scale() -> None:
    leaf = VQ(4, 16)
    assert ResidualQuantizer(leaf, multiscale=(1, 2)).steps[0] is leaf
    copies = ResidualQuantizer(leaf, 2).steps
    assert len(copies) == 2
    assert all(copy is not leaf for copy in copies)
    assert len(ResidualQuantizer(leaf, multiscale=(1, 2), shared=False).steps) == 2


BAD = {
    "no steps": (lambda: ResidualQuantizer(VQ(4, 8)), "needs depth, a list"),
    "depth 0": (lambda: ResidualQuantizer(VQ(4, 8), 0), "one number of steps, 1 or more, got 0"),
    "scales and depth": (
        lambda: ResidualQuantizer(VQ(4, 8), depth=2, multiscale=(1, 2, 4)),
        "got 2 by depth, 3 by multiscale",
    ),
    "list and depth": (
        lambda: ResidualQuantizer([VQ(4, 8), VQ(4, 8)], depth=3),
        "got 3 by depth, 2 by the list",
    ),
    "empty list": (lambda: ResidualQuantizer([]), "empty list"),
    "shared list": (
        lambda: ResidualQuantizer([VQ(4, 8)], shared=True),
        "with shared=True pass one quantizer",
    ),
    "dims": (
        lambda: ResidualQuantizer([VQ(4, 8), VQ(5, 8)]),
        "children with the same dim, got 4 for VQ 0 and 5 for VQ 1",
    ),
    "vocabularies": (lambda: ResidualQuantizer([VQ(4, 8), VQ(4, 9)]), "same codebook_size"),
    "domains": (
        lambda: ResidualQuantizer([VQ(4, 16, normalize=True), LFQ(4)]),
        "same domain, got 'sphere' for VQ 0 and 'real' for LFQ 1",
    ),
    "shrinks": (lambda: ResidualQuantizer([VQ(4, 16), LFQ(4)]), "same shrink"),
    "shrink": (lambda: ResidualQuantizer(LFQ(4), 2, shrink=0.0), r"shrink in \(0, 1\], got 0.0"),
    "a number of scales": (lambda: ResidualQuantizer(VQ(4, 8), multiscale=4), "multiscale"),
    "refinement": (
        lambda: ResidualQuantizer(VQ(4, 8), multiscale=Pyramid((1, 2), [Refine(7)])),
        r"4 channels, its Pyramid a Refine\(7\)",
    ),
    "nested pyramids": (
        lambda: ResidualQuantizer(
            ResidualQuantizer(BSQ(4), multiscale=(1, 2)), multiscale=(1, 2, 4)
        ),
        r"multiscale=\(1, 2, 4\) around a quantizer with scales \(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_contradict_each_other_are_refused(name: str) -> None:
    make, message = BAD[name]
    # under the jaxtyping hook the annotation refuses some first
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_an_outer_residual_finds_what_all_inner_steps_leave() -> None:
    assert ResidualQuantizer(LFQ(4), 3).shrink == 0.125
    assert ResidualQuantizer(LFQ(4), multiscale=(1, 2)).shrink == 0.5
    assert ProductQuantizer([LFQ(1), VQ(2, 2)]).shrink == (0.5, 1.0, 1.0)


SMOOTH = {
    "tanh": LFQ(3, bound="tanh"),
    "sphere": BSQ(3),
    "residual": ResidualQuantizer(LFQ(3, bound="tanh"), 2),
    "pyramid": ResidualQuantizer(BSQ(3), multiscale=(1, 2)),
    "product": ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2)), P=1),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("loss", ["commitment", "regularizer"])
def test_gradcheck_of_the_losses_towards_the_input(name: str, loss: str) -> None:
    quantizer = copy.deepcopy(SMOOTH[name]).double()
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: getattr(quantizer(x).losses, loss), x)


def test_gradcheck_of_the_codebook_loss_towards_the_refinements() -> None:
    quantizer = ResidualQuantizer(BSQ(3), multiscale=Pyramid((1, 2), [Refine(3)])).double()
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64)

    def of_the_convolution(weight: torch.Tensor) -> torch.Tensor:
        state = {"grid.refine.0.weight": weight}
        return torch.func.functional_call(quantizer, state, x).losses.codebook

    weight = quantizer.grid.refine[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(of_the_convolution, weight)


def test_mixed_estimators_are_refused() -> None:
    from xq.quantizers import rotation_trick

    with pytest.raises(ValueError, match="same estimators"):
        ResidualQuantizer([VQ(4, 8), VQ(4, 8, estimator=rotation_trick)])
