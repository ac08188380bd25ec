import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import scipy.linalg
import torch

from xq.metrics import (
    CodebookUsage,
    FeatureMoments,
    FrechetDistance,
    Gaussian,
    RunningUtilisation,
    frechet_distance,
    psnr,
    ssim,
)
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


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (37, 24)], ids=str)
@pytest.mark.parametrize("span", [1.0, 2.0, 255.0])
def test_ssim_is_that_of_scikit_image(size, span):
    metrics = pytest.importorskip("skimage.metrics")
    target = torch.rand(3, 3, *size) * span - span / 2
    noise = torch.randn(3, 1, *size) * span * torch.tensor([0, 0.05, 0.5]).view(3, 1, 1, 1)
    image = target + noise
    want = [
        metrics.structural_similarity(
            *(x.double().numpy() for x in pair),
            channel_axis=0,
            data_range=span,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in zip(image, target, strict=True)
    ]
    got = ssim(image, target, span)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)
    assert got[0].item() == pytest.approx(1, abs=1e-12)


def test_ssim_of_bytes_is_that_of_floats_from_zero():
    target = torch.randint(128, (2, 3, 16, 20), dtype=torch.uint8)
    image = target + torch.randint(9, target.shape, dtype=torch.uint8)
    of_bytes = ssim(image, target, 255.0)
    torch.testing.assert_close(of_bytes, ssim(image / 255, target / 255, 1.0), rtol=0, atol=1e-6)
    # the luminance term knows where zero is
    shifted = ssim(image / 127.5 - 1, target / 127.5 - 1)
    assert (shifted - of_bytes).abs().max() > 1e-4


def test_a_span_that_is_too_large_flatters():
    image, target = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert ssim(image, target, 2.0) > ssim(image, target, 1.0) + 0.01


@pytest.mark.parametrize(
    ("shape", "span", "message"),
    [
        ((1, 3, 10, 30), 2.0, r"ssim takes images \(b, c, h, w\) of 11 x 11 pixels"),
        ((3, 30, 30), 2.0, r"got shape \(3, 30, 30\)"),
        ((1, 3, 30, 30), 0.0, "ssim needs a positive span, .* got 0.0"),
    ],
)
def test_what_ssim_refuses(shape, span, message):
    with pytest.raises(ValueError, match=message):
        ssim(torch.zeros(shape), torch.zeros(shape), span)


def test_ssim_compares_one_shape():
    with pytest.raises(ValueError, match=r"ssim compares images of one shape, got .*13\)"):
        ssim(torch.zeros(1, 3, 12, 12), torch.zeros(1, 3, 12, 13))


def naive_frechet(first, second):
    """The textbook formula, with scipy's square root of a matrix."""
    first, second = first.double().numpy(), second.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(first.T) @ np.cov(second.T))
    difference = first.mean(0) - second.mean(0)
    traces = np.trace(np.cov(first.T)) + np.trace(np.cov(second.T))
    return difference @ difference + traces - 2 * np.trace(root).real


def streamed(features, sizes, moments=None):
    moments = moments or FeatureMoments(features.shape[1])
    for part in features.split(sizes):
        moments.update(part)
    return moments


def two_sets(n, m, dim):
    mix = torch.randn(dim, dim)
    return torch.randn(n, dim) @ mix + 5, torch.randn(m, dim) @ (mix + 0.3 * torch.randn(dim, dim))


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 1), (200, 150, 12), (500, 500, 40)])
def test_frechet_distance_is_the_textbooks(n, m, dim):
    if dim == 1:
        first, second = torch.randn(n, 1) + 3, torch.randn(m, 1) * 2
        want = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    else:
        first, second = two_sets(n, m, dim)
        want = torch.tensor(naive_frechet(first, second))
    distance = FrechetDistance(dim)
    streamed(first, [7, n - 7], distance.made)
    streamed(second, 13, distance.reference)
    torch.testing.assert_close(distance.compute(), want.double(), rtol=1e-6, atol=0)


def test_frechet_distance_is_that_of_torch_fidelity():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    first, second = two_sets(300, 400, 24)
    stats = [metric_fid.fid_features_to_statistics(x.double()) for x in (first, second)]
    want = metric_fid.fid_statistics_to_metric(*stats, verbose=False)[metric_fid.KEY_METRIC_FID]
    got = frechet_distance(streamed(first, 50).compute(), streamed(second, 400).compute())
    assert got.item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(2, 3), (10, 64), (300, 20)])
def test_a_set_has_no_distance_from_itself(n, dim):
    features = 100 * torch.randn(n, dim) + 1000
    ours, theirs = streamed(features, 3).compute(), streamed(features.flip(0), n).compute()
    assert 0 <= frechet_distance(ours, theirs) < 1e-9 * ours.covariance.trace()
    assert frechet_distance(ours, ours) < 1e-9 * ours.covariance.trace()


@pytest.mark.parametrize("dim", [30, 400])
def test_few_samples_in_many_channels(dim):
    # the root of a product of covariances has the trace that the samples' own products have
    first, second = two_sets(25, 21, dim)
    centred = [(x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (first, second)]
    want = (first.double().mean(0) - second.double().mean(0)).square().sum()
    want = want + sum(x.square().sum() for x in centred)
    want = want - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    got = frechet_distance(streamed(first, 4).compute(), streamed(second, 5).compute())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_features_that_are_all_alike():
    alike = streamed(torch.ones(4, 3), 2).compute()
    other = streamed(torch.zeros(4, 3), 2).compute()
    assert frechet_distance(alike, other) == 3


def test_fewer_samples_than_channels():
    # of sets on two orthogonal subspaces the product of covariances is zero
    first, second = torch.zeros(5, 40), torch.zeros(7, 40)
    first[:, :20], second[:, 20:] = torch.randn(5, 20), torch.randn(7, 20)
    ours, theirs = streamed(first, 2).compute(), streamed(second, 2).compute()
    want = (ours.mean - theirs.mean).square().sum() + ours.covariance.trace()
    want = want + theirs.covariance.trace()
    torch.testing.assert_close(frechet_distance(ours, theirs), want, rtol=1e-7, atol=0)


def test_moments_far_from_zero():
    features = torch.randn(1000, 3, dtype=torch.float64) * 1e-3 + 1e4
    got = streamed(features, 17).compute()
    want = np.cov((features - 1e4).numpy().T)
    np.testing.assert_allclose(got.covariance.numpy(), want, rtol=1e-6, atol=1e-12)


def test_moments_take_empty_batches_and_resume():
    features = torch.randn(30, 4)
    moments = FeatureMoments(4)
    moments.update(features[:0])
    moments.update(features[:10])
    again = FeatureMoments(4)
    again.load_state_dict(moments.state_dict())
    again.update(features[10:])
    mean, covariance = again.compute()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.double().T))


def test_moments_survive_half_precision():
    assert FeatureMoments(3).half().scatter.dtype == torch.float64


def test_several_sets_share_a_reference():
    first = FrechetDistance(6)
    second = FrechetDistance(6, reference=first.reference)
    a, b = two_sets(50, 50, 6)
    streamed(a, 50, first.made)
    streamed(b, 50, second.made)
    streamed(b, 50, first.reference)
    assert second.compute() < 1e-9 < first.compute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureMoments(3).compute(), "has seen 0 features; a covariance needs two"),
        (lambda: streamed(torch.ones(1, 3), 1).compute(), "has seen 1 features"),
        (lambda: streamed(torch.full((4, 3), torch.nan), 2).compute(), "NaN or infinite"),
        (lambda: FeatureMoments(3).update(torch.ones(4, 2)), r"features \(n, 3\), got .*\(4, 2\)"),
        (lambda: FeatureMoments(3).update(torch.ones(3)), r"got torch.float32 of shape \(3,\)"),
        (lambda: FeatureMoments(3).update(torch.ones(4, 3).long()), "got torch.int64"),
        (
            lambda: FrechetDistance(3, reference=FeatureMoments(4)),
            "got dim=3 and a reference with dim=4",
        ),
        (
            lambda: frechet_distance(
                Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.zeros(3), torch.eye(3))
            ),
            r"frechet_distance compares features of one network, .*\(2,\) and \(3,\)",
        ),
    ],
)
def test_what_distances_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def naive_utilisation(batches, codebook_size, grids):
    """As the released training code goes through the scales, in plain loops."""
    visits, running = 0, [np.zeros(codebook_size) for _ in grids or [()]]
    ends = list(itertools.accumulate(h * w for h, w in grids)) or [None]
    for batch in batches:
        start = 0
        for scale, end in enumerate(ends):
            codes = batch[:, start:end] if grids else batch
            hits = np.bincount(codes.reshape(-1).numpy(), minlength=codebook_size)
            if visits == 0:
                running[scale] = hits.astype(float)
            elif visits < 100:
                running[scale] = running[scale] * 0.9 + hits * 0.1
            else:
                running[scale] = running[scale] * 0.99 + hits * 0.01
            visits, start = visits + 1, end
        tokens = len(batch) * math.prod(grids[-1]) if grids else batch.numel()
        margin = 0.08 * tokens / codebook_size
    return [float((mean >= margin).mean()) for mean in running]


@pytest.mark.parametrize("batches", [1, 3, 60])
@pytest.mark.parametrize("grids", [(), ((1, 1), (2, 2), (4, 4))], ids=["flat", "scales"])
def test_utilisation_is_that_of_the_training_code(batches, grids):
    tokens, codes = (21 if grids else 16), 60
    # rare and frequent codes
    draw = torch.distributions.Categorical(logits=torch.linspace(0, 6, codes))
    shown = [draw.sample((3, tokens)) for _ in range(batches)]
    utilisation = RunningUtilisation(codes, (), grids)
    for batch in shown:
        utilisation.update(batch)
    want = torch.tensor(naive_utilisation(shown, codes, grids))
    assert 0 < want.min() < 1
    torch.testing.assert_close(utilisation.compute(), want.reshape(utilisation.compute().shape))


def test_utilisation_of_branches_is_that_of_each():
    quantizer = TREES["pyramid-product"]
    both = RunningUtilisation.of(quantizer)
    each = [RunningUtilisation(8, (), quantizer.grids) for _ in range(2)]
    for _ in range(3):
        indices = tokens_of(quantizer, 2)
        both.update(indices)
        for branch, one in enumerate(each):
            one.update(indices[..., branch])
    assert torch.equal(both.compute(), torch.stack([one.compute() for one in each], -1))


def test_utilisation_of_coarse_scales_is_bounded_by_construction():
    grids = ((1, 1), (2, 2), (11, 11))
    few, exact = (kind(4096, (), grids) for kind in (RunningUtilisation, CodebookUsage))
    for _ in range(200):
        batch = torch.randint(4096, (8, 126))
        few.update(batch)
        exact.update(batch)
    shares = few.compute().tolist()
    assert shares[0] < 1 / (0.08 * 121)
    assert shares[1] < 4 / (0.08 * 121)
    assert exact.compute().used[0] > 0.3


def test_utilisation_resumes_and_survives_half_precision():
    first, second = RunningUtilisation(9), RunningUtilisation(9)
    batches = [torch.randint(9, (5,)) for _ in range(12)]
    for batch in batches[:6]:
        first.update(batch)
    first.half()
    assert first.running.dtype == torch.float32
    second.load_state_dict(first.state_dict())
    for batch in batches[6:]:
        first.update(batch)
        second.update(batch)
    assert torch.equal(first.running, second.running)
    assert torch.equal(first.compute(), second.compute())


def test_utilisation_of_nothing():
    with pytest.raises(ValueError, match="RunningUtilisation has seen no batch of indices"):
        RunningUtilisation(4).compute()
