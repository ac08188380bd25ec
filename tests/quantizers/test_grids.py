"""Pyramids: schedules, sharing, resampling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xq.quantizers import (
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Projected,
    Pyramid,
    Refine,
    ResidualQuantizer,
)
from xq.quantizers.grids import published_scales, shared_refinement


def test_sharing_is_frozen_to_the_published_table() -> None:
    table = [shared_refinement(k, 10, 4) for k in range(10)]
    assert table == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("refinements", range(1, 7))
def test_sharing_is_the_nearest_tick_in_numpys_doubles(refinements: int) -> None:
    edge = 1 / 3 / refinements if refinements == 4 else 1 / 2 / refinements
    ticks = np.linspace(edge, 1 - edge, refinements)
    for scales in range(2, 25):
        want = [int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales)]
        assert [shared_refinement(k, scales, refinements) for k in range(scales)] == want


@pytest.mark.parametrize("scales", range(1, 20))
def test_no_default_refinement_is_idle(scales: int) -> None:
    count = min(4, scales)
    assert {shared_refinement(k, scales, count) for k in range(scales)} == set(range(count))


def test_true_is_the_published_schedule() -> None:
    assert published_scales(10) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert published_scales(5) == (1, 2, 4, 8, 16)
    assert published_scales(1) == (16,)
    quantizer = ResidualQuantizer(VQ(4, 8), depth=10, multiscale=True)
    assert quantizer.num_tokens == 680
    assert len(quantizer.grid.refine) == 4


def test_down_is_area_and_up_is_bicubic_then_refined() -> None:
    refine = Refine(3)
    pyramid = Pyramid((2, (3, 5)), [refine])
    x = torch.randn(2, 3, 5, 3)
    first = x.permute(0, 3, 1, 2)
    want = F.adaptive_avg_pool2d(first, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(pyramid.down(x, 0), want)
    assert torch.equal(pyramid.down(x, 1), x)

    up = F.interpolate(want.permute(0, 3, 1, 2), (3, 5), mode="bicubic")
    want = 0.5 * up + 0.5 * F.conv2d(up, refine.weight, refine.bias, padding=1)
    torch.testing.assert_close(pyramid.up(pyramid.down(x, 0), 0), want.permute(0, 2, 3, 1))


def test_with_scales_shares_the_weights_and_changes_the_grid() -> None:
    tree = ProductQuantizer(ResidualQuantizer(VQ(4, 8), multiscale=(1, 2, 4)), P=2)
    wide = tree.with_scales((1, (2, 3), (4, 6), (4, 6)))
    assert wide.grids == ((1, 1), (2, 3), (4, 6), (4, 6))
    assert tree.scales == (1, 2, 4)
    assert wide.encode(torch.randn(2, 4, 6, 8)).shape == (2, 1 + 6 + 24 + 24, 2)
    assert {id(p) for p in wide.parameters()} == {id(p) for p in tree.parameters()}
    assert tree.encode(torch.randn(2, 4, 4, 8)).shape == (2, 21, 2)
    same = tree.with_scales(tree.scales)
    x = torch.randn(2, 4, 4, 8)
    assert torch.equal(same(x).z, tree(x).z)


def test_with_scales_keeps_steps_of_their_own() -> None:
    tree = ResidualQuantizer(VQ(4, 8), multiscale=(1, 2), shared=False)
    assert tree.with_scales((2, 4)).encode(torch.randn(1, 4, 4, 4)).shape == (1, 20)
    with pytest.raises(ValueError, match="2 steps of their own, got 3 scales"):
        tree.with_scales((1, 2, 4))


def test_with_scales_needs_scales() -> None:
    with pytest.raises(ValueError, match=r"VQ has no scales, so with_scales\(\(1, 2\)\)"):
        VQ(4, 8).with_scales((1, 2))
    with pytest.raises(ValueError, match="ResidualQuantizer has no scales"):
        ResidualQuantizer(VQ(4, 8), 2).with_scales((1, 2))


def test_sides_and_pairs_of_any_integers_make_a_pyramid() -> None:
    assert Pyramid([np.int64(1), [2, 3], (4, 4)]).scales == (1, (2, 3), (4, 4))
    product = ProductQuantizer(
        [
            ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)),
            ResidualQuantizer(VQ(4, 8), multiscale=((1, 1), (2, 2))),
        ]
    )
    assert product.grids == ((1, 1), (2, 2))


def test_with_scales_keeps_the_mode_and_the_class_and_draws_nothing() -> None:
    tree = ChannelFirst(Projected(ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)), 6)).eval()
    state = torch.get_rng_state()
    wide = tree.with_scales((1, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not wide.training
    assert type(wide) is ChannelFirst
    wide.quantizer.quantizer.grid.refine = torch.nn.ModuleList()
    assert len(tree.quantizer.quantizer.grid.refine) == 2


@pytest.mark.parametrize("scales", [(), (0, 2), (1, 4, 2), ((1, 5), (2, 2)), ((1, 2, 3),), (1.5,)])
def test_scales_that_make_no_pyramid_are_refused(scales: tuple) -> None:
    with pytest.raises((ValueError, TypeError), match="Pyramid"):
        Pyramid(scales)


def test_refinements_beyond_the_scales_are_kept_and_idle() -> None:
    pyramid = Pyramid((1, 2), [Refine(4) for _ in range(4)])
    assert len(pyramid.state_dict()) == 8
    assert pyramid.with_scales((1, 2, 3, 4)).up(torch.randn(1, 3, 3, 4), 2).shape == (1, 4, 4, 4)


def test_a_refinement_without_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio in \(0, 1\], got 0"):
        Refine(4, 0.0)
