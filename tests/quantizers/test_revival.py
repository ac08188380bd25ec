"""Codes that nobody chooses start again at vectors of the batch."""

import io
from functools import partial

import pytest
import torch
from torch import Tensor

from xq.quantizers import (
    VQ,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    ResidualQuantizer,
    revive_in,
)

FACTORIES = {
    "ema": partial(EMACodebook, decay=0.9),
    "gradient": partial(GradientCodebook, decay=0.9, revive=0.02),
}


def batches(count: int, rows: int = 400, dim: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [5 + torch.randn(rows, dim, generator=generator) for _ in range(count)]


def used(vq: VQ, x: Tensor) -> float:
    return len(vq.encode(x).unique()) / vq.codebook_size


@pytest.mark.parametrize("name", FACTORIES)
def test_codes_far_from_the_data_come_to_it(name: str) -> None:
    vq, data = VQ(3, 200, codebook=FACTORIES[name]), batches(20)
    everything = torch.cat(data)
    assert used(vq, everything) < 0.2
    for x in data:
        z, indices, _ = vq(x)
        assert torch.equal(vq.decode(indices), z)
    vq(everything)
    assert used(vq, everything) > 0.97


@pytest.mark.parametrize("name", FACTORIES)
def test_without_it_they_stay(name: str) -> None:
    factory = partial(FACTORIES[name].func, revive=0.0)
    vq = VQ(3, 200, codebook=factory)
    before = vq.codebook.codes().clone()
    for x in batches(20):
        vq(x)
    moved = (vq.codebook.codes() != before).any(-1)
    assert moved.float().mean() < 0.2


@pytest.mark.parametrize("name", FACTORIES)
def test_a_revived_code_is_a_vector_of_the_batch(name: str) -> None:
    vq = VQ(2, 4, codebook=FACTORIES[name])
    far = torch.tensor([[0.0, 0.0], [90.0, 90.0], [80.0, -80.0], [-70.0, 70.0]])
    vq.codebook.load_codes(far, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    x = torch.rand(50, 2)
    vq(x)
    assert vq.encode(x).unique().tolist() == [0]
    vq.codebook.refresh()
    codes = vq.codebook.codes()
    match = (codes[1:, None] == x[None]).all(-1)
    if name == "ema":
        # total / count, which may round once
        match = torch.isclose(codes[1:, None], x[None], rtol=1e-6).all(-1)
    assert match.any(1).all()
    # not all at one place
    assert len(codes.unique(dim=0)) == 4
    # each weighs a part of the fair count
    assert vq.codebook.count.tolist() == pytest.approx([50, *[0.3 * 50 / 4] * 3])


def test_count_total_and_code_are_written_together() -> None:
    vq = VQ(3, 50, codebook=FACTORIES["ema"])
    for x in batches(5):
        vq(x)
        book = vq.codebook
        count, total = book.count.clone(), book.total.clone()
        book.refresh()
        alive = count > 0
        torch.testing.assert_close(book.weight[alive], (total / count[:, None])[alive])
        # a revived code is not dead again at once
        assert (count[alive] >= 0.02 * count.mean()).all()


def test_the_bound_is_a_share_of_the_fair_count() -> None:
    """So it means the same for small batches and large ones."""
    x = torch.cat([torch.zeros(99, 1), torch.ones(1, 1)])
    for repeats in (1, 30):
        for revive, stays in ((0.015, True), (0.03, False)):
            vq = VQ(1, 2, codebook=partial(EMACodebook, decay=0.0, revive=revive))
            vq.codebook.load_codes(torch.tensor([[0.0], [1.1]]))
            vq(x.repeat(repeats, 1))
            # one in a hundred is a fiftieth of the fair half
            assert (vq.codebook.count[1] == repeats).item() is stays


def test_the_bound_may_be_a_count() -> None:
    x = torch.cat([torch.zeros(99, 1), torch.ones(1, 1)])
    for repeats, stays in ((1, False), (3, True)):
        book = partial(EMACodebook, decay=0.0, revive=0.0, revive_below=2.0)
        vq = VQ(1, 2, codebook=book)
        vq.codebook.load_codes(torch.tensor([[0.0], [1.1]]))
        vq(x.repeat(repeats, 1))
        assert (vq.codebook.count[1] == repeats).item() is stays


@pytest.mark.parametrize("name", FACTORIES)
def test_a_run_that_is_resumed_revives_the_same(name: str) -> None:
    vq = VQ(3, 100, codebook=FACTORIES[name])
    for x in batches(3):
        vq(x)
    buffer = io.BytesIO()
    torch.save(vq.state_dict(), buffer)
    buffer.seek(0)
    again = VQ(3, 100, codebook=FACTORIES[name])
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for x in batches(3, seed=1):
        vq(x), again(x)
    for mine, theirs in zip(vq.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", FACTORIES)
def test_nothing_is_drawn_from_the_global_generator(name: str) -> None:
    vq = VQ(3, 100, codebook=FACTORIES[name])
    before = torch.get_rng_state()
    for x in batches(3):
        vq(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_rows_become_no_codes(name: str, value: float) -> None:
    vq = VQ(3, 100, codebook=FACTORIES[name])
    for x in batches(6):
        x[::2] = value
        vq(x)
    vq.codebook.refresh()
    assert vq.codebook.codes().isfinite().all()
    assert used(vq, batches(1, seed=5)[0]) > 0.3


@pytest.mark.parametrize("name", FACTORIES)
def test_single_frozen_codes_stay_dead(name: str) -> None:
    vq = VQ(3, 100, codebook=FACTORIES[name])
    vq.codebook.freeze(torch.tensor([4, 7]))
    before = vq.codebook.codes().clone()
    for x in batches(9):
        vq(x)
    moved = (vq.codebook.codes() != before).any(-1)
    assert not moved[[4, 7]].any()
    assert moved.sum() > 90


def test_rows_are_picked_all_over_the_batch() -> None:
    """Not from the same places of an image at each step, nor from neighbours."""
    vq = VQ(1, 64, codebook=partial(EMACodebook, revive=0.02))
    x = torch.arange(1024.0)[:, None]
    seen = []
    for _ in range(200):
        vq(x)
        rows = vq.codebook.pending_samples[:, 0].long()
        assert len(rows.unique()) == 64
        seen.append(rows)
    hits = torch.bincount(torch.cat(seen), minlength=1024)
    # 12.5 expected each
    assert hits.min() > 0
    assert hits.max() < 40
    columns = torch.bincount(torch.cat(seen) % 32)
    assert columns.min() > 0.8 * columns.float().mean()


def test_fewer_rows_than_codes_offer_each_once() -> None:
    vq = VQ(1, 64, codebook=EMACodebook)
    vq(torch.arange(10.0)[:, None])
    rows = vq.codebook.pending_samples
    assert sorted(rows[rows[:, 1] > 0][:, 0].tolist()) == list(range(10))


def test_a_shared_codebook_offers_rows_of_all_steps() -> None:
    residual = ResidualQuantizer(VQ(1, 64, codebook=EMACodebook), 4, shared=True)
    book = residual.steps[0].codebook
    book.load_codes(torch.linspace(0, 63, 64)[:, None])
    x = 1000 + torch.arange(640.0)[:, None]
    from_first = []
    for _ in range(20):
        residual(x)
        from_first.append((book.pending_samples[:, 0] >= 1000).float().mean())
        book.load_codes(torch.linspace(0, 63, 64)[:, None])
    # what later steps see is smaller by 63 each; codes were set 20 times, so each run is alike
    assert book.pending_visits == 0
    share = torch.stack(from_first).mean()
    assert 0 < share < 1


def test_momentum_of_revived_codes_is_forgotten() -> None:
    vq = VQ(2, 4, codebook=partial(GradientCodebook, revive=0.1))
    book = vq.codebook
    book.load_codes(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]]))
    optimizer = torch.optim.AdamW(vq.parameters(), lr=0.1)
    handle = revive_in(optimizer, vq)
    x = book.weight.detach().repeat(10, 1) + torch.randn(40, 2) * 0.1

    def train(dead: int) -> Tensor:
        optimizer.zero_grad()
        vq(x).losses.total().backward()
        # as if the batch had left this one out, and offered one row
        book.count[dead], book.samples[:] = 0.0, torch.tensor([50.0, 60.0, 1.0])
        optimizer.step()
        return book.weight[dead].detach().clone()

    assert train(dead=3).tolist() == [50.0, 60.0]
    moments = optimizer.state[book.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not moments[name][3].any()
        assert moments[name][:3].all()
    # what was offered serves once
    assert not book.samples.any()
    handle.remove()
    assert train(dead=2).tolist() != [50.0, 60.0]
    # without the hook the next learning forward does it, and the momentum stays
    vq(x)
    assert book.weight[2].tolist() == [50.0, 60.0]
    assert moments["exp_avg"][2].any()


def test_revive_in_says_what_is_missing() -> None:
    vq = VQ(2, 8)
    with pytest.raises(ValueError, match=r"found no GradientCodebook with revive above 0 in VQ"):
        revive_in(torch.optim.SGD(vq.parameters(), lr=0.1), vq)
    vq = VQ(2, 8, codebook=partial(GradientCodebook, revive=0.1))
    with pytest.raises(ValueError, match=r"SGD lacks the codes of a codebook in VQ"):
        revive_in(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1), vq)


@pytest.mark.parametrize("factory", [EMACodebook, GradientCodebook])
def test_bounds_out_of_range(factory: type) -> None:
    for options in ({"revive": -0.1}, {"revive": 1.0}, {"revive_below": -1.0}):
        with pytest.raises(ValueError, match=rf"{factory.__name__} needs revive in \[0, 1\)"):
            factory(4, 2, **options)
    with pytest.raises(ValueError, match=rf"{factory.__name__} needs a decay in .*got 1.5"):
        factory(4, 2, decay=1.5, revive=0.1)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_codebook_of_a_nest_is_revived(name: str) -> None:
    tree = ProductQuantizer(ResidualQuantizer(VQ(2, 60, codebook=FACTORIES[name]), 2), P=2)
    data = batches(30, dim=4)
    for x in data:
        tree(x)
    indices = tree.encode(torch.cat(data)).flatten(1)
    assert all(len(column.unique()) > 50 for column in indices.unbind(1))
