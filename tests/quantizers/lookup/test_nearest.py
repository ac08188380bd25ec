"""Every way to look up the nearest code on a CPU, against the definition in float64."""

import importlib.util
import multiprocessing
import os
import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xq.quantizers import lookup, nearest
from xq.quantizers.lookup import Table, chunked, faiss, prepare
from xq.quantizers.lookup.table import Source

HAS_FAISS = importlib.util.find_spec("faiss") is not None
needs_faiss = pytest.mark.skipif(not HAS_FAISS, reason="faiss-cpu is not installed")
BACKENDS = ["chunked", pytest.param("faiss", marks=needs_faiss), None]
# odd ones, fewer codes than a group, more than one block of either, and faiss's fast kernel
SIZES = [(1, 1, 1), (63, 37, 5), (200, 129, 17), (3, 1000, 2), (700, 70, 300), (16500, 40, 8)]
SIZES += [(1100, 2050, 9), (9000, 65, 16)]


def assert_nearest(
    found: Tensor, x: Tensor, codes: Tensor, metric: str = "euclidean", tolerance: float = 1e-5
) -> None:
    """The indices name the nearest codes in order, or such as are as near within rounding."""
    k = found.shape[-1] if found.ndim == x.ndim else None
    want = nearest(x.double(), codes.double(), metric, backend="reference", k=k)
    assert found.shape == want.shape
    assert found.dtype == torch.int64
    x, codes = x.double(), codes.double()
    if metric == "cosine":
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    if k is not None:
        x = x.unsqueeze(-2)
    got, best = ((x - codes[i]).square().sum(-1) for i in (found, want))
    torch.testing.assert_close(got, best, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k", "dim"), SIZES, ids=lambda v: str(v))
def test_equals_the_definition(backend: str | None, metric: str, n: int, k: int, dim: int) -> None:
    x, codes = torch.randn(n, dim), torch.randn(k, dim)
    assert_nearest(nearest(x, codes, metric, backend=backend), x, codes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k", "dim"), SIZES[:5], ids=lambda v: str(v))
def test_float64_stays_float64(metric: str, n: int, k: int, dim: int) -> None:
    x, codes = torch.randn(n, dim, dtype=torch.float64), torch.randn(k, dim, dtype=torch.float64)
    # so close that float32 could not tell them apart
    codes = torch.cat([codes, codes + 1e-9])
    want = nearest(x, codes, metric, backend="reference")
    assert torch.equal(nearest(x, codes, metric), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_compared_in_float32(backend: str | None, dtype: torch.dtype) -> None:
    x, codes = torch.randn(300, 8).to(dtype), torch.randn(500, 8).to(dtype)
    assert_nearest(nearest(x, codes, backend=backend), x, codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 8, 37, 300])
def test_several_nearest_in_order(backend: str | None, metric: str, k: int) -> None:
    x, codes = torch.randn(5, 7, 6), torch.randn(300, 6)
    found = nearest(x, codes, metric, backend=backend, k=k)
    assert found.shape == (5, 7, k)
    assert_nearest(found, x, codes, metric)
    assert (found.sort(-1).values.diff() > 0).all()


@pytest.mark.parametrize("k", [2, 5, 100])
def test_several_nearest_of_many_codes_in_blocks(k: int) -> None:
    x, codes = torch.randn(70, 12), torch.randn(40000, 12)
    assert_nearest(nearest(x, codes, backend="chunked", k=k), x, codes)


@pytest.mark.parametrize("dim", [3, 8, 40])
@pytest.mark.parametrize("fewest", [7, 40])
@pytest.mark.parametrize(("scores", "kept"), [(1, 1), (1 << 8, 1 << 8), (1 << 12, 1 << 10)])
def test_blocks_join_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, dim: int, fewest: int, scores: int, kept: int
) -> None:
    x, codes = torch.randn(301, dim), torch.randn(517, dim)
    monkeypatch.setattr(chunked, "_SCORES", scores)
    monkeypatch.setattr(chunked, "_KEPT", kept)
    monkeypatch.setattr(chunked, "_FEWEST", fewest)
    assert_nearest(nearest(x, codes, backend="chunked"), x, codes)
    assert_nearest(nearest(x, codes, backend="chunked", k=3), x, codes)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("k", [1, 16, 63, 64, 65, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_vectors_and_pools_that_are_not_full(n: int, k: int, dtype: torch.dtype) -> None:
    x, codes = torch.randn(n, 7, dtype=dtype), torch.randn(k, 7, dtype=dtype)
    assert_nearest(nearest(x, codes, backend="chunked"), x, codes)


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("period", [5, 64, 1000, 4096])
def test_the_first_of_equal_codes_wins_across_pools_and_blocks(
    monkeypatch: pytest.MonkeyPatch, n: int, period: int
) -> None:
    monkeypatch.setattr(chunked, "_SCORES", 1 << 14)
    x, codes = torch.randn(n, 6), torch.randn(period, 6)
    found = nearest(x, codes.repeat(3, 1), backend="chunked")
    assert_nearest(found, x, codes)
    assert (found < period).all()


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_whole_pools_of_codes_that_are_not_finite(n: int, broken: float) -> None:
    x, codes = torch.randn(n, 6), torch.randn(3000, 6)
    clean = nearest(x, codes[2700:], backend="chunked")
    codes[:2700, 2] = broken
    assert torch.equal(nearest(x, codes, backend="chunked"), clean + 2700)
    x[1] = torch.nan
    found = nearest(x, codes, backend="chunked")
    assert found[1] == 0
    assert torch.equal(found[2:], clean[2:] + 2700)


@pytest.mark.parametrize("count", [1, 2, 100, 5000])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("slots", [1, 4, 22])
def test_repeated_numbers_are_all_found(
    monkeypatch: pytest.MonkeyPatch, count: int, few: bool, slots: int
) -> None:
    monkeypatch.setattr(faiss, "_SORTED", count if few else 0)
    monkeypatch.setattr(faiss, "_MOST_SLOTS", slots)
    numbers = torch.randint(2 * count, (count,)).float()
    _, which, counts = numbers.unique(return_inverse=True, return_counts=True)
    want = (counts[which] > 1).nonzero().flatten()
    assert faiss._repeated(numbers.numpy()).tolist() == want.tolist()


@needs_faiss
def test_faiss_takes_its_vectors_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.randn(301, 8), torch.randn(50, 8)
    monkeypatch.setattr(faiss, "_BLOCK", 100)
    assert_nearest(nearest(x, codes, backend="faiss"), x, codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_exact_far_from_the_origin(backend: str | None, offset: float) -> None:
    x, codes = torch.randn(500, 8) + offset, torch.randn(64, 8) + offset
    assert torch.equal(nearest(x, codes, backend=backend), nearest(x, codes, backend="reference"))


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e15])
def test_a_code_that_has_diverged_spoils_no_other(
    backend: str | None, offset: float, outlier: float, ready: bool
) -> None:
    x, codes = torch.randn(4096, 8) + offset, torch.randn(1024, 8) + offset
    codes[3] = outlier
    table = prepare(codes) if ready else codes
    assert_nearest(nearest(x, table, backend=backend), x, codes, tolerance=1e-4)


@needs_faiss
def test_equal_fingerprints_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "_fingerprints", lambda codes: codes[:, 0] * 0)
    codes = torch.randn(64, 8).sign().unique(dim=0)
    found = nearest(codes, torch.cat([codes, codes]), backend="faiss")
    assert torch.equal(found, torch.arange(len(codes)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize(
    ("n", "k", "dim"), [(50, 3, 2), (17000, 13, 8), (7800, 31, 17), (2100, 50, 64)]
)
def test_the_first_of_equal_codes_wins(
    backend: str | None, copies: int, n: int, k: int, dim: int
) -> None:
    x, codes = torch.randn(n, dim), torch.randn(k, dim)
    codes[0, 0] = 0.0
    again = codes.clone()
    again[0, 0] = -0.0
    found = nearest(x, torch.cat([codes] + [again] * (copies - 1)), backend=backend)
    assert torch.equal(found, nearest(x, codes, backend=backend))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_lowest_index_wins_exact_ties(backend: str) -> None:
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert nearest(torch.zeros(3, 2), codes, backend=backend).tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("n", "dim"), [(40, 4), (17000, 8)])
def test_what_is_not_finite(backend: str | None, broken: float, n: int, dim: int) -> None:
    x, codes = torch.randn(n, dim), torch.randn(33, dim)
    clean = nearest(x, codes[1:], backend=backend)
    codes[0, 1] = broken
    # such a code is never nearest, and disturbs no other
    assert torch.equal(nearest(x, codes, backend=backend), clean + 1)
    x[5, 0] = broken
    found = nearest(x, codes, backend=backend)
    others = torch.arange(n) != 5
    assert torch.equal(found[others], clean[others] + 1)
    assert 0 <= found[5] < 33
    if broken != broken:
        assert found[5] == 0
    assert nearest(x, torch.full_like(codes, broken), backend=backend).unique().tolist() == [0]


def test_several_nearest_name_each_code_once() -> None:
    codes = torch.randn(9, 4)
    codes[1], codes[2] = torch.nan, torch.inf
    found = nearest(torch.randn(20, 4), codes, k=9)
    assert torch.equal(found.sort(-1).values, torch.arange(9).expand(20, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_nothing(backend: str | None) -> None:
    codes = torch.randn(4, 9).t()
    x = torch.randn(4, 3, 2).movedim(0, -1)
    assert_nearest(nearest(x, codes, backend=backend), x, codes)
    assert nearest(x[:0], codes, backend=backend).shape == (0, 2)
    assert nearest(x[:, :0].movedim(0, 1), codes, backend=backend).shape == (0, 3)
    permuted = torch.randn(0, 4, 5).transpose(1, 2)
    assert nearest(permuted, codes, backend=backend, k=2).shape == (0, 5, 2)
    assert nearest(x[:0], codes, backend=backend, k=2).shape == (0, 2, 2)
    assert nearest(x[0, 0], codes, backend=backend).shape == ()
    strided = torch.randn(20, 8)[::2, ::2]
    assert_nearest(nearest(strided, codes, backend=backend), strided, codes)
    repeated = torch.randn(4).expand(6, 5, 4)
    assert nearest(repeated, codes, backend=backend).unique().numel() == 1
    one = torch.randn(1, 4).expand(9, 4)
    assert nearest(x, one, backend=backend).eq(0).all()


def test_what_no_view_flattens_is_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randn(9, 4)
    x = torch.randn(5, 4, 7, 6).movedim(1, -1)
    want = nearest(x.contiguous(), codes)
    for gathered in (1, 200, 400):
        monkeypatch.setattr("xq.quantizers.lookup._GATHERED", gathered)
        assert torch.equal(nearest(x, codes), want)


def test_has_no_gradient() -> None:
    x, codes = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    assert not nearest(x, codes).requires_grad


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_table_stands_for_its_codes(metric: str) -> None:
    x, codes = torch.randn(50, 4), torch.randn(90, 4)
    table = prepare(codes, metric)
    assert isinstance(table, Table)
    assert torch.equal(nearest(x, table), nearest(x, codes, metric))
    assert torch.equal(nearest(x, table, metric, k=3), nearest(x, codes, metric, k=3))


@pytest.mark.parametrize("k", [1, 3])
def test_the_op_is_registered_as_torch_wants(k: int) -> None:
    x, table = torch.randn(2, 5, 4), prepare(torch.randn(9, 4))
    torch.library.opcheck(
        torch.ops.xq.nearest.default, (x, table.codes, "euclidean", table.rows, table.centre, k, "")
    )


@pytest.mark.compile
@pytest.mark.parametrize("k", [None, 3])
def test_compiles_to_one_graph(k: int | None) -> None:
    x, codes = torch.randn(2, 50, 4), torch.randn(9, 4)
    compiled = torch.compile(nearest, fullgraph=True)
    assert torch.equal(compiled(x, codes, "cosine", k=k), nearest(x, codes, "cosine", k=k))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize(("n", "codes", "dim"), [(300_000, 4096, 4), (2000, 1 << 18, 8)])
def test_extra_memory_is_bounded(k: int | None, n: int, codes: int, dim: int) -> None:
    """At most 32 MiB and one copy of the codes beyond input and output, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_extra_bytes, args=(queue, n, codes, dim, k))
    process.start()
    extra = queue.get(timeout=120)
    process.join()
    assert extra < (32 << 20) + 4 * codes * (dim + 1)


def _extra_bytes(queue: "multiprocessing.Queue[int]", n: int, codes: int, dim: int, k: int) -> None:
    torch.set_num_threads(1)
    x, table = torch.randn(n, dim), torch.randn(codes, dim)
    nearest(x[:3000], table[:3000], backend="chunked", k=k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = nearest(x, table, backend="chunked", k=k)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((after - before) * 1024 - out.numel() * 8)


def _look_up(queue: "multiprocessing.Queue[bool]", x: Tensor, codes: Tensor, want: Tensor) -> None:
    # a worker of a DataLoader has one thread; whoever forks by hand may have kept more
    queue.put(torch.equal(nearest(x, codes, backend="faiss"), want))


@needs_faiss
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_faiss_in_workers(method: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, codes = torch.randn(17000, 8), torch.randn(500, 8)
        want = nearest(x, codes, backend="faiss")
        torch.set_num_threads(1)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=_look_up, args=(queue, x, codes, want), daemon=True)
        worker.start()
        assert queue.get(timeout=60)
        worker.join()
    finally:
        torch.set_num_threads(threads)


@needs_faiss
def test_faiss_uses_torchs_threads_and_leaves_its_own_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import faiss as engine

    seen = []
    knn = engine.knn

    def watched(*args: object) -> object:
        seen.append(engine.omp_get_max_threads())
        return knn(*args)

    monkeypatch.setattr(engine, "knn", watched)
    before, threads = engine.omp_get_max_threads(), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            nearest(torch.randn(50, 8), torch.randn(9, 8), backend="faiss")
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]
    assert engine.omp_get_max_threads() == before


@needs_faiss
def test_faiss_is_chosen_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def watched(x: Tensor, source: Source, k: int) -> Tensor:
        chosen.append(len(x))
        return chunked.nearest_chunked(x, source.table, k)

    monkeypatch.setitem(lookup._SEARCHES, "faiss", watched)
    codes = torch.randn(9, 8)
    for n in (16, 1 << 12, 1 << 14):
        nearest(torch.randn(n, 8), codes)
        nearest(torch.randn(n, 8), codes, k=2)
        nearest(torch.randn(n, 8).double(), codes.double())
    assert chosen == [1 << 12, 1 << 14, 1 << 14]
    for size, dim in ((100, 64), (1 << 13, 64), (1 << 13, 32)):
        nearest(torch.randn(1 << 12, dim), torch.randn(size, dim))
    assert chosen[3:] == [1 << 12, 1 << 12]


def test_the_environment_picks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def nines(x: Tensor, source: Source, k: int) -> Tensor:
        return torch.full((len(x), k), 9)

    monkeypatch.setitem(lookup._SEARCHES, "reference", nines)
    monkeypatch.setenv("XQ_LOOKUP", "reference")
    assert nearest(torch.randn(5, 4), torch.randn(10, 4)).tolist() == [9] * 5
    assert nearest(torch.randn(5, 4), torch.randn(10, 4), backend="chunked").tolist() != [9] * 5
    monkeypatch.setenv("XQ_LOOKUP", "nonsense")
    with pytest.raises(ValueError, match="XQ_LOOKUP='nonsense' is none of"):
        nearest(torch.randn(5, 4), torch.randn(9, 4))
    monkeypatch.setenv("XQ_LOOKUP", "triton")
    with pytest.raises(ValueError, match=r"XQ_LOOKUP='triton' does not do.*on cpu"):
        nearest(torch.randn(5, 4), torch.randn(9, 4))


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "installed", lambda: False)
    x, codes = torch.randn(17000, 8), torch.randn(9, 8)
    assert_nearest(nearest(x, codes), x, codes)
    with pytest.raises(ValueError, match=r"backend='faiss'.*pip install faiss-cpu"):
        nearest(x, codes, backend="faiss")


X, CODES = torch.randn(5, 4), torch.randn(9, 4)
BAD = {
    "metric": ((X, CODES, "l1"), {}, "metrics.*got 'l1'"),
    "metric of the table": ((X, prepare(CODES), "cosine"), {}, "table for 'euclidean'"),
    "dims": ((X, torch.randn(9, 3)), {}, r"got \(5, 4\) and \(9, 3\)"),
    "no codes": ((X, torch.randn(0, 4)), {}, r"not empty, got \(0, 4\)"),
    "no channels": ((X[:, :0], CODES[:, :0]), {}, r"not empty, got \(9, 0\)"),
    "one code": ((X, CODES[0]), {}, r"\(k, dim\).*got \(4,\)"),
    "many codes": ((X, CODES[:1].expand(2**31, 4)), {}, "32 bits.*got 2147483648.*Product"),
    "dtypes": ((X, CODES.double()), {}, "float32 on cpu and torch.float64"),
    "integers": ((X.long(), CODES.long()), {}, "floating-point.*int64"),
    "devices": ((X, CODES.to("meta")), {}, "on cpu and .* on meta"),
    "k": ((X, CODES), {"k": 10}, "1 to 9 of 9 codes, got k=10"),
    "k = 0": ((X, CODES), {"k": 0}, "got k=0"),
    "backend": ((X, CODES), {"backend": "cuda"}, "backend='cuda' is none of"),
    "triton": ((X, CODES), {"backend": "triton"}, "backend='triton' does not do.*on cpu"),
    "triton's k": ((X, CODES), {"backend": "triton", "k": 2}, "finds one code, not k=2"),
    "faiss's dtype": (
        (X.double(), CODES.double()),
        {"backend": "faiss"},
        "backend='faiss' does not do.*float64",
    ),
}


BAD_CODES = [torch.randn(4), torch.randn(2, 3, 4), torch.zeros(0, 4), torch.ones(3, 4).long()]


@pytest.mark.parametrize("codes", BAD_CODES, ids=lambda c: f"{c.dtype} {tuple(c.shape)}")
def test_bad_codes_are_refused_early(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"nearest expects .*codes"):
        prepare(codes)


@pytest.mark.parametrize("backend", ["chunked", "faiss", "triton", None])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str, backend: str | None) -> None:
    arguments, options, message = BAD[name]
    if backend is not None and "backend" not in options:
        options = {**options, "backend": backend}
    with pytest.raises(ValueError, match=message):
        nearest(*arguments, **options)
