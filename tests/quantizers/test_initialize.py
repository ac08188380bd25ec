"""Codebooks that start at the data."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Quantizer,
    ResidualQuantizer,
    SimCodebook,
    initialize,
)
from xq.quantizers.kmeans import lloyd, plus_plus


def clusters(rows: int = 3000, dim: int = 6, centres: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dim, generator=generator) * 3
    which = torch.randint(centres, (rows,), generator=generator)
    return middle[which] + torch.randn(rows, dim, generator=generator)


def error(quantizer: Quantizer, x: Tensor) -> float:
    with torch.no_grad():
        return (quantizer(x).z - x).square().mean().item()


def naive_kmeans(x: Tensor, codes: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        chosen = torch.cdist(x, codes).argmin(1)
        hot = F.one_hot(chosen, len(codes)).to(x)
        codes = torch.where(
            hot.sum(0)[:, None] > 0, hot.T @ x / hot.sum(0).clamp(min=1)[:, None], codes
        )
    return codes


@pytest.mark.parametrize("codebook", [EMACodebook, nn.Identity])
def test_a_codebook_is_as_good_as_k_means(codebook: type) -> None:
    x = clusters()
    vq = VQ(6, 32, codebook=EMACodebook) if codebook is EMACodebook else VQ(6, 32)
    initialize(vq, x, iterations=25)
    runs = []
    for seed in range(5):
        torch.manual_seed(seed)
        codes = naive_kmeans(x, x[torch.randperm(len(x))[:32]].clone(), 60)
        runs.append((x - codes[torch.cdist(x, codes).argmin(1)]).square().mean().item())
    assert error(vq, x) <= 1.02 * min(runs)
    assert len(vq.encode(x).unique()) == 32


def test_lloyd_equals_the_naive_form() -> None:
    x, generator = clusters().double(), torch.Generator().manual_seed(0)
    start = plus_plus(x, 20, generator)
    codes, count = lloyd(x, start, 7, generator)
    torch.testing.assert_close(codes, naive_kmeans(x, start, 7))
    assert torch.equal(count, torch.bincount(torch.cdist(x, codes).argmin(1), minlength=20).to(x))


def test_lloyd_fills_empty_centres() -> None:
    x = clusters()
    start = torch.cat([x[:10], torch.full((6, 6), 1e3)])
    codes, count = lloyd(x, start, 5, torch.Generator().manual_seed(0))
    assert codes.abs().max() < 100
    assert (count > 0).all()


def test_plus_plus_spreads() -> None:
    """From each of some far clusters one is drawn, which a uniform draw would not do."""
    middle = 100.0 * torch.arange(16)[:, None]
    sizes = [2000, *[3] * 15]
    x = torch.cat([m + torch.rand(n, 1) for m, n in zip(middle, sizes, strict=True)])
    for seed in range(5):
        codes = plus_plus(x, 16, torch.Generator().manual_seed(seed))
        assert sorted((codes[:, 0] // 100).int().tolist()) == list(range(16))


def test_fewer_vectors_than_codes() -> None:
    vq = VQ(2, 9, codebook=EMACodebook)
    x = torch.randn(4, 2)
    initialize(vq, x)
    assert error(vq, x) < 1e-10
    assert vq.codebook.weight.isfinite().all()
    assert error(vq, x) < 1e-10


def test_each_step_is_set_for_what_the_one_before_leaves() -> None:
    """Sums of two codes are found exactly, which two codebooks set for the same input cannot do."""
    coarse = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0], [40.0, 40.0]])
    fine = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    x = (coarse[:, None] + fine).reshape(-1, 2).repeat(20, 1)
    residual = ResidualQuantizer(VQ(2, 4, codebook=EMACodebook), 2)
    initialize(residual, x)
    assert error(residual, x) < 1e-8


def test_a_shared_codebook_is_set_for_all_its_steps() -> None:
    x = clusters(dim=4)
    shared = ResidualQuantizer(VQ(4, 24, codebook=EMACodebook), 4, shared=True)
    initialize(shared, x)
    first = ResidualQuantizer(VQ(4, 24, codebook=EMACodebook), 4, shared=True)
    leaf = VQ(4, 24, codebook=EMACodebook)
    initialize(leaf, x)
    first.steps[0].load_state_dict(leaf.state_dict())
    # codes for the first step alone find nothing small enough later on
    assert error(shared, x) < 0.7 * error(first, x)


TREES = {
    "product": lambda: ProductQuantizer(ResidualQuantizer(VQ(3, 16), 2), P=2),
    "residual of products": lambda: ResidualQuantizer(ProductQuantizer(VQ(3, 16), P=2), 2),
    "normalized": lambda: ProductQuantizer(VQ(3, 16, normalize=True), P=2),
    "cosine": lambda: ProductQuantizer(VQ(3, 16, metric="cosine"), P=2),
    "mixed": lambda: ProductQuantizer([VQ(2, 16), VQ(4, 16, codebook=EMACodebook)]),
    "with signs": lambda: ProductQuantizer([VQ(2, 16, codebook=EMACodebook), BSQ(4)]),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("training", [False, True])
def test_any_tree(name: str, training: bool) -> None:
    x = clusters()
    torch.manual_seed(0)
    tree = TREES[name]().train(training)
    before = error(tree.eval(), tree.bound(x))
    tree.train(training)
    initialize(tree, x)
    assert tree.training is training
    tree.eval()
    # signs have nothing to set
    assert error(tree, tree.bound(x)) < (0.95 if name == "with signs" else 0.6) * before
    z, indices, _ = tree(x)
    assert torch.equal(tree.decode(indices), z)


def test_pyramids_and_wrappers() -> None:
    x = clusters(rows=20 * 9, dim=6).reshape(20, 9, 6).transpose(1, 2).reshape(20, 6, 3, 3)
    pyramid = ResidualQuantizer(VQ(4, 16, codebook=EMACodebook), multiscale=(1, 2, 3))
    wrapped = ChannelFirst(Projected(pyramid, 6))
    before = wrapped(x).losses.commitment
    initialize(wrapped, x)
    assert wrapped(x).losses.commitment < 0.75 * before


def test_one_seed_is_one_codebook_whatever_else_is_drawn() -> None:
    x, books = clusters(), []
    for seed in range(2):
        torch.manual_seed(seed)
        vq = VQ(6, 16)
        state = torch.get_rng_state()
        initialize(vq, x, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        books.append(vq.codebook.weight.detach())
    assert torch.equal(*books)
    initialize(vq, x, seed=4)
    assert not torch.equal(vq.codebook.weight, books[0])


def test_the_first_batch_weighs_as_much_as_the_start() -> None:
    x = clusters()
    vq = VQ(6, 16, codebook=partial(EMACodebook, decay=0.75))
    initialize(vq, x)
    codes = vq.codebook.weight.clone()
    part = x[:200]
    _, indices, _ = vq(part)
    # what was set is what is used, to the bit
    assert torch.equal(vq.codebook.weight, codes)
    share = torch.bincount(vq.encode(x), minlength=16) / len(x)
    hot = F.one_hot(indices, 16).float()
    torch.testing.assert_close(vq.codebook.count, 0.75 * 200 * share + 0.25 * hot.sum(0))
    total = 0.75 * 200 * share[:, None] * codes + 0.25 * hot.T @ part
    torch.testing.assert_close(vq.codebook.total, total, rtol=1e-4, atol=1e-4)
    count = vq.codebook.count.clone()
    _, indices, _ = vq(part)
    torch.testing.assert_close(
        vq.codebook.count, 0.75 * count + 0.25 * torch.bincount(indices, minlength=16)
    )


def test_saved_between_start_and_training() -> None:
    x = clusters()
    vq, again = (VQ(6, 16, codebook=EMACodebook) for _ in range(2))
    initialize(vq, x)
    again.load_state_dict(vq.state_dict())
    for part in x.split(500):
        vq(part), again(part)
    assert torch.equal(vq.codebook.total, again.codebook.total)


def test_with_a_tokenizer() -> None:
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 4}
    model = Tokenizer(CNNEncoder(4, **sizes), VQ(4, 8), CNNDecoder(4, **sizes))
    images = torch.randn(4, 3, 16, 16)
    initialize(model.quantizer, model.encoder(images))
    assert len(model.encode(images).unique()) == 8


def test_what_cannot_be_initialized() -> None:
    x = torch.randn(10, 4)
    with pytest.raises(TypeError, match="takes a quantizer or wrapper, got Linear; of"):
        initialize(nn.Linear(4, 4), x)
    with pytest.raises(ValueError, match=r"found no codebook in LFQ"):
        initialize(LFQ(4), x)
    with pytest.raises(ValueError, match=r"SimCodebook has no codes that could be set"):
        initialize(VQ(4, 8, codebook=SimCodebook), x)
    with pytest.raises(ValueError, match="iterations of zero or more, got -1"):
        initialize(VQ(4, 8), x, iterations=-1)
    with pytest.raises(ValueError, match="4 channels in the last axis"):
        initialize(VQ(4, 8), torch.randn(10, 5))
    with pytest.raises(ValueError, match="values that are NaN"):
        initialize(VQ(4, 8), torch.full((10, 4), float("nan")))
    vq = VQ(4, 8)
    with pytest.raises(ValueError, match="got no vectors, on any process"):
        initialize(vq, x[:0])
    # nothing looks on after an error
    assert vq.codebook.watcher is None
    vq(x)
