"""teacher_forcing and next_scale_input against VAR's and XQ-GAN's helpers of these purposes."""

import pytest
import torch
from golden import assert_values, load, load_state

from xq.models import next_scale_input, teacher_forcing
from xq.quantizers import VQ, ProductQuantizer, Pyramid, Refine, ResidualQuantizer

SCALES = (1, 2, 3, 4)


def pyramid(scales, refinements, codes, metric="euclidean") -> ResidualQuantizer:
    grid = Pyramid(scales, [Refine(8) for _ in range(refinements)])
    return ResidualQuantizer(VQ(8, codes, metric=metric), multiscale=grid, shared=True)


CASES = {
    "var_eucl": lambda: pyramid(SCALES, 4, 64),
    "var_znorm": lambda: pyramid(SCALES, 4, 64, "cosine"),
    "var_share4": lambda: pyramid((1, 2, 3, 4, 5, 6), 4, 32),
    "var_share0": lambda: pyramid((1, 2, 4), 3, 32),
    "var_noresi": lambda: pyramid((1, 2, 4), 0, 32),
    "xqgan_var_product": lambda: ProductQuantizer(pyramid(SCALES, 4, 64, "cosine"), P=2),
}


@pytest.mark.parametrize("name", CASES)
def test_inputs_of_all_scales_and_of_the_next(name):
    numbers, quantizer = load(name), CASES[name]()
    load_state(quantizer, numbers)
    expected = numbers["teacher_forcing"]
    assert_values(teacher_forcing(quantizer, numbers["indices"]), expected)
    sizes = [h * w for h, w in quantizer.grids]
    parts = [*expected.split(sizes[1:], dim=1), expected[:, :0]]
    # the product's file has no sums
    sums, z = numbers.get("partials"), None
    for k, part in enumerate(parts):
        tokens = numbers["indices"][:, : sum(sizes[: k + 1])]
        inputs, z = next_scale_input(quantizer, tokens, z)
        assert_values(inputs, part)
        if sums is not None:
            assert_values(z.movedim(-1, 1), sums[k])
    assert torch.equal(z, quantizer.decode(numbers["indices"]))
