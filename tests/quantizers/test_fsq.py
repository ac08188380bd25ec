"""FSQ: against its definition in plain Python, exact integers, residuals that refine."""

import math

import numpy as np
import pytest
import torch
from strategies import inputs_for
from torch import Tensor

from xq.quantizers import FSQ, LFQ, ProductQuantizer, Pyramid, Refine, ResidualQuantizer
from xq.testing import check_quantizer

BOUNDS = ("even", "symmetric", "ifsq", "clamp", "paper", "vqp")
AROUND_ZERO = ("paper", "vqp")


def bounded(x: float, n: int, bound: str) -> tuple[float, float]:
    """The bound of one number and its slope, as the docstring of FSQ has them, in doubles."""
    if bound == "clamp":
        return min(max(x, -1.0), 1.0), float(abs(x) <= 1)
    if bound in ("symmetric", "ifsq"):
        slope = 1.0 if bound == "symmetric" else 0.8
        return math.tanh(slope * x), slope * (1 - math.tanh(slope * x) ** 2)
    if bound == "even":
        c = n / (n - 1)
        return c * math.tanh(x / c), 1 - math.tanh(x / c) ** 2
    o = 0.0 if n % 2 else 0.5
    h = (n - 1) / 2 * (0.999 if bound == "paper" else 1.001)
    inner = math.tanh(x + (math.tan(o / h) if bound == "paper" else math.atanh(o / h)))
    return (h * inner - o) / (n // 2), h * (1 - inner**2) / (n // 2)


def codes(n: int, bound: str) -> list[float]:
    if bound in AROUND_ZERO:
        return [(k - n // 2) / (n // 2) for k in range(n)]
    return [(2 * k - n + 1) / (n - 1) for k in range(n)]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("levels", [(8, 5, 5, 3), (7, 4, 16), (3,)], ids=str)
def test_values_indices_and_gradients_are_those_of_the_definition(bound, levels) -> None:
    quantizer = FSQ(levels, bound=bound)
    x = 1.5 * torch.randn(57, len(levels))
    given = x.clone().requires_grad_()
    z, indices, _ = quantizer(given)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((z * upstream).sum(), given)

    for i, row in enumerate(x.tolist()):
        index = 0
        for j, (value, n) in enumerate(zip(row, levels, strict=True)):
            u, slope = bounded(value, n, bound)
            errors = [abs(u - code) for code in codes(n, bound)]
            nearest = min(range(n), key=errors.__getitem__)
            index += nearest * math.prod(levels[:j])
            assert z[i, j].item() == pytest.approx(codes(n, bound)[nearest], abs=1e-7)
            assert quantizer.bound(x)[i, j].item() == pytest.approx(u, abs=1e-6)
            want = slope * upstream[i, j].item()
            assert gradient[i, j].item() == pytest.approx(want, abs=1e-5)
        assert indices[i] == index


# what names mean must not change: these decide which indices an encoder's checkpoint gives
FROZEN = {
    ("even", 4): [-1.206864, -0.47781, 0.0, 0.198513, 0.846865],
    ("even", 5): [-1.152086, -0.474936, 0.0, 0.198311, 0.830046],
    ("symmetric", 5): [-0.964028, -0.462117, 0.0, 0.197375, 0.761594],
    ("ifsq", 5): [-0.921669, -0.379949, 0.0, 0.158649, 0.664037],
    ("clamp", 5): [-1.0, -0.5, 0.0, 0.2, 1.0],
    ("paper", 4): [-0.946292, -0.364022, -0.000214, 0.123118, 0.404286],
    ("paper", 5): [-0.963064, -0.461655, 0.0, 0.197178, 0.760833],
    ("vqp", 4): [-0.94773, -0.364564, 0.0, 0.123623, 0.40552],
    ("vqp", 5): [-0.964992, -0.462579, 0.0, 0.197573, 0.762356],
}


@pytest.mark.parametrize(("bound", "n"), FROZEN, ids=lambda value: str(value))
def test_a_name_keeps_its_numbers(bound, n) -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.2, 1.0])[:, None]
    actual = FSQ([n], bound=bound).bound(x).flatten()
    torch.testing.assert_close(actual, torch.tensor(FROZEN[bound, n]), atol=1e-6, rtol=0)


def test_every_bound_is_frozen() -> None:
    with pytest.raises(ValueError, match="FSQ knows the bounds") as error:
        FSQ([5], bound="tanh")
    assert all(f"'{bound}'" in str(error.value) for bound in BOUNDS)
    assert str(error.value).count("', '") == len(BOUNDS) - 1
    assert {bound for bound, _ in FROZEN} == set(BOUNDS)


def test_ifsq_is_a_sigmoid() -> None:
    x = torch.randn(100, 2, dtype=torch.float64)
    want = 2 * torch.sigmoid(1.6 * x) - 1
    torch.testing.assert_close(FSQ([5, 9], bound="ifsq").bound(x), want)


def test_zero_stays_zero_and_small_inputs_pass_as_they_are() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-4, -1e-4]], dtype=torch.float64, requires_grad=True)
    u = FSQ([8, 5]).bound(x)
    torch.testing.assert_close(u, x, atol=1e-11, rtol=0)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x), atol=1e-7, rtol=0)


def test_channel_0_is_the_least_significant_digit() -> None:
    quantizer = FSQ([3, 4, 5])
    top = torch.eye(3) * 20 - 10
    assert quantizer.encode(top).tolist() == [2, 3 * 3, 4 * 12]
    assert quantizer.decode(torch.tensor(1)).tolist() == [0.0, -1.0, -1.0]
    assert quantizer.codebook_size == 60
    assert quantizer.bits == pytest.approx(math.log2(60))


def test_halfway_goes_up() -> None:
    assert FSQ([2, 4, 16]).encode(torch.zeros(3)) == 1 + 2 * 2 + 8 * 8


# the last one counts every number of an int64 but the largest
LARGE = {
    "16**15": [16] * 15,
    "2**62": [2] * 62,
    "3**39": [3] * 39,
    "2**63 - 1": [7, 7, 73, 127, 337, 92737, 649657],
    "a million": [2**20, 2**20, 2**20, 7],
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("bound", ["even", "vqp"])
def test_indices_are_exact_whatever_their_number(name, bound) -> None:
    levels = LARGE[name]
    if bound == "vqp" and 2 in levels:
        return
    quantizer = FSQ(levels, bound=bound)
    size = quantizer.codebook_size
    assert size == math.prod(levels)
    assert size < 2**63
    ends = [0, 1, size // 2, size - 2, size - 1]
    indices = torch.cat([torch.randint(size, (300,)), torch.tensor(ends)])
    z = quantizer.decode(indices)
    # digit by digit, in Python's integers
    for index, code in zip(indices.tolist(), z.tolist(), strict=True):
        for value, n in zip(code, levels, strict=True):
            index, k = divmod(index, n)
            span = n if bound == "vqp" and n % 2 == 0 else n - 1
            assert value == np.float32((2 * k - span) / span)
    q = quantizer.quantize(z)
    assert torch.equal(q.indices, indices)
    assert torch.equal(q.z, z)


def test_all_of_a_million_levels_are_told_apart() -> None:
    quantizer = FSQ([2**20])
    indices = torch.arange(2**20)
    assert torch.equal(quantizer.quantize(quantizer.decode(indices)).indices, indices)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_indices_stay_in_range_whatever_comes(bound, dtype) -> None:
    quantizer = FSQ([8, 5, 1001, 4], bound=bound)
    huge = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-8, 0.5, 1, 3, 88, huge, math.inf]
    x = torch.tensor([s * v for v in values for s in (1, -1)], dtype=dtype)[:, None].expand(-1, 4)
    tree = ResidualQuantizer(FSQ([8, 5, 1001, 4], bound=bound), 4)
    for q in (quantizer, tree, quantizer.to(dtype), tree.to(dtype)):
        indices = q(x).indices
        assert indices.min() >= 0
        assert indices.max() < q.codebook_size
    # what lies outside goes to the outermost level
    beyond = quantizer.quantize(
        torch.tensor([math.inf, -math.inf, 9.0, -9.0])[:, None].expand(4, 4)
    )
    assert beyond.indices.tolist() == [quantizer.codebook_size - 1, 0] * 2


def test_nan_is_the_lowest_level() -> None:
    quantizer = FSQ([8, 5])
    x = torch.tensor([[math.nan, 0.0], [math.nan, math.nan]])
    z, indices, _ = quantizer(x)
    assert indices.tolist() == [2 * 8, 0]
    assert torch.equal(quantizer.decode(indices), torch.tensor([[-1.0, 0.0], [-1.0, -1.0]]))
    assert z.shape == x.shape


def test_it_holds_no_table() -> None:
    quantizer = FSQ([16] * 15)
    assert not quantizer.state_dict()
    assert not list(quantizer.buffers())


def error_ratios(residual: ResidualQuantizer, x: Tensor) -> Tensor:
    """Of each later step and channel: the error that it leaves over the one that it found."""
    u = residual.bound(x)
    errors = torch.stack([(z - u).square().mean(0) for z in residual.partials(residual.encode(x))])
    return errors[1:] / errors[:-1]


LEVELS = [(8, 5, 5, 5), (2, 2, 2), (3, 3), (4, 4, 4), (16, 15, 3), (2, 3, 9)]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_step_of_a_flat_residual_refines(bound, levels) -> None:
    if bound in AROUND_ZERO and 2 in levels:
        return
    residual = ResidualQuantizer(FSQ(levels, bound=bound), depth=5).eval()
    x = torch.randn(3000, len(levels))
    indices, ratios = residual.encode(x), error_ratios(residual, x)
    assert (ratios < 1).all(), ratios
    for step in indices.unbind(-1):
        assert len(step.unique()) > 1, "no step is idle"


@pytest.mark.parametrize("spread", [0.3, 1, 10])
def test_even_steps_refine_by_as_much_as_there_are_levels(spread) -> None:
    levels = (2, 3, 4, 5, 8, 9)
    residual = ResidualQuantizer(FSQ(levels), depth=3).eval()
    # the first step finds whatever there is, later ones what is spread evenly
    ratios = error_ratios(residual, spread * torch.randn(5000, len(levels)))
    assert (ratios < 1.0).all()
    assert (ratios[-1] < 1.3 / torch.tensor(levels) ** 2).all(), ratios


@pytest.mark.parametrize("bound", AROUND_ZERO)
def test_around_zero_the_lowest_of_an_even_number_of_levels_has_no_part_in_that(bound) -> None:
    levels, used = (3, 4, 5, 8, 9), torch.tensor([3, 3, 5, 7, 9])
    residual = ResidualQuantizer(FSQ(levels, bound=bound), depth=4).eval()
    ratios = error_ratios(residual, torch.randn(5000, len(levels)))
    assert (ratios[1:] < 1.3 / used**2).all(), ratios


def test_steps_that_shrink_by_one_level_less_would_not_refine_two_levels() -> None:
    residual = ResidualQuantizer(FSQ([2, 2, 2]), 3, shrink=1.0)
    x = torch.randn(3000, 3)
    u = residual.bound(x)
    first, second, _ = ((z - u).square().mean() for z in residual.partials(residual.encode(x)))
    assert second > first


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_even_steps_are_one_quantizer_of_more_levels(n) -> None:
    depth = 3
    fine = FSQ([n**depth])
    residual = ResidualQuantizer(FSQ([n]), depth)
    x = 2 * torch.randn(4000, 1)
    u = residual.bound(x)
    z = residual.decode(residual.encode(x))
    # the same lattice, spread over the same range
    scale = fine.bound(torch.tensor([50.0])) / residual.bound(torch.tensor([50.0]))
    want = fine.quantize(u * scale).z / scale
    at_edge = ((u * scale + 1) * (n**depth - 1) / 2 % 1 - 0.5).abs() < 1e-3
    assert at_edge.float().mean() < 0.05
    torch.testing.assert_close(torch.where(at_edge, want, z), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16])
def test_even_levels_are_equally_wide(n) -> None:
    quantizer = FSQ([n])
    reach = n / (n - 1)
    u = torch.linspace(-reach, reach, 1000 * n + 1, dtype=torch.float64)[:-1, None]
    counts = torch.bincount(quantizer.quantize(u + reach / (1000 * n)).indices, minlength=n)
    assert counts.tolist() == [1000] * n


@pytest.mark.parametrize("bound", BOUNDS)
def test_nothing_pulls_to_the_codes(bound) -> None:
    leaf = FSQ([4, 3], bound=bound)
    refined = Pyramid((1, 2, 4), [Refine(2)])
    trees = [
        leaf,
        ResidualQuantizer(leaf, 3),
        ProductQuantizer(ResidualQuantizer(leaf, 2), P=1),
        ResidualQuantizer(leaf, multiscale=refined),
    ]
    x = torch.randn(2, 4, 4, 2, requires_grad=True)
    for tree in trees:
        losses = tree(x).losses
        assert not tree.commits
        assert losses.commitment == losses.regularizer == 0
        # the refinement alone learns from the fit
        assert (losses.codebook > 0) == bool(list(tree.parameters()))


def test_a_step_that_commits_has_its_commitment_measured() -> None:
    lfq = LFQ(3, bound="tanh", regularize=False)
    mixed = ResidualQuantizer([lfq, FSQ([2, 2, 2], bound="symmetric")], shrink=0.5)
    assert mixed.commits
    assert mixed(torch.randn(5, 3)).losses.commitment > 0


TREES = {
    "leaf": FSQ([8, 5, 5]),
    "paper": FSQ([8, 5, 5], bound="paper"),
    "residual": ResidualQuantizer(FSQ([8, 5, 5], bound="vqp"), 3),
    "product": ProductQuantizer([FSQ([4, 6]), FSQ([3, 8]), FSQ([24])]),
    "product of residuals": ProductQuantizer(ResidualQuantizer(FSQ([4, 3]), 3), P=2),
    "residual of products": ResidualQuantizer(ProductQuantizer(FSQ([4, 3]), P=2), 3),
    "pyramid": ResidualQuantizer(FSQ([5, 5]), multiscale=(1, 2, 3)),
    "product of pyramids": ProductQuantizer(ResidualQuantizer(FSQ([2, 2]), multiscale=(1, 3)), P=2),
    "large": FSQ([7, 7, 73, 127, 337, 92737, 649657]),
}


@pytest.mark.parametrize("name", TREES)
def test_the_contract(name) -> None:
    check_quantizer(TREES[name], inputs_for(TREES[name]))


def test_steps_share_one_bound() -> None:
    with pytest.raises(ValueError, match=r"the same domain, got 'cube'.*'ifsq'"):
        ResidualQuantizer([FSQ([5], bound="symmetric"), FSQ([5], bound="ifsq")])
    with pytest.raises(ValueError, match=r"the same domain, got 'even \(2, 6\)'"):
        ResidualQuantizer([FSQ([2, 6]), FSQ([3, 4])], shrink=0.5)
    either = [FSQ([2, 6], bound="clamp"), FSQ([6, 2], bound="clamp")]
    assert ResidualQuantizer(either, shrink=0.5).code_shape == (2,)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "needs the number of levels of each channel, got none"),
        ([8, 1], r"from 2 to 1048576 levels in each channel, got 1 in levels=\(8, 1\)"),
        ([8, -5], "got -5"),
        ([8.0, 5], "got 8.0"),
        ([True, 5], "got True"),
        (["8", "5"], "got '8'"),
        ([2**20 + 1], "got 1048577"),
        (
            [2] * 63,
            r"fewer than 2\*\*63 codes, .*got 9223372036854775808 .*ProductQuantizer splits",
        ),
        ([16] * 16, r"fewer than 2\*\*63 codes"),
    ],
    ids=str,
)
def test_levels_that_do_not_fit(levels, message) -> None:
    with pytest.raises(ValueError, match=f"FSQ needs {message}|{message}"):
        FSQ(levels)


def test_one_number_is_no_list_of_levels() -> None:
    # under the jaxtyping hook the annotation refuses it
    with pytest.raises((ValueError, TypeError), match=r"of each channel.*got 8|'levels': 8"):
        FSQ(8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bound", AROUND_ZERO)
def test_two_levels_around_zero_are_refused(bound) -> None:
    message = rf'FSQ with bound={bound!r} needs 3 levels or more, got levels=\(5, 2\).*bound="even"'
    with pytest.raises(ValueError, match=message):
        FSQ([5, 2], bound=bound)


def test_levels_come_as_any_integers() -> None:
    quantizer = FSQ(np.array([8, 5]))
    assert quantizer.levels == (8, 5)
    assert all(type(n) is int for n in quantizer.levels)
    assert repr(quantizer) == "FSQ([8, 5], bound='even')"


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="FSQ expects 2 channels in the last axis, got shape"):
        FSQ([8, 5])(torch.randn(4, 3))


def test_a_gradient_reaches_the_input_once() -> None:
    def through(quantizer) -> Tensor:
        x = torch.linspace(-2, 2, 24).reshape(4, 6).requires_grad_()
        (gradient,) = torch.autograd.grad(quantizer(x).z.sum(), x)
        return gradient

    levels = [8, 5, 3, 4, 2, 7]
    once = through(FSQ(levels))
    assert torch.equal(through(ResidualQuantizer(FSQ(levels), 4)), once)
