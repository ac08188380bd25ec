"""The Triton kernels against a search in float64: on a GPU, or else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton")
from xq.quantizers.lookup import nearest, prepare
from xq.quantizers.lookup.triton import nearest_triton, refusal

MODULE = "xq.quantizers.lookup.triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
METRICS = ["euclidean", "cosine"]
# of vectors: short ones find nothing by their angle unless they are normalized
LENGTH = {"euclidean": 3.0, "cosine": 1e-5}
SIZES = [(1, 1, 1), (63, 37, 5), (100, 37, 16), (257, 1000, 8), (130, 513, 33), (20, 70, 300)]


@pytest.mark.skipif(INTERPRETED, reason="starts itself")
def test_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    """In its own process: the variable is read at import, and by torch's compiler too."""
    hook = "--jaxtyping-packages=xq.quantizers.lookup,beartype.beartype"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", hook, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


marks = [pytest.mark.gpu]
if INTERPRETED or not torch.cuda.is_available():
    marks.append(pytest.mark.skip(reason="needs a CUDA device"))
on_gpu = pytest.param("cuda", marks=marks)


@pytest.fixture(params=["cpu" if INTERPRETED else on_gpu])
def device(request: pytest.FixtureRequest) -> str:
    """The interpreter's in its process, else a GPU."""
    return request.param


@pytest.fixture(params=[on_gpu])
def cuda(request: pytest.FixtureRequest) -> str:
    return request.param


def table(codes: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The rows and the centre that the kernels want, the padding full of NaN."""
    codes = normalize(codes.float(), dim=-1) if metric == "cosine" else codes.float()
    fit = codes.isfinite().all(-1, keepdim=True)
    centre = codes.where(fit, 0).sum(0) / fit.sum().clamp(min=1)
    points = (codes - centre).where(fit, 0)
    halves = (points.square().sum(-1, keepdim=True) / 2).where(fit, torch.inf)
    return torch.cat([points, halves, torch.full_like(halves, torch.nan)], 1), centre


def search(x: Tensor, codes: Tensor, metric: str = "euclidean") -> Tensor:
    rows, centre = table(codes, metric)
    assert refusal(x) is None
    return nearest_triton(x, rows, centre, metric == "cosine")


def check(x: Tensor, codes: Tensor, metric: str = "euclidean") -> None:
    """Each code is the nearest, or as near as float32 can tell; nearly all are the nearest."""
    found = search(x, codes, metric)
    assert found.dtype == torch.int64
    x, codes = x.double(), codes.double()
    if metric == "cosine":
        x, codes = normalize(x, dim=-1), normalize(codes, dim=-1)
    squares = torch.stack([(codes - one).square().sum(-1) for one in x])
    least, want = squares.min(-1)
    scale = (x - codes.mean(0)).square().sum(-1) + least
    excess = squares.gather(-1, found[:, None])[:, 0] - least
    assert (excess <= 1e-6 * scale).all(), (excess / scale).max()
    assert (found == want).double().mean() >= 0.99


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "dim"), [*SIZES, (3, 70, 512)], ids=str)
def test_finds_the_nearest(n: int, k: int, dim: int, metric: str, device: str) -> None:
    x, codes = torch.randn(n, dim, device=device), torch.randn(k, dim, device=device)
    check(LENGTH[metric] * x, codes + 1, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [6, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_searched_in_float32(
    dtype: torch.dtype, dim: int, metric: str, device: str
) -> None:
    x, codes = torch.randn(140, dim, device=device), torch.randn(130, dim, device=device)
    check(x.to(dtype), codes.to(dtype), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_by_way_of_nearest(metric: str, device: str) -> None:
    x, codes = torch.randn(4, 7, 5, 3, device=device), torch.randn(70, 5, device=device)
    codes[11], codes[60] = torch.nan, codes[3]
    found = nearest(x.movedim(2, -1), codes, metric, backend="triton")
    assert torch.equal(found, nearest(x.movedim(2, -1), codes, metric, backend="chunked"))
    same = torch.randn(5, device=device).expand(6, 9, 5)
    found = nearest(same, prepare(codes, metric), backend="triton")
    assert torch.equal(found, nearest(same, codes, metric, backend="chunked"))


def test_far_from_the_origin(device: str) -> None:
    x, codes = torch.randn(70, 8, device=device), torch.randn(90, 8, device=device)
    check(x + 1000, codes + 1000)


@pytest.mark.parametrize("span", [64, 10**6], ids=["split", "whole"])
def test_the_lowest_index_wins_ties(
    span: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}._LEAST_SPAN", span)
    # small integers, whose scores have no rounding and often tie: in a group, a block and beyond
    codes = torch.randint(-2, 3, (150, 3), device=device).float()
    codes = torch.cat([codes.repeat_interleave(2, 0), codes])
    x = torch.randint(-2, 3, (140, 3), device=device).float()
    halves = codes.square().sum(-1, keepdim=True) / 2
    found = nearest_triton(x, torch.cat([codes, halves], 1), codes.new_zeros(3), False)
    scores = (halves[:, 0] - x @ codes.t()).cpu()
    ties = scores == scores.amin(-1, keepdim=True)
    assert ties.sum() > 2 * len(x)
    assert torch.equal(found.cpu(), ties.int().argmax(-1))


def test_codes_split_among_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.randn(140, 6, device=device), torch.randn(500, 6, device=device)
    monkeypatch.setattr(f"{MODULE}._LEAST_SPAN", 64)
    monkeypatch.setattr(f"{MODULE}._PROGRAMS", 1)
    whole = search(x, codes)
    for programs in (4, 6, 10**4):
        monkeypatch.setattr(f"{MODULE}._PROGRAMS", programs)
        assert torch.equal(search(x, codes), whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize(("dim", "metric"), [(5, "euclidean"), (40, "cosine")])
def test_a_vector_that_is_not_finite_spoils_no_other(dim: int, metric: str, device: str) -> None:
    x, codes = torch.randn(200, dim, device=device), torch.randn(150, dim, device=device)
    want = search(x, codes, metric)
    x[3, 2], x[70], x[199, 4] = torch.nan, torch.nan, torch.nan
    x[5, 1], x[71], x[198, 0] = torch.inf, -torch.inf, torch.inf
    found = search(x, codes, metric)
    assert found[[3, 70, 199]].tolist() == [0, 0, 0]
    assert found.min() >= 0
    assert found.max() < len(codes)
    finite = x.isfinite().all(-1)
    assert torch.equal(found[finite], want[finite])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_code_that_is_not_finite_is_never_nearest(device: str) -> None:
    x, codes = torch.randn(90, 5, device=device), torch.randn(150, 5, device=device)
    codes[0, 1], codes[7], codes[149, 2] = torch.nan, torch.inf, -torch.inf
    fit = codes.isfinite().all(-1)
    places = fit.nonzero()[:, 0]
    assert torch.equal(search(x, codes), places[search(x, codes[fit])])
    assert search(x, torch.full_like(codes, torch.nan)).unique().tolist() == [0]
    # nor where the only finite ones are behind whole blocks of others
    codes[:140] = torch.nan
    assert search(x, codes).min() >= 140


@pytest.mark.parametrize(("dim", "metric"), [(4, "cosine"), (40, "euclidean")])
def test_takes_views(dim: int, metric: str, device: str) -> None:
    codes = torch.randn(70, dim, device=device) + 1
    x = LENGTH[metric] * torch.randn(dim, 150, device=device)
    want = search(x.t().contiguous(), codes, metric)
    assert torch.equal(search(x.t(), codes, metric), want)
    assert torch.equal(search(x.t()[::3], codes, metric), want[::3])
    assert torch.equal(search(x[:, 1:2].t().expand(9, dim), codes, metric), want[1:2].expand(9))
    assert search(x[0, 0].expand(9, dim), codes, metric).unique().numel() == 1
    padded = torch.full((150, 2 * dim + 1), torch.inf, device=device)
    padded[:, 1::2] = x.t()
    assert torch.equal(search(padded[:, 1::2], codes, metric), want)


@pytest.mark.parametrize("k", [128, 100])
def test_rows_may_lie_side_by_side(k: int, device: str) -> None:
    x, codes = torch.randn(50, 7, device=device), torch.randn(k, 7, device=device)
    rows, centre = table(codes)
    want = nearest_triton(x, rows, centre, False)
    assert torch.equal(nearest_triton(x, rows.t().contiguous().t(), centre, False), want)
    apart = torch.full((k, 30), torch.nan, device=device)
    apart[:, 3:12] = rows
    centre = torch.stack([centre, centre * torch.nan], 1)[:, 0]
    assert torch.equal(nearest_triton(x, apart[:, 3:12], centre, False), want)


def test_nothing_to_look_up(device: str) -> None:
    x, codes = torch.randn(0, 4, device=device), torch.randn(9, 4, device=device)
    assert search(x, codes).shape == (0,)


REFUSED = {
    "dtype": (lambda x: x.double(), "float32 and the tensors are torch.float64"),
    "dim": (lambda x: x.expand(5, 600), "dim 600 exceeds 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_it_refuses(name: str, device: str) -> None:
    change, message = REFUSED[name]
    x = torch.randn(5, 1, device=device)
    assert message in str(refusal(change(x)))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes them")
def test_refuses_other_devices() -> None:
    x = torch.randn(5, 1)
    assert refusal(x) == "the tensors are on cpu"
    assert refusal(x.to("meta")) == "the tensors are on meta"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 32, 64, 256])
def test_large_and_exact_beside_tf32(
    dim: int, metric: str, cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x, codes = torch.randn(65536, dim, device=cuda), torch.randn(16384, dim, device=cuda)
    found = search(x, codes, metric)
    sample = torch.randperm(len(x), device=cuda)[:500]
    check(x[sample], codes, metric)
    # the answer for a vector does not depend on its neighbours nor on how codes are split
    assert (search(x[sample], codes, metric) == found[sample]).double().mean() >= 0.999


def test_neither_waits_for_the_device_nor_fills_it(cuda: str) -> None:
    x, codes = torch.randn(65536, 16, device=cuda), torch.randn(16384, 16, device=cuda)
    rows, centre = table(codes)
    nearest_triton(x, rows, centre, False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = nearest_triton(x, rows, centre, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= found.nbytes + codes.nbytes + (32 << 20)


def test_more_elements_than_32_bits_count(cuda: str) -> None:
    n, dim = 2**26 + 77, 33
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    codes = torch.randn(65, dim, device=cuda)
    x = torch.zeros(n, dim, dtype=torch.float16, device=cuda)
    x[-200:] = torch.randn(200, dim, device=cuda)
    assert torch.equal(search(x, codes)[-200:], search(x[-200:].clone(), codes))
