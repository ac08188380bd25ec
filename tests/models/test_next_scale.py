"""Inputs of next-scale generators against the sums that `partials` gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xq.models import next_scale_input, teacher_forcing
from xq.models.next_scale import pyramid_within
from xq.quantizers import (
    BSQ,
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Projected,
    Pyramid,
    ResidualQuantizer,
)

SCALES = (1, (2, 1), (2, 3), 4, (5, 4))
TREES: dict[str, Callable[[], Any]] = {
    "pyramid": lambda: ResidualQuantizer(VQ(4, 16), multiscale=SCALES),
    "unrefined": lambda: ResidualQuantizer(BSQ(4), multiscale=Pyramid(SCALES), shrink=0.7),
    "product": lambda: ProductQuantizer(ResidualQuantizer(BSQ(4), multiscale=SCALES), P=2),
    "uneven": lambda: ProductQuantizer(
        [ResidualQuantizer(VQ(d, 16), multiscale=SCALES, shared=False) for d in (1, 3)]
    ),
    "of residuals": lambda: ResidualQuantizer(ResidualQuantizer(VQ(4, 8), 2), multiscale=SCALES),
    "nested": lambda: ProductQuantizer(
        ResidualQuantizer(ProductQuantizer(VQ(2, 8), P=2), multiscale=SCALES), P=2
    ),
    "one scale": lambda: ResidualQuantizer(VQ(4, 8), multiscale=((5, 4),)),
}


def naive(tree: Any, indices: Tensor) -> list[Tensor]:
    """The input of each scale but the first."""
    with torch.no_grad():
        sums = [z.movedim(-1, 1) for z in tree.partials(indices)]
    return [
        F.interpolate(z, grid, mode="area").flatten(2).mT
        for z, grid in zip(sums, tree.grids[1:], strict=False)
    ]


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> Any:
    return TREES[request.param]()


def codes_of(tree: Any) -> Tensor:
    return tree.encode(torch.randn(3, 5, 4, tree.dim))


def test_teacher_forcing(tree: Any) -> None:
    indices = codes_of(tree)
    want = torch.cat([torch.zeros(3, 0, tree.dim), *naive(tree, indices)], dim=1)
    got = teacher_forcing(tree, indices)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert got.shape == (3, indices.shape[1] - tree.grids[0][0] * tree.grids[0][1], tree.dim)


def test_scale_by_scale(tree: Any) -> None:
    indices, forced, z = codes_of(tree), [], None
    sizes = [h * w for h, w in tree.grids]
    with torch.no_grad():
        sums = list(tree.partials(indices))
    for k in range(len(sizes)):
        so_far = indices[:, : sum(sizes[: k + 1])]
        anew = next_scale_input(tree, so_far)
        inputs, z = next_scale_input(tree, so_far, z)
        assert torch.equal(z, sums[k])
        assert torch.equal(anew.z, z)
        assert torch.equal(anew.input, inputs)
        forced.append(inputs)
        # fewer scales have the leading inputs
        some = teacher_forcing(tree, so_far)
        assert torch.equal(some, teacher_forcing(tree, indices)[:, : some.shape[1]])
        assert some.shape[1] == so_far.shape[1] - sizes[0]
    assert torch.equal(torch.cat(forced, dim=1), teacher_forcing(tree, indices))
    assert forced[-1].shape == (3, 0, tree.dim)
    assert torch.equal(z, tree.decode(indices))


def test_each_scale_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES["pyramid"]()
    indices, z, start = codes_of(tree), None, 0
    seen = []
    up = tree.grid.up
    monkeypatch.setattr(tree.grid, "up", lambda z, k: seen.append(k) or up(z, k))
    for h, w in tree.grids:
        start += h * w
        _, z = next_scale_input(tree, indices[:, :start], z)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["pyramid", "product"])
def test_of_wrappers_the_tree_within_counts(name: str) -> None:
    tree = TREES[name]()
    indices = codes_of(tree)
    for wrapped in (ChannelFirst(tree), ChannelFirst(Projected(tree, 11))):
        assert torch.equal(teacher_forcing(wrapped, indices), teacher_forcing(tree, indices))
        got, want = (
            next_scale_input(wrapped, indices[:, :3]),
            next_scale_input(tree, indices[:, :3]),
        )
        assert torch.equal(got.input, want.input)
        assert torch.equal(got.z, want.z)


def test_autocast_and_narrow_integers() -> None:
    tree = TREES["product"]()
    indices = codes_of(tree)
    want = teacher_forcing(tree, indices), *next_scale_input(tree, indices[:, :3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = teacher_forcing(tree, indices), *next_scale_input(tree, indices[:, :3])
    narrow = indices.to(torch.int16)
    again = teacher_forcing(tree, narrow), *next_scale_input(tree, narrow[:, :3])
    for found in (got, again):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_an_empty_batch() -> None:
    tree = TREES["pyramid"]()
    indices = torch.zeros(0, tree.num_tokens, dtype=torch.int64)
    assert teacher_forcing(tree, indices).shape == (0, tree.num_tokens - 1, 4)


STEPS = ResidualQuantizer(ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)), 2)
BAD: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "leaf": (VQ(4, 8), (2, 5), "needs a quantizer whose steps are scales, .* got VQ with scales"),
    "flat": (ResidualQuantizer(VQ(4, 8), 2), (2, 5, 2), r"got ResidualQuantizer with scales \(\)"),
    "flat of pyramids": (STEPS, (2, 5, 2), r"with scales \(1, 2\) and code_shape \(2,\)"),
    "wrapped leaf": (ChannelFirst(VQ(4, 8)), (2, 5), "got VQ with scales"),
    "part of a scale": (
        ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)),
        (2, 4),
        r"indices of shape \(b, 5\), or those of some leading scales, got \(2, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    quantizer, shape, message = BAD[name]
    for call in (teacher_forcing, next_scale_input):
        with pytest.raises(ValueError, match=message):
            call(quantizer, torch.zeros(shape, dtype=torch.int64))


def test_no_quantizer() -> None:
    with pytest.raises(ValueError, match=r"teacher_forcing needs a quantizer, got Linear; of a to"):
        pyramid_within("teacher_forcing", torch.nn.Linear(1, 1))


def test_sums_that_do_not_fit() -> None:
    tree = TREES["pyramid"]()
    indices = codes_of(tree)
    _, z = next_scale_input(tree, indices[:, :1])
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 4\).*got \(3, 4, 5, 4\) with 2 scales"):
        next_scale_input(tree, indices[:, :3], z.transpose(1, 2))
    with pytest.raises(ValueError, match=r"None for the first; got .* with 1 scales"):
        next_scale_input(tree, indices[:, :1], z)
    with pytest.raises(ValueError, match=r"indices in 0..15, got 16..16"):
        teacher_forcing(tree, torch.full_like(indices, 16))
