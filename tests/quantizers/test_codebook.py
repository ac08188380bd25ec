"""Codes that are set, frozen, kept or added by hand."""

from functools import partial

import pytest
import torch
from torch import Tensor

from xq.quantizers import (
    VQ,
    Codebook,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    SimCodebook,
    add_codes,
    keep_codes,
    rotation_trick,
)

FACTORIES = {
    "ema": EMACodebook,
    "gradient": GradientCodebook,
    "gradient revived": partial(GradientCodebook, revive=0.1),
}
every_factory = pytest.mark.parametrize("name", FACTORIES)


def built(name: str, dim: int = 3, codes: int = 6, **options: object) -> VQ:
    vq = VQ(dim, codes, codebook=FACTORIES[name], **options)  # type: ignore[arg-type]
    vq.codebook.load_codes(torch.randn(codes, dim))
    return vq


def train(vq: VQ, steps: int = 4) -> None:
    """With all that moves a parameter: gradients, momentum, decay."""
    parameters = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5) if parameters else None
    for _ in range(steps):
        loss = vq(torch.randn(50, vq.dim)).losses.total()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@every_factory
def test_codes_that_were_set_are_there_and_stay(name: str) -> None:
    vq, codes = built(name), torch.randn(6, 3)
    train(vq)
    vq.codebook.load_codes(codes)
    assert torch.equal(vq.decode(torch.arange(6)), codes)
    # the next steps start from them, not from former statistics
    vq(codes.repeat(5, 1))
    vq(codes.repeat(5, 1))
    torch.testing.assert_close(vq.decode(torch.arange(6)), codes)


@every_factory
def test_frozen_codebooks_stay(name: str) -> None:
    vq = built(name)
    train(vq)
    vq.codebook.freeze()
    vq.eval()
    before = vq.decode(torch.arange(6))
    vq.train()
    state = {key: tensor.clone() for key, tensor in vq.state_dict().items()}
    train(vq)
    assert torch.equal(vq.decode(torch.arange(6)), before)
    for key, tensor in vq.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    vq.codebook.unfreeze()
    train(vq)
    assert not torch.equal(vq.decode(torch.arange(6)), before)


@every_factory
@pytest.mark.parametrize("as_mask", [False, True])
def test_single_frozen_codes_stay_and_others_move(name: str, as_mask: bool) -> None:
    vq = built(name)
    train(vq)
    frozen = torch.tensor([1, 4])
    vq.codebook.freeze(torch.zeros(6).index_fill(0, frozen, 1).bool() if as_mask else frozen)
    vq.eval()
    before = vq.decode(torch.arange(6))
    vq.train()
    train(vq)
    now = vq.decode(torch.arange(6))
    assert torch.equal(now[frozen], before[frozen])
    others = torch.tensor([0, 2, 3, 5])
    assert (now[others] != before[others]).any(-1).all()
    # what is saved is what is used
    again = built(name)
    again.load_state_dict(vq.state_dict())
    assert torch.equal(again.decode(torch.arange(6)), now)
    vq.codebook.unfreeze()
    assert torch.equal(vq.decode(torch.arange(6)), now)
    train(vq)
    assert (vq.decode(torch.arange(6))[frozen] != before[frozen]).any(-1).all()


def test_frozen_one_after_the_other() -> None:
    vq = built("gradient")
    vq.codebook.freeze(torch.tensor([0]))
    first = vq.decode(torch.tensor([0]))
    train(vq)
    vq.codebook.freeze(torch.tensor([5]))
    both = vq.decode(torch.tensor([0, 5]))
    train(vq)
    assert torch.equal(vq.decode(torch.tensor([0, 5])), both)
    assert torch.equal(both[:1], first)


@every_factory
def test_what_cannot_be_frozen_or_set(name: str) -> None:
    book = built(name).codebook
    with pytest.raises(ValueError, match=r"Codebook has 6 codes, got a mask of \(5,\)"):
        book.freeze(torch.zeros(5, dtype=torch.bool))
    for bad in (torch.tensor([6]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match=r"Codebook has the codes 0\.\.5, got"):
            book.freeze(bad)
    with pytest.raises(ValueError, match=r"takes codes of shape \(6, 3\), got .*\(5, 3\)"):
        book.load_codes(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"takes codes of shape \(6, 3\), got torch.int64"):
        book.load_codes(torch.zeros(6, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes that are NaN or infinite"):
        book.load_codes(torch.full((6, 3), float("nan")))
    for shares in (torch.ones(5), -torch.ones(6), torch.zeros(6)):
        with pytest.raises(ValueError, match="a share for each of its 6 codes, zero or more"):
            book.load_codes(torch.zeros(6, 3), shares)


@every_factory
def test_keeping_some_codes(name: str) -> None:
    vq = built(name, estimator=rotation_trick)
    train(vq)
    x = torch.randn(40, 3)
    used = torch.tensor([5, 0, 3])
    vq.eval()
    small, table = keep_codes(vq, used)
    assert small.codebook_size == small.codebook.codebook_size == 3
    assert small.estimator is rotation_trick
    assert table.tolist() == [1, -1, -1, 2, -1, 0]
    indices = used[torch.randint(3, (9,))]
    assert torch.equal(small.decode(table[indices]), vq.decode(indices))
    by_distance = torch.cdist(x, vq.codebook.codes()[used]).argmin(1)
    assert torch.equal(small.encode(x), by_distance)
    # the statistics come along, the old one stays as it is
    assert not small.training
    small.train()
    train(small)
    assert vq.codebook_size == 6
    assert not torch.equal(small.decode(torch.arange(3)), vq.decode(used))
    mask = torch.tensor([True, False, False, True, False, True])
    assert keep_codes(vq, mask)[1].tolist() == [0, -1, -1, 1, -1, 2]


@every_factory
@pytest.mark.parametrize("normalize", [False, True])
def test_adding_codes(name: str, normalize: bool) -> None:
    vq = built(name, normalize=normalize)
    train(vq)
    vq.eval()
    x = torch.cat([torch.randn(300, 3), torch.tensor([9.0, -9.0, 9.0]) + torch.randn(10, 3)])
    large = add_codes(vq, 16, x)
    old = torch.arange(6)
    assert torch.equal(large.decode(old), vq.decode(old))
    u = vq.bound(x)
    assert (large(x).z - u).square().mean() < 0.8 * (vq(x).z - u).square().mean()
    large.train()
    for _ in range(3):
        large(x)
    assert len(large.encode(x).unique()) > 10
    assert vq.codebook_size == 6


def test_what_cannot_be_resized() -> None:
    vq = VQ(3, 6)
    for bad in (torch.tensor([], dtype=torch.int64), torch.tensor([1, 1])):
        with pytest.raises(ValueError, match="keep_codes takes different codes, one or more"):
            keep_codes(vq, bad)
    with pytest.raises(ValueError, match=r"has the codes 0\.\.5, got \[6\]"):
        keep_codes(vq, torch.tensor([6]))
    with pytest.raises(ValueError, match="keep_codes takes a VQ, got ProductQuantizer; change"):
        keep_codes(ProductQuantizer(vq, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="a table of their own, which those of SimCodebook"):
        keep_codes(VQ(3, 6, codebook=SimCodebook), torch.tensor([0]))
    with pytest.raises(ValueError, match="add_codes makes a codebook larger, got codebook_size=6"):
        add_codes(vq, 6, torch.randn(5, 3))
    for x in (torch.randn(5, 4), torch.randn(0, 3), torch.full((2, 3), float("inf"))):
        with pytest.raises(ValueError, match=r"add_codes takes finite vectors \(\.\.\., 3\)"):
            add_codes(vq, 8, x)


def test_smoothing_is_laplace() -> None:
    vq = VQ(2, 4, codebook=partial(EMACodebook, decay=0.5, smoothing=0.3, revive=0.0))
    x = torch.randn(30, 2)
    for _ in range(3):
        vq(x)
    count, total = vq.codebook.count.clone(), vq.codebook.total.clone()
    vq.codebook.refresh()
    smoothed = (count + 0.3) / (count.sum() + 4 * 0.3) * count.sum()
    seen = count > 0
    torch.testing.assert_close(vq.codebook.weight[seen], (total / smoothed[:, None])[seen])
    with pytest.raises(ValueError, match="smoothing of zero or more, got -1"):
        EMACodebook(4, 2, smoothing=-1.0)


class Fixed(Codebook):
    """The least that a codebook must have."""

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, dim)
        self.register_buffer("table", torch.randn(codebook_size, dim))

    def codes(self) -> Tensor:
        return self.table


def test_a_codebook_of_ones_own() -> None:
    vq = VQ(3, 6, codebook=Fixed)
    x = torch.randn(20, 3)
    z, indices, losses = vq(x)
    assert torch.equal(z, vq.codebook.table[indices])
    assert losses.codebook == 0
    with pytest.raises(ValueError, match="Fixed has no codes that could be set one by one"):
        vq.codebook.load_codes(torch.zeros(6, 3))
