"""SimVQ: a linear map of fixed vectors learns, the vectors do not."""

import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import VQ, ProductQuantizer, ResidualQuantizer, SimCodebook


def test_values_and_gradients_equal_the_formulas() -> None:
    vq = VQ(5, 13, codebook=SimCodebook).double()
    basis, weight = vq.codebook.basis, vq.codebook.transform.weight
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    z, indices, losses = vq(x)
    codes = basis @ weight.t()
    assert torch.equal(indices, torch.cdist(x, codes).argmin(-1))
    assert torch.equal(vq.decode(indices), z)
    codebook = F.mse_loss(codes[indices], x.detach())
    torch.testing.assert_close(losses.codebook, codebook)
    found = torch.autograd.grad(losses.total(), (x, weight))
    wanted = torch.autograd.grad(
        codebook + 0.25 * F.mse_loss(x, codes[indices].detach()), (x, weight)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_all_codes_move_and_none_by_itself() -> None:
    vq = VQ(4, 50, codebook=SimCodebook)
    assert [name for name, _ in vq.named_parameters()] == ["codebook.transform.weight"]
    basis, codes = vq.codebook.basis.clone(), vq.codebook.codes().detach()
    vq(torch.randn(1, 4)).losses.total().backward()
    torch.optim.SGD(vq.parameters(), lr=1.0).step()
    assert torch.equal(vq.codebook.basis, basis)
    assert ((vq.codebook.codes() - codes).abs().sum(-1) > 0).all()


def test_it_starts_with_the_variance_of_the_paper_and_copies_apart() -> None:
    book = SimCodebook(5000, 16)
    torch.testing.assert_close(book.basis.std(), torch.tensor(0.25), rtol=0.02, atol=0)
    one, two = ProductQuantizer(VQ(4, 50, codebook=SimCodebook), P=2).branches
    assert not torch.equal(one.codebook.basis, two.codebook.basis)
    assert not torch.equal(one.codebook.transform.weight, two.codebook.transform.weight)


def test_a_residual_has_a_map_for_each_step() -> None:
    residual = ResidualQuantizer(VQ(4, 16, codebook=SimCodebook), 3)
    residual(torch.randn(20, 4)).losses.total().backward()
    grads = [parameter.grad for parameter in residual.parameters()]
    assert len(grads) == 3
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_freezing_keeps_all_codes_or_none() -> None:
    book = SimCodebook(7, 4)
    book.freeze()
    assert book.is_frozen
    assert not book.codes().requires_grad
    book.unfreeze()
    assert book.codes().requires_grad
    with pytest.raises(ValueError, match=r"SimCodebook moves all codes at once.*freeze\(\) keeps"):
        book.freeze(torch.tensor([1, 2]))


def test_sizes_that_make_no_codebook() -> None:
    with pytest.raises(ValueError, match="SimCodebook needs a positive codebook_size and dim"):
        VQ(4, 0, codebook=SimCodebook)
