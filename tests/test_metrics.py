import itertools
import math
import re
from collections import Counter

import pytest
import torch

from xq.metrics import CodebookUsage, psnr
from xq.quantizers import BSQ, VQ, ChannelFirst, ProductQuantizer, ResidualQuantizer


def naive_usage(batches, codebook_size, code_shape=(), grids=()):
    """Used share, perplexity and bits, by counting with dictionaries."""
    counters: dict[tuple[int, ...], Counter] = {}
    scale_of_token = [s for s, (h, w) in enumerate(grids) for _ in range(h * w)]
    for batch in batches:
        for sample in batch.reshape(-1, *([len(scale_of_token)] if grids else []), *code_shape):
            for position in itertools.product(*map(range, sample.shape)):
                where = (scale_of_token[position[0]], *position[1:]) if grids else position
                counters.setdefault(where, Counter())[int(sample[position])] += 1
    shape = (*([len(grids)] if grids else []), *code_shape)
    used, perplexity, bits = torch.empty(shape), torch.empty(shape), torch.empty(shape)
    for where in itertools.product(*map(range, shape)):
        total = counters[where].total()
        shares = [n / total for n in counters[where].values()]
        entropy = -sum(p * math.log(p) for p in shares)
        used[where] = len(shares) / codebook_size
        perplexity[where], bits[where] = math.exp(entropy), entropy / math.log(2)
    return used, perplexity, bits


def tokens_of(quantizer, batch):
    h, w = quantizer.grids[-1] if quantizer.scales else (3, 5)
    return quantizer.encode(torch.randn(batch, h, w, quantizer.dim))


TREES = {
    "leaf": VQ(2, 11),
    "binary": BSQ(5),
    "residual": ResidualQuantizer(VQ(2, 11), depth=3),
    "product": ProductQuantizer(VQ(2, 11), P=2),
    "product-of-residuals": ProductQuantizer(ResidualQuantizer(VQ(2, 11), depth=3), P=2),
    "residual-of-products": ResidualQuantizer(ProductQuantizer(VQ(2, 11), P=2), depth=3),
    "pyramid": ResidualQuantizer(VQ(2, 11), multiscale=(1, 2, 4)),
    "pyramid-rectangular": ResidualQuantizer(VQ(2, 11), multiscale=((1, 2), (3, 2), (3, 5))),
    "pyramid-repeated-scale": ResidualQuantizer(VQ(2, 11), multiscale=(1, 1, 2)),
    "pyramid-product": ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2, 3)), P=2),
    "pyramid-of-products": ResidualQuantizer(ProductQuantizer(BSQ(3), P=2), multiscale=(1, (2, 3))),
    "pyramid-of-residuals": ResidualQuantizer(
        ProductQuantizer(ResidualQuantizer(BSQ(3), depth=2), P=3), multiscale=(1, 2)
    ),
    "wrapped": ChannelFirst(ProductQuantizer(VQ(2, 11), P=2)),
}


@pytest.mark.parametrize("name", TREES)
def test_equals_naive_counting_over_several_updates(name):
    quantizer = TREES[name]
    inner = quantizer.quantizer if isinstance(quantizer, ChannelFirst) else quantizer
    usage = CodebookUsage.of(quantizer)
    batches = [tokens_of(inner, batch) for batch in (1, 4, 2)]
    for batch in batches:
        usage.update(batch)
    want = naive_usage(batches, quantizer.codebook_size, quantizer.code_shape, quantizer.grids)
    got = usage.compute()
    for name_of_term, mine, theirs in zip(got._fields, got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, msg=lambda m, n=name_of_term: f"{n}: {m}")


def test_known_distribution():
    usage = CodebookUsage(8)
    usage.update(torch.tensor([0, 1, 2, 3]))
    used, perplexity, entropy = usage.compute()
    assert (used.item(), entropy.item()) == (0.5, 2.0)
    assert perplexity.item() == pytest.approx(4)


def test_dead_branch_shows():
    usage = CodebookUsage(4, (2,))
    usage.update(torch.stack([torch.arange(100) % 4, torch.zeros(100, dtype=torch.int64)], dim=-1))
    assert usage.compute().used.tolist() == [1.0, 0.25]
    assert usage.compute().entropy.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_of_any_width(dtype):
    wide, narrow = CodebookUsage(200, (2,)), CodebookUsage(200, (2,))
    indices = torch.randint(120, (9, 2))
    wide.update(indices)
    narrow.update(indices.to(dtype))
    assert torch.equal(wide.counts, narrow.counts)


def test_updating_takes_no_gradient_and_leaves_the_indices_alone():
    usage, indices = CodebookUsage(5, (2,)), torch.randint(5, (4, 2))
    before = indices.clone()
    usage.update(indices)
    assert torch.equal(indices, before)
    assert not usage.compute().entropy.requires_grad


def test_compute_leaves_the_counts_alone():
    usage = CodebookUsage(5)
    usage.update(torch.randint(5, (40,)))
    first, second = usage.compute(), usage.compute()
    assert all(map(torch.equal, first, second))
    assert usage.counts.sum() == 40


def test_reset():
    usage = CodebookUsage(5, (2,))
    usage.update(torch.randint(5, (40, 2)))
    usage.reset()
    assert usage.counts.count_nonzero() == 0
    usage.update(torch.full((3, 2), 4))
    assert usage.compute().perplexity.tolist() == [1.0, 1.0]


def test_nothing_counted():
    usage = CodebookUsage(5, (2,), [(1, 1), (2, 2)])
    assert usage.counts.count_nonzero() == 0
    used, perplexity, entropy = usage.compute()
    assert used.tolist() == [[0, 0], [0, 0]]
    assert perplexity.isnan().all()
    assert entropy.isnan().all()


def test_empty_batch():
    usage = CodebookUsage(5, (2,), [(1, 1), (2, 2)])
    usage.update(torch.zeros(0, 5, 2, dtype=torch.int64))
    assert usage.counts.count_nonzero() == 0


def test_leading_axes_of_any_number():
    usage, flat = CodebookUsage(5, (2,)), CodebookUsage(5, (2,))
    indices = torch.randint(5, (2, 3, 4, 2))
    usage.update(indices)
    flat.update(indices.reshape(-1, 2))
    usage.update(indices[0, 0, 0])
    flat.update(indices[:1, 0, 0])
    assert torch.equal(usage.counts, flat.counts)


def test_state_dict_resumes():
    first, second = CodebookUsage(5, (2,)), CodebookUsage(5, (2,))
    indices = torch.randint(5, (30, 2))
    first.update(indices[:10])
    second.load_state_dict(first.state_dict())
    for usage in (first, second):
        usage.update(indices[10:])
    assert torch.equal(first.counts, second.counts)
    assert all(map(torch.equal, first.compute(), second.compute()))


def test_counts_survive_half_precision():
    usage = CodebookUsage(3)
    usage.update(torch.zeros(70_000, dtype=torch.int64))
    assert usage.half().counts[0] == 70_000


@pytest.mark.parametrize(
    ("code_shape", "grids", "shape", "want"),
    [
        ((2,), (), (4, 3), "('...', 2)"),
        ((2, 3), (), (4, 3, 2), "('...', 2, 3)"),
        ((2, 3), (), (3,), "('...', 2, 3)"),
        ((2,), (), (), "('...', 2)"),
        ((), [(1, 1), (2, 2)], (5,), "('b', 5)"),
        ((), [(1, 1), (2, 2)], (2, 4), "('b', 5)"),
        ((), [(1, 1), (2, 2)], (2, 5, 1), "('b', 5)"),
        ((2,), [(1, 2), (3, 4)], (2, 2, 14), "('b', 14, 2)"),
        ((2,), [(1, 2), (3, 4)], (2, 13, 2), "('b', 14, 2)"),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_wrong_shapes(code_shape, grids, shape, want):
    usage = CodebookUsage(5, code_shape, grids)
    message = f"CodebookUsage expects indices of shape {want}, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        usage.update(torch.zeros(shape, dtype=torch.int64))
    assert usage.counts.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_indices_are_integers(dtype):
    with pytest.raises(ValueError, match=f"CodebookUsage counts integer indices, got {dtype}"):
        CodebookUsage(5).update(torch.zeros(4).to(dtype))


@pytest.mark.parametrize("stranger", [-1, 5], ids=["negative", "too-large"])
@pytest.mark.parametrize("branch", [0, 1])
def test_an_index_out_of_range_counts_for_no_one(stranger, branch):
    usage = CodebookUsage(5, (2,))
    indices = torch.ones(3, 2, dtype=torch.int64)
    indices[1, branch] = stranger
    low, high = min(stranger, 1), max(stranger, 1)
    with pytest.raises(ValueError, match=rf"counts indices in 0\.\.4, got {low}\.\.{high}"):
        usage.update(indices)
    assert usage.counts.count_nonzero() == 0


def test_too_many_counts():
    with pytest.raises(ValueError, match=r"would keep 20 x 4194304 counts; .*group of bits"):
        CodebookUsage(2**22, (2,), [(1, 1)] * 10)
    with pytest.raises(ValueError, match=r"would keep 1 x 1152921504606846976 counts"):
        CodebookUsage.of(BSQ(60, group_size=20))


def test_psnr():
    image, target = torch.rand(2, 3, 5, 7) * 2 - 1, torch.rand(2, 3, 5, 7) * 2 - 1
    error = ((image.double() - target.double()) ** 2).mean().item()
    assert psnr(image, target).item() == pytest.approx(10 * math.log10(4 / error), rel=1e-6)
    assert psnr(image, target, span=255.0).item() == pytest.approx(
        10 * math.log10(255**2 / error), rel=1e-6
    )


def test_psnr_of_known_images():
    black, grey = torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1)
    assert psnr(black, grey, span=1.0).item() == pytest.approx(20)
    assert psnr(grey, grey).item() == math.inf


def test_psnr_has_a_gradient():
    image = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: psnr(x, target), image)


def test_psnr_never_broadcasts():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3, 4, 4\) and \(3, 4, 4\)"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4))
