"""One contract for every quantizer and every nest."""

import itertools
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import inputs_for, leaves, trees

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    EMACodebook,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    rotation_trick,
)
from xq.testing import check_quantizer

SETTINGS = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


# with the jaxtyping hook beartype draws which items of a list it checks, which hypothesis minds
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@settings(SETTINGS, max_examples=30)
@given(quantizer=leaves())
def test_every_leaf_keeps_the_contract(quantizer: Quantizer) -> None:
    check_quantizer(quantizer, inputs_for(quantizer))


@pytest.fixture
def unannotated() -> Iterator[None]:
    """Leaves annotations unchecked: they take five sixths of the time of a large nest."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unannotated")
@settings(SETTINGS, max_examples=60)
@given(quantizer=trees())
def test_every_nest_keeps_the_contract(quantizer: Quantizer) -> None:
    check_quantizer(quantizer, inputs_for(quantizer))


SHAPES = {
    "vq": (VQ(8, 16), (2, 4, 4)),
    "residual": (ResidualQuantizer(VQ(8, 16), 8), (2, 4, 4, 8)),
    "product": (ProductQuantizer(VQ(4, 16), P=2), (2, 4, 4, 2)),
    "product of residuals": (
        ProductQuantizer(ResidualQuantizer(VQ(4, 16), 8), P=2),
        (2, 4, 4, 2, 8),
    ),
    "residual of products": (
        ResidualQuantizer(ProductQuantizer(VQ(4, 16), P=2), 8),
        (2, 4, 4, 8, 2),
    ),
    "pyramid": (ResidualQuantizer(VQ(8, 16), multiscale=(1, 2, 4)), (2, 21)),
    "product of pyramids": (
        ProductQuantizer(ResidualQuantizer(BSQ(4), multiscale=(1, 2, 4)), P=2),
        (2, 21, 2),
    ),
    "pyramid of residuals": (
        ResidualQuantizer(ResidualQuantizer(LFQ(8), 3), multiscale=(1, 2, 4)),
        (2, 21, 3),
    ),
    "residual of pyramids": (
        ResidualQuantizer(ResidualQuantizer(VQ(8, 16), multiscale=(1, 2, 4)), 3),
        (2, 21, 3),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_indices_are_the_token_shape_then_the_codes_shape(name: str) -> None:
    quantizer, shape = SHAPES[name]
    assert quantizer.encode(torch.randn(2, 4, 4, 8)).shape == shape


NESTS = {
    "product of different dims": ProductQuantizer([VQ(3, 16), VQ(5, 16, codebook=EMACodebook)]),
    "mixed leaves": ProductQuantizer([LFQ(4), BSQ(4), VQ(2, 16, normalize=True)]),
    "mixed steps": ResidualQuantizer([VQ(4, 16), LFQ(4)], shrink=0.5),
    "rotation": ProductQuantizer([VQ(4, 9, estimator=rotation_trick), VQ(2, 9)]),
    "the brief": ProductQuantizer(ResidualQuantizer(BSQ(12), depth=10, multiscale=True), P=2),
    "one token": ResidualQuantizer(VQ(4, 7), depth=1, multiscale=(1,)),
}


@pytest.mark.parametrize("name", NESTS)
def test_these_nests_keep_the_contract(name: str) -> None:
    check_quantizer(NESTS[name], inputs_for(NESTS[name], batch=2))


def test_the_estimator_acts_once_however_deep_the_nest() -> None:
    x = torch.randn(4, 3, 6, requires_grad=True)
    tree = ResidualQuantizer(ProductQuantizer(ResidualQuantizer(VQ(3, 8), 4), P=2), 5)
    tree(x).z.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_input_may_be_one_vector() -> None:
    quantizer = ResidualQuantizer(VQ(4, 8), 3)
    z, indices, _ = quantizer(torch.randn(4))
    assert z.shape == (4,)
    assert indices.shape == (3,)
    assert torch.equal(quantizer.decode(indices), z)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_decode_takes_integers_of_any_width(dtype: torch.dtype) -> None:
    quantizer = ResidualQuantizer(VQ(4, 8), 3)
    indices = quantizer.encode(torch.randn(5, 4))
    assert torch.equal(quantizer.decode(indices.to(dtype)), quantizer.decode(indices))


def test_doubles_stay_doubles() -> None:
    quantizer = ResidualQuantizer(VQ(4, 8), 3)
    z, _, losses = quantizer(torch.randn(5, 4, dtype=torch.float64))
    assert z.dtype == losses.commitment.dtype == torch.float64


def test_partials_never_yields_inside_its_autocast_context() -> None:
    quantizer = ResidualQuantizer(VQ(4, 8), 3)
    indices = quantizer.encode(torch.randn(5, 4))
    a = torch.randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = {(a @ a).dtype for _ in quantizer.partials(indices)}
    assert dtypes == {torch.bfloat16}


LEAVES = {
    "lfq": LFQ(8),
    "tanh": LFQ(8, bound="tanh"),
    "bsq": BSQ(8),
    "unit vq": VQ(8, 256, normalize=True),
    "vq": VQ(8, 256),
    "product": ProductQuantizer([LFQ(8), VQ(4, 256)]),
    "residual": ResidualQuantizer(BSQ(8), 2),
}


@pytest.mark.parametrize("name", LEAVES)
def test_each_step_of_a_flat_residual_refines(name: str) -> None:
    residual = ResidualQuantizer(LEAVES[name], depth=6).eval()
    x = torch.randn(2000, residual.dim)
    u = residual.bound(x)
    errors = [(z - u).square().mean().item() for z in residual.partials(residual.encode(x))]
    assert all(later < before for before, later in itertools.pairwise(errors)), errors


def test_without_shrinking_fixed_codes_would_not_refine() -> None:
    constant = ResidualQuantizer(LFQ(8), depth=4, shrink=1.0).eval()
    x = torch.randn(2000, 8)
    *_, third, fourth = (
        (z - x).square().mean().item() for z in constant.partials(constant.encode(x))
    )
    assert fourth > 0.9 * third
