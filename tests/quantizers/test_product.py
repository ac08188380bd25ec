"""ProductQuantizer: branches side by side."""

import pytest
import torch

from xq.quantizers import (
    BSQ,
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    fit,
    rotation_trick,
)


def test_branches_work_side_by_side() -> None:
    product = ProductQuantizer([VQ(3, 8), VQ(5, 8), VQ(2, 8)])
    x = torch.randn(6, 10)
    z, indices, losses = product(x)
    parts = [
        branch(part) for branch, part in zip(product.branches, x.split([3, 5, 2], -1), strict=True)
    ]
    assert torch.equal(z, torch.cat([q.z for q in parts], -1))
    assert torch.equal(indices, torch.stack([q.indices for q in parts], -1))
    torch.testing.assert_close(
        losses.commitment, torch.stack([q.losses.commitment for q in parts]).mean()
    )
    assert [part.shape[-1] for part in product.split(z)] == [3, 5, 2]


def test_the_estimator_acts_on_each_branch_alone() -> None:
    product = ProductQuantizer([VQ(3, 8, estimator=rotation_trick), VQ(3, 8)])
    x = torch.randn(6, 6, requires_grad=True)
    product(x).z.sum().backward()
    y = x.detach()[:, :3].clone().requires_grad_()
    product.branches[0](y).z.sum().backward()
    torch.testing.assert_close(x.grad[:, :3], y.grad)
    assert torch.equal(x.grad[:, 3:], torch.ones(6, 3))


def test_bsq_normalizes_each_branch() -> None:
    product = ProductQuantizer(BSQ(4), P=2)
    bounded = product.bound(torch.randn(5, 8))
    torch.testing.assert_close(bounded.view(5, 2, 4).norm(dim=-1), torch.ones(5, 2))


def test_shared_uses_one_module() -> None:
    product = ProductQuantizer(VQ(4, 8), P=3, shared=True)
    assert list(product.state_dict()) == ["branches.0.codebook.weight"]
    x = torch.randn(5, 4)
    indices = product.encode(torch.cat([x, x, x], -1))
    assert torch.equal(indices, indices[:, :1].expand(5, 3))


def test_copies_differ_from_the_original_and_from_one_another() -> None:
    original = ResidualQuantizer(VQ(4, 8), multiscale=(1, 2, 4))
    product = ProductQuantizer(original, P=2)
    weights = [original, *product.branches]
    for name, _ in original.named_parameters():
        a, b, c = (dict(q.named_parameters())[name] for q in weights)
        assert not torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not torch.equal(b, c), name


class Stubborn(Quantizer):
    """Has a parameter and no way to draw it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.codebook_size = 2, 1
        self.offset = torch.nn.Parameter(torch.zeros(2))

    def quantize(self, u: torch.Tensor, depth: object = None) -> Quantized:
        z = self.offset.expand_as(u)
        return Quantized(z, torch.zeros(u.shape[:-1], dtype=torch.int64), fit(u, z))

    def dequantize(self, indices: torch.Tensor) -> torch.Tensor:
        return self.offset.expand(*indices.shape, 2)


class Offset(Stubborn):
    """The same with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        del self.offset
        self.register_buffer("offset", torch.zeros(2))


class Spread(VQ):
    """Draws its codes in a way of its own."""

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.codebook.weight, 7.0)


def test_copies_keep_a_way_to_start_of_their_own() -> None:
    assert (ProductQuantizer(Spread(2, 4), P=2).branches[1].codebook.weight == 7).all()


def test_children_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Stubborn.*no reset_parameters.*pass a list"):
        ProductQuantizer(Stubborn(), P=2)
    with pytest.raises(ValueError, match=r"Offset.*no reset_parameters"):
        ProductQuantizer(Offset(), P=2)
    product = ProductQuantizer([Stubborn(), Stubborn()])
    assert product(torch.randn(3, 4)).indices.shape == (3, 2)

    locked = VQ(2, 4)
    locked.handle = open(__file__)  # noqa: SIM115
    with locked.handle, pytest.raises(ValueError, match=r"VQ cannot be copied .*pass a list"):
        ResidualQuantizer(locked, 2)


BAD = {
    "no count": (lambda: ProductQuantizer(VQ(4, 8)), "needs P branches, 1 or more, got P=None"),
    "P = 0": (lambda: ProductQuantizer(VQ(4, 8), P=0), "got P=0"),
    "P and list": (lambda: ProductQuantizer([VQ(4, 8)], P=2), "list of 1 quantizers.*got P=2"),
    "shared list": (lambda: ProductQuantizer([VQ(4, 8)], shared=True), "shared=True"),
    "vocabularies": (
        lambda: ProductQuantizer([VQ(4, 8), VQ(4, 9)]),
        "same codebook_size, got 8 for VQ 0 and 9 for VQ 1",
    ),
    "code shapes": (
        lambda: ProductQuantizer([VQ(4, 8), ResidualQuantizer(VQ(4, 8), 2)]),
        "same code_shape",
    ),
    "scales": (
        lambda: ProductQuantizer(
            [
                ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)),
                ResidualQuantizer(VQ(4, 8), multiscale=(2, 2)),
            ]
        ),
        "same grids, got",
    ),
    "depths": (
        lambda: ProductQuantizer([ResidualQuantizer(VQ(4, 8), 2), ProductQuantizer(VQ(2, 8), 2)]),
        "same depth",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_branches_that_differ_are_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


# under the jaxtyping hook the annotation refuses them first
NO_QUANTIZER = r"takes quantizers, got (ChannelFirst; wrappers|Linear)|parameter 'quantizer'"


@pytest.mark.parametrize("composite", [ProductQuantizer, ResidualQuantizer])
@pytest.mark.parametrize("child", [ChannelFirst(VQ(4, 8)), torch.nn.Linear(4, 4)])
def test_wrappers_and_other_modules_are_refused(composite: type, child: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match=NO_QUANTIZER):
        composite([child])
