"""FSQ and its residuals against vector-quantize-pytorch.

Deliberate differences:
- Its default is our `bound="vqp"`; its ResidualFSQ is a residual of our default, "even".
- The steps of its residual each pass the gradient on, unless they cut the value off, so that the
  input of `depth` steps receives it up to `depth` times; ours receives it once.
- Several groups with a projection each are one `Projected` a group here.
- Its indices are int32, and overflow; its levels of 2 need `preserve_symmetry`.
"""

from collections.abc import Callable

import pytest
import torch
from golden import assert_gradient, assert_values, below, gradients, leaf, load, load_state
from torch import Tensor

from xq.quantizers import FSQ, ProductQuantizer, Projected, Quantizer, ResidualQuantizer
from xq.quantizers.shrink import as_factor, power

LEAVES: dict[str, Callable[[], Quantizer]] = {
    "vqp_fsq_16_15_3": lambda: FSQ([16, 15, 3], bound="vqp"),
    "vqp_fsq_3_3_3": lambda: FSQ([3, 3, 3], bound="vqp"),
    "vqp_fsq_4_4_4": lambda: FSQ([4, 4, 4], bound="vqp"),
    "vqp_fsq_8_5_5_5": lambda: FSQ([8, 5, 5, 5], bound="vqp"),
    "vqp_fsq_16_15_3_symmetric": lambda: FSQ([16, 15, 3], bound="symmetric"),
    "vqp_fsq_2_2_2_symmetric": lambda: FSQ([2, 2, 2], bound="symmetric"),
    "vqp_fsq_3_3_3_symmetric": lambda: FSQ([3, 3, 3], bound="symmetric"),
    "vqp_fsq_4_4_4_symmetric": lambda: FSQ([4, 4, 4], bound="symmetric"),
    "vqp_fsq_7_5_5_5_5_symmetric": lambda: FSQ([7, 5, 5, 5, 5], bound="symmetric"),
    "vqp_fsq_8_5_5_5_symmetric": lambda: FSQ([8, 5, 5, 5], bound="symmetric"),
    "vqp_fsq_8_6_5_symmetric": lambda: FSQ([8, 6, 5], bound="symmetric"),
    "vqp_fsq_clamp": lambda: FSQ([8, 5, 5, 5], bound="clamp"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_fsq(name):
    numbers, quantizer = load(name), LEAVES[name]()
    x = leaf(numbers["input"])
    z, indices, _ = quantizer(x)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z, numbers["z"], atol=1e-6)
    assert_values(quantizer.decode(numbers["indices"].int()), numbers["z"], atol=1e-6)
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, numbers["grad.z.input"], tolerance=1e-5)


def test_other_bounds_give_other_indices():
    """How far: the paper's margin and its tan move one token in eighty."""
    numbers = load("vqp_fsq_8_5_5_5")
    shares = {
        bound: (FSQ([8, 5, 5, 5], bound=bound).encode(numbers["input"]) != numbers["indices"])
        for bound in ("paper", "symmetric", "even")
    }
    assert 0 < shares["paper"].float().mean() < 0.02
    assert shares["symmetric"].float().mean() > 0.1
    assert shares["even"].float().mean() > 0.1


def test_two_codebooks():
    numbers = load("vqp_fsq_two_codebooks")
    quantizer = Projected(ProductQuantizer(FSQ([8, 5, 5], bound="vqp"), P=2), 7)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, _ = quantizer(x)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["z"])
    actual = gradients((z * numbers["cotangent"]).sum(), x, quantizer)
    expected = below(numbers, "grad.z")
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_gradient(gradient, expected[name])


def steps_that_pass(residual: ResidualQuantizer, u: Tensor, indices: Tensor) -> Tensor:
    """For each channel, how many steps see a value within -1..1: theirs cut off what is beyond."""
    sums = [torch.zeros_like(u), *residual.partials(indices)][:-1]
    scales = [as_factor(power(residual.step_shrink, k), u) for k in range(residual.depth)]
    pairs = zip(sums, scales, strict=True)
    return torch.stack([((u - total) / scale).abs() <= 1 for total, scale in pairs]).sum(0)


def test_residual_fsq():
    numbers = load("vqp_residual_fsq")
    residual = ResidualQuantizer(FSQ([8, 5, 5, 3]), 3)
    x = leaf(numbers["input"])
    z, indices, _ = residual(x)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z, numbers["z"], atol=1e-6)
    assert_values(residual.decode(numbers["indices"].int()), numbers["z"], atol=1e-6)
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    times = steps_that_pass(residual, residual.bound(x).detach(), indices)
    assert set(times.unique().tolist()) == {1, 2, 3}
    assert_gradient(times * through, numbers["grad.z.input"])


def test_projected_residual_fsq():
    numbers = load("vqp_residual_fsq_projected")
    residual = ResidualQuantizer(FSQ([8, 5, 5, 3]), 3)
    quantizer = Projected(residual, 7)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, _ = quantizer(x)
    assert torch.equal(indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["z"])

    # behind the steps nothing differs, before them each channel's count
    actual = gradients((z * numbers["cotangent"]).sum(), x, quantizer)
    for name in ("project_out.weight", "project_out.bias"):
        assert_gradient(actual[name], numbers[f"grad.z.{name}"])
    u = residual.bound(quantizer.enter(x))
    times = steps_that_pass(residual, u.detach(), indices)
    upstream = (numbers["cotangent"] @ quantizer.project_out.weight) * times
    theirs = gradients((u * upstream.detach()).sum(), x, quantizer)
    for name in ("input", "project_in.weight", "project_in.bias"):
        assert_gradient(theirs[name], numbers[f"grad.z.{name}"])


def test_grouped_residual_fsq():
    numbers = load("vqp_residual_fsq_grouped")
    for group, x in enumerate(numbers["input"].chunk(2, dim=-1)):
        quantizer = Projected(ResidualQuantizer(FSQ([5, 5, 3]), 2), 4)
        quantizer.load_state_dict(below(numbers, f"state.{group}"))
        z, indices, _ = quantizer(x)
        assert torch.equal(indices, numbers["indices"][group])
        assert_values(z, numbers["z"].chunk(2, dim=-1)[group])
