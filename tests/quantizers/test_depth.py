"""Quantizer dropout."""

import pytest
import torch

from xq.quantizers import DepthDropout


def test_a_share_of_the_samples_keeps_an_even_number_of_steps() -> None:
    drop = DepthDropout(depth=10, p=0.3, minimum=3)
    depths = torch.stack([drop(50) for _ in range(400)])
    assert depths.min() == 3
    assert depths.max() == 10
    # 15 samples are drawn, an eighth of which keep all 10 steps
    torch.testing.assert_close(
        (depths < 10).float().mean(), torch.tensor(0.3 * 7 / 8), atol=0.01, rtol=0
    )
    counts = torch.bincount(depths[depths < 10], minlength=10)[3:].float()
    assert (counts / counts.mean() - 1).abs().max() < 0.15


def test_small_batches_get_their_share_too() -> None:
    drop = DepthDropout(depth=4, p=0.1, minimum=1)
    dropped = torch.stack([drop(3) < 4 for _ in range(6000)])
    torch.testing.assert_close(dropped.float().mean(), torch.tensor(0.1 * 3 / 4), atol=0.01, rtol=0)
    per_sample = dropped.float().mean(0)
    assert (per_sample / per_sample.mean() - 1).abs().max() < 0.2, "every sample has its chance"


def test_the_number_of_drawn_samples_is_rounded_at_random() -> None:
    drop = DepthDropout(depth=1000, p=0.25, minimum=1)
    counts = {int((drop(10) < 1000).sum()) for _ in range(200)}
    assert counts == {2, 3}


def test_a_generator_decides() -> None:
    drop = DepthDropout(depth=6, p=0.5)
    one, two = (drop(32, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    before = torch.get_rng_state()
    drop(32, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_none_where_nothing_is_dropped() -> None:
    assert DepthDropout(depth=6, p=0.0)(8) is None
    drop = DepthDropout(depth=6).eval()
    assert drop(8) is None
    assert drop.is_full(None) is None
    assert drop.is_full(torch.tensor([6, 5, 6])).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 4, "p": 1.5}, r"p in \[0, 1\], got 1.5"),
        ({"depth": 4, "minimum": 5}, "got 5 and 4"),
        ({"depth": 4, "minimum": 0}, "got 0 and 4"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthDropout(**arguments)
