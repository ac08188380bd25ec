"""beam_encode against naive searches, greedy codes, all codes there are, and faiss."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import inputs_for, trees
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    beam_encode,
    fit,
)
from xq.quantizers.flips import cheapest_flips
from xq.quantizers.lookup.pairs import smallest


def errors(quantizer: Quantizer, x: Tensor, indices: Tensor) -> Tensor:
    """The squared error of each vector, in doubles."""
    with torch.no_grad():
        u = quantizer.bound(x).double()
        return (u - quantizer.decode(indices).double()).square().sum(-1)


def spread(residual: ResidualQuantizer, decay: float = 0.5) -> ResidualQuantizer:
    """With codes as wide as the input, narrower with each step, so that paths compete."""
    with torch.no_grad():
        for k, step in enumerate(residual.steps):
            step.codebook.weight.normal_().mul_(decay**k)
    return residual


def naive(books: list[Tensor], x: Tensor, width: int, by_sum: bool = False) -> Tensor:
    """One vector after the other, one path after the other, in doubles.

    With `by_sum` paths are scored by the sum of the errors of their steps.
    """
    found = []
    for vector in x.double():
        paths: list[tuple[float, Tensor, list[int]]] = [(0.0, vector, [])]
        for book in books:
            longer = []
            for score, rest, path in paths:
                left = rest - book.double()
                scores = left.square().sum(-1) + (score if by_sum else 0.0)
                longer += [(scores[j].item(), left[j], [*path, j]) for j in range(len(book))]
            paths = sorted(longer, key=lambda path: path[0])[:width]
        found.append(paths[0][2])
    return torch.tensor(found)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_is_the_naive_search(width: int) -> None:
    residual = spread(ResidualQuantizer(VQ(5, 7), 3))
    x = torch.randn(30, 5)
    want = naive([step.codebook.weight.detach() for step in residual.steps], x, width)
    got = beam_encode(residual, x, width)
    greedy = residual.encode(x)
    # where the search ends worse than greedy codes, these are taken
    worse = errors(residual, x, want) > errors(residual, x, greedy)
    assert torch.equal(got, greedy.where(worse[:, None], want))
    assert not torch.equal(got, greedy)


def test_a_sum_of_the_errors_of_all_steps_would_do_worse() -> None:
    residual = spread(ResidualQuantizer(VQ(8, 32), 6), decay=0.6)
    x = torch.randn(40, 8)
    books = [step.codebook.weight.detach() for step in residual.steps]
    ours, theirs, greedy = (
        errors(residual, x, indices).mean()
        for indices in (
            beam_encode(residual, x, 8),
            naive(books, x, 8, by_sum=True),
            residual.encode(x),
        )
    )
    assert ours < 0.85 * theirs < 0.85 * greedy


def test_a_wide_search_finds_the_best_of_all_codes() -> None:
    residual = spread(ResidualQuantizer(VQ(3, 4), 3))
    x = torch.randn(2, 20, 3)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    distances = torch.cdist(x.flatten(0, 1), residual.decode(every))
    want = every[distances.argmin(-1)].view(2, 20, 3)
    assert torch.equal(beam_encode(residual, x, 16), want)
    assert not torch.equal(residual.encode(x), want)


def test_more_paths_leave_less() -> None:
    residual = spread(ResidualQuantizer(VQ(8, 64), 4))
    x = torch.randn(2000, 8)
    left = [errors(residual, x, beam_encode(residual, x, w)).mean() for w in (1, 2, 4, 8, 16)]
    assert all(b < a for a, b in itertools.pairwise(left))
    assert left[3] < 0.88 * left[0]


# with the jaxtyping hook beartype draws which items of a list it checks, which hypothesis minds
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(trees())
def test_no_sample_is_worse_than_greedy(quantizer: Quantizer) -> None:
    if quantizer.scales:
        return
    x = inputs_for(quantizer)
    for training in (False, True):
        q = copy.deepcopy(quantizer).train(training)
        before = [t.clone() for t in q.state_dict().values()]
        greedy = q.encode(x)
        assert torch.equal(beam_encode(q, x, 1), greedy)
        for width in (2, 5):
            indices = beam_encode(q, x, width)
            assert indices.shape == greedy.shape
            assert indices.dtype == torch.int64
            scale = 1e-6 * (1 + q.bound(x).double().square().sum(-1))
            assert (errors(q, x, indices) <= errors(q, x, greedy) + scale).all()
        after = q.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(beam_encode(q, x[:0], 3), q.encode(x[:0]))


def test_greedy_codes_stay_where_the_search_loses_them() -> None:
    # after two steps the greedy sum, 0.9, lies behind 1.01 and 0.99; the third step mends it alone
    books = [[[0.6], [1.45], [9.0]], [[0.3], [-0.44], [-0.46]], [[0.1], [5.0], [9.0]]]
    residual = ResidualQuantizer([VQ(1, 3) for _ in books])
    x = torch.ones(1, 1)
    tables = [torch.tensor(book) for book in books]
    with torch.no_grad():
        for step, table in zip(residual.steps, tables, strict=True):
            step.codebook.weight.copy_(table)
    greedy = residual.encode(x)
    lost = errors(residual, x, naive(tables, x, 2))
    assert lost > 0.005 > errors(residual, x, greedy)
    assert torch.equal(beam_encode(residual, x, 2), greedy)


def test_branches_of_a_product_are_searched_one_by_one() -> None:
    parts = [spread(ResidualQuantizer(VQ(d, 16), 3)) for d in (3, 4)]
    product = ProductQuantizer(parts)
    x = torch.randn(50, 7)
    want = [beam_encode(q, part, 4) for q, part in zip(parts, product.split(x), strict=True)]
    assert torch.equal(beam_encode(product, x, 4), torch.stack(want, dim=-2))


def test_a_residual_of_products_is_a_product_of_residuals() -> None:
    steps = [[VQ(3, 16) for _ in range(2)] for _ in range(3)]
    for k, step in enumerate(steps):
        for vq in step:
            torch.nn.init.normal_(vq.codebook.weight, std=0.5**k)
    rows = ResidualQuantizer([ProductQuantizer(step) for step in steps])
    columns = ProductQuantizer([ResidualQuantizer(list(c)) for c in zip(*steps, strict=True)])
    x = torch.randn(40, 6)
    got = beam_encode(rows, x, 4)
    assert torch.equal(got, beam_encode(columns, x, 4).mT)
    assert not torch.equal(got, rows.encode(x))


def test_products_that_split_unlike_channels_keep_their_greedy_codes() -> None:
    products = [ProductQuantizer([VQ(a, 4), VQ(5 - a, 4)]) for a in (1, 2)]
    residual = ResidualQuantizer(products)
    x = torch.randn(10, 5)
    assert torch.equal(beam_encode(residual, x, 4), residual.encode(x))


def test_a_residual_of_residuals_is_one_chain() -> None:
    flat = spread(ResidualQuantizer(VQ(4, 8), 4))
    steps: list[Any] = list(flat.steps)
    nested = ResidualQuantizer([ResidualQuantizer(steps[:2]), ResidualQuantizer(steps[2:])])
    x = torch.randn(60, 4)
    got = beam_encode(nested, x, 4)
    assert got.shape == (60, 2, 2)
    assert torch.equal(got.flatten(1), beam_encode(flat, x, 4))
    assert torch.equal(beam_encode(nested, x, 4, depth=1)[:, 0], beam_encode(flat, x, 4, depth=2))


@pytest.mark.parametrize("shared", [False, True])
def test_steps_in_scales_of_their_own(shared: bool) -> None:
    # a shrink that no power of two rounds away, and a leaf whose channels shrink unlike each other
    residual = ResidualQuantizer(LFQ(4), 3, shrink=0.7, shared=shared)
    x = torch.randn(200, 4)
    every = torch.tensor(list(itertools.product(range(16), repeat=3)))
    best = torch.cdist(x, residual.decode(every)).square().amin(-1)
    got = beam_encode(residual, x, 256)
    torch.testing.assert_close(errors(residual, x, got).float(), best, atol=1e-5, rtol=0)
    assert errors(residual, x, residual.encode(x)).mean() > 1.2 * best.mean()


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 32])
def test_cheapest_flips_are_the_cheapest_of_all(k: int) -> None:
    cost = torch.rand(9, 5)
    cost[0, :2] = 0
    flips = cheapest_flips(cost, k)
    assert flips.shape == (9, k, 5)
    assert not flips[:, 0].any()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    want = (cost @ every.T).sort(-1).values[:, :k]
    torch.testing.assert_close((flips * cost[:, None]).sum(-1), want)
    assert len({tuple(row) for row in flips[1].int().tolist()}) == k


@pytest.mark.parametrize("make", [LFQ, BSQ])
def test_candidates_of_sign_codes_are_the_nearest(make: Callable[[int], Quantizer]) -> None:
    leaf = make(6)
    u = torch.randn(11, 6)
    codes = leaf.decode(torch.arange(64))
    got = leaf.candidates(u, 10)
    want = torch.cdist(u, codes).topk(10, largest=False).indices
    assert torch.equal(got, want)
    assert torch.equal(got[:, 0], leaf.choose(u).indices)
    assert leaf.candidates(u, 100).shape == (11, 64)


def test_candidates_of_a_codebook_are_the_nearest() -> None:
    for leaf in (VQ(4, 20), VQ(4, 20, metric="cosine"), VQ(4, 20, normalize=True)):
        u = torch.randn(2, 9, 4)
        got = leaf.candidates(u, 5)
        assert got.shape == (2, 9, 5)
        assert torch.equal(got[..., 0], leaf.choose(u).indices)
        assert leaf.candidates(u, 50).shape == (2, 9, 20)


def test_cosine_steps_are_scored_by_distance() -> None:
    residual = spread(ResidualQuantizer(VQ(4, 32, metric="cosine"), 3))
    x = torch.randn(300, 4)
    before, after = (
        errors(residual, x, i) for i in (residual.encode(x), beam_encode(residual, x, 8))
    )
    assert after.mean() < 0.8 * before.mean()


class Whole(Quantizer):
    """A leaf of one's own, that offers its one code alone."""

    dim, codebook_size = 1, 9

    def quantize(self, u: Tensor, depth: object = None) -> Quantized:
        indices = (u[..., 0].round().clamp(-4, 4) + 4).long()
        return Quantized(self.dequantize(indices), indices, fit(u, self.dequantize(indices)))

    def dequantize(self, indices: Tensor) -> Tensor:
        return indices[..., None] - 4.0


def test_a_leaf_of_ones_own_offers_its_greedy_code() -> None:
    residual = ResidualQuantizer(Whole(), 3, shrink=0.2)
    x = torch.randn(5, 4, 1)
    assert torch.equal(beam_encode(residual, x, 4), residual.encode(x))


class Halves(VQ):
    """Chooses anew, and so inherits no candidates."""

    def quantize(self, u: Tensor, depth: object = None) -> Quantized:
        indices = (u[..., 0] > 0).long()
        return Quantized(self.dequantize(indices), indices, fit(u, self.dequantize(indices)))


def test_who_chooses_anew_inherits_no_candidates() -> None:
    residual = ResidualQuantizer(Halves(2, 5), 2)
    x = torch.randn(50, 2)
    assert torch.equal(beam_encode(residual, x, 4), residual.encode(x))


def test_wrappers() -> None:
    tree = spread(ResidualQuantizer(VQ(4, 16), 3))
    x = torch.randn(2, 5, 6, 4)
    want = beam_encode(tree, x, 4)
    assert torch.equal(beam_encode(ChannelFirst(tree), x.movedim(-1, 1), 4), want)
    projected = Projected(tree, 7)
    wide = torch.randn(9, 7)
    with torch.no_grad():
        assert torch.equal(
            beam_encode(projected, wide, 4), beam_encode(tree, projected.project_in(wide), 4)
        )


def test_fewer_steps() -> None:
    residual = spread(ResidualQuantizer(VQ(4, 16), 3))
    short = ResidualQuantizer(list(residual.steps)[:2])  # pyright: ignore[reportArgumentType]
    x = torch.randn(30, 4)
    got = beam_encode(residual, x, 4, depth=2)
    assert torch.equal(got, beam_encode(short, x, 4))
    assert torch.equal(residual.decode(got), short.decode(got))
    assert torch.equal(beam_encode(residual, x, 1, depth=2), residual.encode(x)[:, :2])
    product = ProductQuantizer(residual, P=2, shared=True)
    pairs = torch.cat([x, x.flip(0)], dim=-1)
    want = torch.stack([got, beam_encode(short, x.flip(0), 4)], dim=1)
    assert torch.equal(beam_encode(product, pairs, 4, depth=2), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    residual = spread(ResidualQuantizer(VQ(4, 64), 3))
    x = torch.randn(100, 4).to(dtype)
    want = beam_encode(residual, x.float(), 4)
    assert torch.equal(beam_encode(residual, x, 4), want)
    assert torch.equal(beam_encode(copy.deepcopy(residual).to(dtype), x, 4), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(beam_encode(residual, x.float(), 4), want)
    assert (beam_encode(residual.double(), x.double(), 4) == want).float().mean() > 0.99


def test_far_from_the_origin() -> None:
    residual = spread(ResidualQuantizer(VQ(4, 32), 2))
    x = torch.randn(200, 4)
    want = errors(residual, x, beam_encode(residual, x, 4))
    with torch.no_grad():
        residual.steps[0].codebook.weight.add_(1000)
    got = errors(residual, x + 1000, beam_encode(residual, x + 1000, 4))
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)


def test_a_broken_code_is_never_taken() -> None:
    residual = spread(ResidualQuantizer(VQ(4, 5), 3))
    with torch.no_grad():
        residual.steps[1].codebook.weight[2] = torch.nan
        residual.steps[2].codebook.weight[:4] = torch.inf
    indices = beam_encode(residual, torch.randn(50, 4), 8)
    assert not (indices[:, 1] == 2).any()
    assert (indices[:, 2] == 4).all()


def test_no_state_moves_in_training() -> None:
    residual = ResidualQuantizer(VQ(4, 8, codebook=EMACodebook), 2).train()
    x = torch.randn(64, 4)
    residual(x)
    before = {k: v.clone() for k, v in residual.named_buffers()}
    beam_encode(residual, x, 4)
    assert all(torch.equal(before[k], v) for k, v in residual.named_buffers())


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    "leaf",
    [VQ(4, 1000), VQ(4, 1000, metric="cosine"), LFQ(4)],
    ids=["vq", "cosine", "lfq"],
)
def test_memory_is_bounded(leaf: Quantizer) -> None:
    residual = ResidualQuantizer(leaf, 2, shrink=0.7)
    x = torch.randn(8000, 4)
    with Largest() as made:
        beam_encode(residual, x, 8)
    # all scores of all paths would be 256 MB, all candidates 8 MB, many times over
    assert made.size <= 8 << 20


def test_equals_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    residual = spread(ResidualQuantizer(VQ(8, 64), 4))
    x = torch.randn(3000, 8)
    theirs = faiss.ResidualQuantizer(8, 4, 6)
    theirs.max_beam_size = 8
    codes = torch.stack([step.codebook.weight.detach() for step in residual.steps])
    faiss.copy_array_to_vector(codes.flatten().numpy(), theirs.codebooks)
    theirs.is_trained = True
    decoded = torch.from_numpy(theirs.decode(theirs.compute_codes(x.numpy())))
    want = (x - decoded).square().sum(-1).double().mean()
    got = errors(residual, x, beam_encode(residual, x, 8)).mean()
    assert got <= want * (1 + 1e-6)
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0)


@pytest.mark.parametrize(("m", "k"), [(5, 3), (64, 1), (130, 1), (1000, 8), (1023, 3), (4099, 40)])
def test_smallest(m: int, k: int) -> None:
    scores = torch.randn(7, m)
    scores[0, m // 2] = -torch.inf
    got = smallest(scores, k)
    assert torch.equal(scores.gather(1, got), scores.sort(-1).values[:, :k])


FLAT = ResidualQuantizer(VQ(4, 8), 3)
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "width": (FLAT, {"width": 0}, "beam_encode needs a width of 1 path or more, got width=0"),
    "half a path": (FLAT, {"width": 2.5}, "got width=2.5"),
    "depth": (FLAT, {"width": 2, "depth": 4}, "has depths 1 to 3, got 4"),
    "depths": (FLAT, {"width": 2, "depth": torch.ones(5)}, "has depths 1 to 3, got tensor"),
    "context": (FLAT, {"width": 2, "mask": 1}, r"got \['mask'\], which no wrapper here asks for"),
    "pyramid": (
        ResidualQuantizer(VQ(4, 8), multiscale=(1, 2)),
        {"width": 2},
        r"flat residual, got ResidualQuantizer with scales \(1, 2\).*; use encode",
    ),
    "wrapped pyramid": (
        ChannelFirst(ProductQuantizer(ResidualQuantizer(VQ(2, 8), multiscale=(1, 2)), P=2)),
        {"width": 2},
        "got ProductQuantizer with scales",
    ),
    "channels": (ProductQuantizer(FLAT, P=2), {"width": 2}, "expects 8 channels in the last axis"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    quantizer, arguments, message = BAD[name]
    # under the jaxtyping hook the annotations refuse some first
    with pytest.raises((ValueError, TypeError), match=message + r"|'width'|'depth'"):
        beam_encode(quantizer, torch.randn(5, 4), **arguments)


def test_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="got 1 values that are NaN or infinite"):
        beam_encode(FLAT, torch.tensor([[1.0, 2, 3, torch.nan]]), 2)
