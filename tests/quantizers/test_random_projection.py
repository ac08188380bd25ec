"""RandomProjectionQuantizer: labels that nothing changes."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from xq.metrics import CodebookUsage
from xq.quantizers import RandomProjectionQuantizer


def seeded(**options) -> RandomProjectionQuantizer:
    generator = torch.Generator().manual_seed(5)
    return RandomProjectionQuantizer(9, 33, generator=generator, **options)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_nearest_by_angle_after_a_projection(normalize) -> None:
    quantizer = seeded(code_dim=7, num_codebooks=3, normalize=normalize)
    x = 3 + 2 * torch.randn(4, 5, 9)
    indices = quantizer.encode(x)
    assert indices.shape == (4, 5, 3)
    assert indices.dtype == torch.int64
    for i in range(4):
        for j in range(5):
            v = x[i, j].double()
            if normalize:
                v = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
            for k in range(3):
                projected = F.normalize(v @ quantizer.projection[k].double(), dim=0)
                codes = F.normalize(quantizer.codes[k].double(), dim=-1)
                assert indices[i, j, k] == (codes - projected).norm(dim=-1).argmin()


def test_xavier_uniform_projections_and_unit_normal_codes() -> None:
    quantizer = RandomProjectionQuantizer(300, 4000, code_dim=20, num_codebooks=2)
    limit = math.sqrt(6 / 320)
    assert quantizer.projection.abs().max() <= limit
    assert quantizer.projection.abs().max() > 0.99 * limit
    assert quantizer.projection.var().item() == pytest.approx(limit**2 / 3, rel=0.05)
    torch.testing.assert_close(quantizer.codes.norm(dim=-1), torch.ones(2, 4000))
    # normal, so no direction is preferred
    assert quantizer.codes.mean((0, 1)).abs().max() < 0.02
    assert not torch.equal(quantizer.codes[0], quantizer.codes[1])


def test_a_generator_repeats_the_draw() -> None:
    assert torch.equal(seeded().codes, seeded().codes)
    before = torch.random.get_rng_state()
    first = seeded().projection
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    other = RandomProjectionQuantizer(9, 33).projection
    assert not torch.equal(first, other)


def test_it_never_changes_and_has_no_gradient() -> None:
    quantizer = seeded(num_codebooks=2).train()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    x = torch.randn(50, 9, requires_grad=True)
    indices = quantizer.encode(x)
    assert torch.equal(quantizer(x), indices)
    assert torch.equal(quantizer.eval()(x), indices)
    assert not indices.requires_grad
    assert not list(quantizer.parameters())
    assert set(before) == {"projection", "codes"}
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key])


def test_copies_files_and_half_precision_give_the_same_labels(tmp_path) -> None:
    quantizer = seeded(num_codebooks=2)
    x = torch.randn(200, 9)
    want = quantizer.encode(x)
    fresh = RandomProjectionQuantizer(9, 33, num_codebooks=2)
    assert not torch.equal(fresh.encode(x), want)
    fresh.load_state_dict(quantizer.state_dict())
    quantizer.save_pretrained(tmp_path)
    read = RandomProjectionQuantizer.from_pretrained(tmp_path)
    for twin in (fresh, read, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(twin.encode(x), want)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        cast = copy.deepcopy(quantizer).to(dtype)
        assert torch.equal(cast.encode(rounded), quantizer.encode(rounded.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(x), want)
    assert torch.equal(quantizer.encode(x.double()), copy.deepcopy(quantizer).double()(x.double()))


def test_built_on_meta_and_loaded() -> None:
    quantizer = seeded()
    with torch.device("meta"):
        twin = RandomProjectionQuantizer(9, 33)
    twin.load_state_dict(quantizer.state_dict(), assign=True)
    x = torch.randn(20, 9)
    assert torch.equal(twin.encode(x), quantizer.encode(x))


def test_each_vector_has_mean_0_and_variance_1_before_it_is_projected() -> None:
    quantizer, plain = seeded(), seeded(normalize=False)
    x = torch.randn(200, 9)
    want = quantizer.encode(x)
    # without this, a mean that all vectors share would decide for all of them
    torch.testing.assert_close(quantizer.encode(100 + 10 * x), want)
    assert len(plain.encode(100 + 10 * x).unique()) < 5 < len(want.unique())
    assert torch.equal(plain.encode(F.layer_norm(x, (9,))), want)


def test_any_shape_and_the_usage_of_its_labels() -> None:
    quantizer = seeded(num_codebooks=2)
    assert quantizer.encode(torch.randn(9)).shape == (2,)
    assert quantizer.encode(torch.randn(0, 9)).shape == (0, 2)
    indices = quantizer.encode(torch.randn(3, 100, 9))
    usage = CodebookUsage(quantizer.codebook_size, quantizer.code_shape)
    usage.update(indices)
    assert quantizer.bits == pytest.approx(2 * math.log2(33))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "a positive dim, got dim=0"),
        ({"codebook_size": 0}, "a positive codebook_size, got codebook_size=0"),
        ({"code_dim": -1}, "a positive code_dim, got code_dim=-1"),
        ({"num_codebooks": 0}, "a positive num_codebooks, got num_codebooks=0"),
        ({"dim": 1}, "cannot normalize vectors of one channel, dim=1: pass normalize=False"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(options, message) -> None:
    with pytest.raises(ValueError, match=f"RandomProjectionQuantizer.* {message}"):
        RandomProjectionQuantizer(**{"dim": 4, "codebook_size": 8, **options})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 9, dtype=torch.int64), "expects floating-point vectors, got torch.int64"),
        (
            torch.randn(2, 9, 5),
            r"expects 9 channels in the last axis, got shape \(2, 9, 5\); x.mov",
        ),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.full((2, 9), math.nan), "got 18 values that are NaN or infinite, among 18"),
    ],
    ids=["integers", "channel-first", "a number", "NaN"],
)
def test_input_that_does_not_fit(x, message) -> None:
    with pytest.raises(ValueError, match=message):
        seeded().encode(x)


@pytest.mark.compile
def test_it_compiles_and_exports() -> None:
    torch._dynamo.reset()
    quantizer = seeded(num_codebooks=2)
    x = torch.randn(6, 9)
    want = quantizer.encode(x)
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(quantizer, (x,))
    assert torch.equal(program.module()(x), want)
