"""Every way to look up the nearest code, against the definition."""

import pytest
import torch

from xq.quantizers import nearest
from xq.quantizers.lookup import BACKENDS
from xq.quantizers.lookup.chunked import nearest_chunked

SIZES = [(1, 1, 1), (63, 37, 5), (200, 129, 17), (3, 1000, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("n", "k", "dim"), SIZES, ids=lambda v: str(v))
def test_equals_the_definition(backend: str, metric: str, n: int, k: int, dim: int) -> None:
    x, codes = torch.randn(n, dim, dtype=torch.float64), torch.randn(k, dim, dtype=torch.float64)
    want = nearest(x, codes, metric, backend="reference")
    assert torch.equal(nearest(x, codes, metric, backend=backend), want)
    single = nearest(x.float(), codes.float(), metric, backend=backend)
    assert (single == want).float().mean() > 0.99


def test_blocks_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.randn(101, 3), torch.randn(8, 3)
    whole = nearest_chunked(x, codes, "euclidean")
    monkeypatch.setattr("xq.quantizers.lookup.chunked._SCORES", 8 * 7)
    assert torch.equal(nearest_chunked(x, codes, "euclidean"), whole)


def test_more_codes_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.randn(5, 3), torch.randn(8, 3)
    whole = nearest_chunked(x, codes, "euclidean")
    monkeypatch.setattr("xq.quantizers.lookup.chunked._SCORES", 1)
    assert torch.equal(nearest_chunked(x, codes, "euclidean"), whole)


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_exact_far_from_the_origin(offset: float) -> None:
    x, codes = torch.randn(500, 8) + offset, torch.randn(64, 8) + offset
    assert torch.equal(nearest(x, codes), nearest(x, codes, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_index_wins_ties(backend: str) -> None:
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest(codes, codes, backend=backend).tolist() == [0, 1, 0, 1]


def test_keeps_the_batch_shape_and_takes_views_and_nothing() -> None:
    codes = torch.randn(9, 4)
    x = torch.randn(4, 3, 2).movedim(0, -1)
    assert nearest(x, codes).shape == (3, 2)
    assert nearest(x[:0], codes).shape == (0, 2)
    assert nearest(torch.zeros(1).expand(5, 4), codes).unique().numel() == 1


def test_has_no_gradient() -> None:
    x, codes = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    assert not nearest(x, codes).requires_grad


def test_the_op_is_registered_as_torch_wants() -> None:
    x, codes = torch.randn(5, 4), torch.randn(9, 4)
    torch.library.opcheck(torch.ops.xq.nearest.default, (x, codes, "euclidean", ""))


def test_the_environment_picks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def nines(x: torch.Tensor, codes: torch.Tensor, metric: str) -> torch.Tensor:
        return torch.full((len(x),), 9)

    monkeypatch.setitem(BACKENDS, "reference", nines)
    monkeypatch.setenv("XQ_LOOKUP", "reference")
    assert nearest(torch.randn(5, 4), torch.randn(10, 4)).tolist() == [9] * 5
    monkeypatch.setenv("XQ_LOOKUP", "nonsense")
    with pytest.raises(ValueError, match="XQ_LOOKUP='nonsense' is none of"):
        nearest(torch.randn(5, 4), torch.randn(9, 4))


BAD = {
    "metric": ((torch.randn(5, 4), torch.randn(9, 4), "l1"), "metrics.*got 'l1'"),
    "dims": ((torch.randn(5, 4), torch.randn(9, 3)), r"got \(5, 4\) and \(9, 3\)"),
    "no codes": ((torch.randn(5, 4), torch.randn(0, 4)), r"k >= 1.*got \(5, 4\) and \(0, 4\)"),
    "dtypes": ((torch.randn(5, 4), torch.randn(9, 4).double()), "float32 on cpu and torch.float64"),
    "devices": ((torch.randn(5, 4), torch.randn(9, 4, device="meta")), "on cpu and .* on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        nearest(*arguments)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is none of"):
        nearest(torch.randn(5, 4), torch.randn(9, 4), backend="cuda")
