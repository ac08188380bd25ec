"""Quantizers of the paper against XQ-GAN's own code.

Deliberate differences:
- Its commitment is multiplied by beta and, for multi-scale VQ, summed over scales; ours is a mean.
- Its entropy of a multi-scale LFQ or BSQ is that of single bits, on the full grid, with a mask of
  integers that picks samples 0 and 1; ours is exact over all codes, on what each step quantizes,
  of all samples, whatever they drop. Its numbers come out of `sign_entropy` all the same.
- A sample that it does not drop has a depth above all scales; ours is the number of scales.
- With one scale, three of its four refinements are never used; these tests leave them out.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import (
    EPS,
    assert_gradient,
    assert_indices,
    assert_values,
    below,
    gradients,
    leaf,
    load,
    load_state,
)

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    ProductQuantizer,
    Pyramid,
    Refine,
    ResidualQuantizer,
    sign_entropy,
)
from xq.quantizers.grids import shared_refinement

BETA = 0.25
SCALES = (1, 2, 3, 4)
ENTROPY_WEIGHT = 0.1


def multiscale(leaf_quantizer, refinements=4, scales=SCALES, shrink=None) -> ResidualQuantizer:
    grid = Pyramid(scales, [Refine(leaf_quantizer.dim) for _ in range(refinements)])
    return ResidualQuantizer(leaf_quantizer, multiscale=grid, shared=True, shrink=shrink)


MSVQ = {
    "xqgan_msvq_znorm_refine4": {"metric": "cosine"},
    "xqgan_msvq_znorm_refine1": {"metric": "cosine", "refinements": 1},
    "xqgan_msvq_znorm_unrefined": {"metric": "cosine", "refinements": 0},
    "xqgan_msvq_eucl_refine4": {"metric": "euclidean"},
    "xqgan_msvq_one_scale": {"metric": "cosine", "refinements": 1, "scales": (4,)},
}
SOFT = {
    "xqgan_msbsq": lambda: multiscale(BSQ(8)),
    "xqgan_msbsq_shrink": lambda: multiscale(BSQ(8), shrink=0.8),
    "xqgan_mslfq": lambda: multiscale(LFQ(8)),
    "xqgan_mslfq_shrink": lambda: multiscale(LFQ(8), shrink=0.5),
}
BINARY = SOFT | {"xqgan_mslfq_hard": lambda: multiscale(LFQ(6, temperature=0.01))}


def build(name) -> ResidualQuantizer:
    if name in BINARY:
        return BINARY[name]()
    options = dict(MSVQ[name])
    return multiscale(VQ(8, 64, metric=options.pop("metric")), **options)


def load_case(name):
    numbers, quantizer = load(name), build(name)
    load_state(quantizer, numbers)
    return numbers, quantizer


@pytest.fixture(params=[*MSVQ, *BINARY])
def case(request):
    return load_case(request.param)


@pytest.fixture(params=BINARY)
def binary_case(request):
    return load_case(request.param)


def assert_step(numbers, quantizer, run, *, summed: bool) -> None:
    """One training step, entropy apart."""
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x, run.get("depth"))
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, run["z"])
    assert_values(losses.codebook, run["vq_loss"])
    weight = BETA * (quantizer.depth if summed else 1)
    assert_values(weight * losses.commitment, run["commit_loss"])

    bounded = quantizer.bound(x.movedim(1, -1)).movedim(-1, 1)
    straight = gradients((bounded * numbers["cotangent"]).sum(), x)["input"]
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, straight)
    actual = gradients(losses.codebook + weight * losses.commitment, x, quantizer)
    assert actual.keys() == below(run, "grad").keys()
    for name, gradient in actual.items():
        assert_gradient(gradient, run[f"grad.{name}"], straight if name == "input" else 0.0)


def test_forward_and_gradients(case):
    numbers, quantizer = case
    summed = isinstance(quantizer.steps[0], VQ)
    assert_step(numbers, quantizer, below(numbers, "full"), summed=summed)


@pytest.mark.parametrize("name", [name for name in (*MSVQ, *BINARY) if "one_scale" not in name])
def test_quantizer_dropout(name):
    numbers, quantizer = load_case(name)
    run = below(numbers, "dropped")
    assert run["depth"].min() < quantizer.depth
    assert_step(numbers, quantizer, run, summed=isinstance(quantizer.steps[0], VQ))


@torch.no_grad()
def test_decode_and_partials(case):
    numbers, quantizer = case
    partials = list(ChannelFirst(quantizer).partials(numbers["indices"]))
    assert_values(torch.stack(partials), numbers["partials"])
    assert_values(ChannelFirst(quantizer).decode(numbers["indices"]), numbers["full.z"])
    if "teacher_forcing" in numbers:
        downs = zip(partials, quantizer.grids[1:], strict=False)
        inputs = [F.adaptive_avg_pool2d(z, grid) for z, grid in downs]
        inputs = torch.cat([z.flatten(2).mT for z in inputs], dim=1)
        assert_values(inputs, numbers["teacher_forcing"])


def residuals(quantizer, u, indices, depth=None):
    """What is left before each step, on the full grid, of the steps that each sample keeps."""
    sums = torch.stack([torch.zeros_like(u), *quantizer.partials(indices)]).detach()
    depth = torch.full(u.shape[:1], quantizer.depth) if depth is None else depth
    samples = torch.arange(len(u))
    return [u - sums[depth.clamp(max=k), samples] for k in range(quantizer.depth)]


def test_entropy_is_that_of_what_each_step_quantizes(binary_case):
    numbers, quantizer = binary_case
    step = quantizer.steps[0]
    x = leaf(numbers["input"].movedim(1, -1))
    codes = step.decode(torch.arange(step.codebook_size))
    penalties = []
    for k, rest in enumerate(residuals(quantizer, quantizer.bound(x), numbers["indices"])):
        seen = quantizer.grid.down(rest, k) / quantizer.step_shrink**k
        distances = (seen[..., None, :] - codes).square().sum(-1)
        log_p = (-distances / step.temperature).flatten(0, -2).log_softmax(-1)
        # the floor is far below what moves the sum, and keeps its gradient finite
        mean = log_p.exp().mean(0).clamp(min=1e-30)
        per_token = -(log_p.exp() * log_p).sum(-1).mean()
        penalties.append(per_token + (mean * mean.log()).sum() + math.log(len(codes)))
    expected = torch.stack(penalties).mean()
    regularizer = quantizer(x).losses.regularizer
    assert_values(regularizer, expected)
    # of all samples, also of those that drop steps
    dropped = quantizer(x, numbers["dropped.depth"]).losses.regularizer
    assert torch.equal(dropped, regularizer)
    actual = gradients(regularizer, x, quantizer)
    assert_gradient(actual.pop("input"), gradients(expected, x)["input"])
    # as there: the entropy shapes the features, no code and no refinement
    assert not any(gradient.any() for gradient in actual.values())


def their_entropy(quantizer, x, numbers, depth, group_size, *, published: bool = False):
    """XQ-GAN's entropy loss from our parts: full grid, samples kept, weighted by their share."""
    step = quantizer.steps[0]
    u = quantizer.bound(x.movedim(1, -1))
    terms = []
    for k, rest in enumerate(residuals(quantizer, u, numbers["indices"], depth)):
        keep = k < depth
        # as published the mask is one of integers, so that it indexes instead of masking
        picked = rest[keep.long()] if published else rest[keep]
        scale = step.scale * quantizer.step_shrink**k
        entropy = sign_entropy(picked * (4 * scale / step.temperature), group_size)
        terms.append((entropy.per_token - entropy.batch) / keep.float().mean())
    return ENTROPY_WEIGHT * torch.stack(terms).mean()


@pytest.mark.parametrize("name", SOFT)
def test_their_bit_entropies(name):
    numbers, quantizer = load_case(name)
    u = quantizer.bound(numbers["input"].movedim(1, -1))
    for k, rest in enumerate(residuals(quantizer, u, numbers["indices"])):
        scale = quantizer.steps[0].scale * quantizer.step_shrink**k
        entropy = sign_entropy(rest * (4 * scale), group_size=1)
        actual = torch.stack([entropy.per_token, entropy.batch])
        assert_values(actual, numbers["bit_entropies"][k])


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("dropout", ["full", "dropped"])
@pytest.mark.parametrize("published", [False, True], ids=["masked", "as_published"])
def test_their_entropy_loss(name, dropout, published):
    numbers, quantizer = load_case(name)
    depth = numbers["dropped.depth"] if dropout == "dropped" else torch.full((4,), 4)
    x = leaf(numbers["input"])
    loss = their_entropy(quantizer, x, numbers, depth, group_size=1, published=published)
    key = f"{dropout}.entropy" + "_as_published" * published
    assert_values(loss, numbers[key])
    assert_gradient(gradients(loss, x)["input"], numbers[f"{key}_grad"])


@pytest.mark.parametrize("dropout", ["full", "dropped"])
def test_their_hard_entropy_loss(dropout):
    """A softmax over all 64 codes at temperature 0.01, with EPS within the logarithm.

    EPS alone moves their gradient by 6e-4 of its largest entry.
    """
    numbers, quantizer = load_case("xqgan_mslfq_hard")
    depth = numbers["dropped.depth"] if dropout == "dropped" else torch.full((4,), 4)
    x = leaf(numbers["input"])
    loss = their_entropy(quantizer, x, numbers, depth, group_size=None)
    assert_values(loss, numbers[f"{dropout}.entropy"], atol=ENTROPY_WEIGHT * 64 * EPS)
    expected = numbers[f"{dropout}.entropy_grad"]
    assert_gradient(gradients(loss, x)["input"], expected, tolerance=1e-3)


def test_single_scale():
    numbers, quantizer = load("xqgan_vq_unit"), VQ(8, 64, normalize=True)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices).movedim(-1, 1), numbers["decoded"])
    assert_values(losses.codebook, numbers["vq_loss"])
    assert_values(BETA * losses.commitment, numbers["commit_loss"])
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, numbers["grad.z.input"])
    actual = gradients(losses.total(commitment=BETA), x, quantizer)
    assert_gradient(actual["codebook.weight"], numbers["grad.codebook.weight"])
    assert_gradient(actual["input"], numbers["grad.input"], numbers["grad.z.input"])


@pytest.mark.parametrize("name", ["xqgan_product_vq", "xqgan_product_msvq"])
def test_product(name):
    """Its branches quantize groups of tokens; side by side as channels they are ours."""
    numbers = load(name)
    vq = VQ(8, 64, normalize=True) if "msvq" not in name else VQ(8, 64, metric="cosine")
    quantizer = ProductQuantizer(multiscale(vq) if "msvq" in name else vq, P=2)
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(quantizer)(x)
    assert_indices(quantizer, x.movedim(1, -1), indices, numbers["indices"])
    assert_values(z, numbers["z"])
    assert_values(ChannelFirst(quantizer).decode(numbers["indices"]), numbers["z"])
    assert_values(losses.codebook, numbers["vq_loss"])
    assert_values(BETA * quantizer.depth * losses.commitment, numbers["commit_loss"])
    # what its whole training loss sends to codes and refinements is the codebook term alone
    actual = gradients(losses.codebook, x, quantizer)
    del actual["input"]
    assert actual.keys() == below(numbers, "grad").keys()
    for key, gradient in actual.items():
        assert_gradient(gradient, numbers[f"grad.{key}"])


def test_refinement_tables():
    """Ten scales with four refinements meet two ties that floating point decides."""
    tables = load("xqgan_refinement_table")
    assert len(tables) > 80
    for name, expected in tables.items():
        refinements, scales = name.split(".")
        count = int(scales if refinements == "own" else refinements)
        actual = [shared_refinement(k, int(scales), count) for k in range(int(scales))]
        assert actual == expected.tolist(), name
    assert tables["4.10"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
