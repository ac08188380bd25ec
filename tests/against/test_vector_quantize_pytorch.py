"""LFQ, VQ with running averages, and the rotation trick against vector-quantize-pytorch.

Deliberate differences:
- Bit i of our index is channel i; theirs is the other way around.
- It floors probabilities at EPS within the logarithm; our entropies are exact.
- Its losses are weighted and a vector over steps; ours are unweighted means.
- Each step of its residuals has its own straight-through, so the input receives the gradient of
  `z` once a step; ours receives it once.
- Its averages are smoothed (Laplace, 1e-5) and become codes at the end of the step; ours are not,
  and become codes as the next step starts, so that `decode` gives what `forward` gave.
- Averages shared by the steps of a residual decay once a step there, once a forward pass here.
- Its ResidualLFQ takes the entropy of the residual at the scale of the step's codes; ours that of
  the residual as the step sees it, which is `shrink` times larger.
- Its DiVeQ adds noise in each step of a residual, in eval mode too; ours once, in training alone.
- Its random projections of several codebooks go through one more random map, with a bias, that
  mixes them; ours are apart.
- Its rotation of opposite or zero vectors is wrong or explodes; ours is straight through there.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

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
    reversed_bits,
)

from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    DiVeQ,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Quantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    Wrapper,
    rotation_trick,
    sign_entropy,
)

ENTROPY_WEIGHT = 0.1
LFQS = {
    "vqp_lfq_warm": (lambda: LFQ(8), 0.25),
    "vqp_lfq_cold": (lambda: LFQ(8, temperature=1 / 100), 0.25),
    "vqp_lfq_spherical": (lambda: BSQ(8, temperature=1 / 100), 0.25),
    "vqp_lfq_two_codebooks": (lambda: ProductQuantizer(LFQ(4, temperature=1 / 10), P=2), 0.25),
}


def entropies(quantizer, u):
    """Per-token and batch entropy, and the most either can be; means over branches."""
    if isinstance(quantizer, ProductQuantizer):
        parts = zip(quantizer.branches, quantizer.split(u), strict=True)
        return torch.stack([entropies(branch, part) for branch, part in parts]).mean(0)
    return torch.stack([torch.as_tensor(value) for value in quantizer.entropy(u)])


def floored_penalty(quantizer, u):
    """Their per-token minus batch entropy, of a softmax over all codes with a floor of EPS."""
    if isinstance(quantizer, ProductQuantizer):
        parts = zip(quantizer.branches, quantizer.split(u), strict=True)
        return torch.stack([floored_penalty(branch, part) for branch, part in parts]).mean()
    codes = quantizer.decode(torch.arange(quantizer.codebook_size))
    distances = (u[..., None, :] - codes).square().sum(-1)
    p = (-distances / quantizer.temperature).flatten(0, -2).softmax(-1)
    per_token, batch = (-(q * q.clamp(min=EPS).log()).sum(-1) for q in (p, p.mean(0)))
    return per_token.mean() - batch


@pytest.fixture(params=LFQS)
def lfq(request):
    make, beta = LFQS[request.param]
    return load(request.param), make(), beta


def test_lfq(lfq):
    numbers, quantizer, beta = lfq
    x = leaf(numbers["input"])
    z, indices, losses = quantizer(x)
    bits = quantizer.codebook_size.bit_length() - 1
    assert_indices(quantizer, x, indices, reversed_bits(numbers["indices"], bits))
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["z"])
    per_token, batch, most = entropies(quantizer, quantizer.bound(x))
    floored = EPS * quantizer.codebook_size
    assert_values(per_token, numbers["per_token"], atol=floored)
    assert_values(batch, numbers["batch"], atol=floored)
    assert_values(losses.regularizer, per_token + most - batch)
    assert_values(losses.commitment, numbers["commitment"])
    loss = losses.total(commitment=beta, regularizer=ENTROPY_WEIGHT) - ENTROPY_WEIGHT * most
    assert_values(loss, numbers["loss"], atol=ENTROPY_WEIGHT * floored)


def test_lfq_gradients(lfq):
    numbers, quantizer, beta = lfq
    x = leaf(numbers["input"])
    z, _, losses = quantizer(x)
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, numbers["grad.z.input"])
    expected = numbers["grad.loss.input"]
    theirs = beta * losses.commitment
    theirs = theirs + ENTROPY_WEIGHT * floored_penalty(quantizer, quantizer.bound(x))
    assert_gradient(gradients(theirs, x)["input"], expected)
    # without the floor the rare codes, which it hides, pull as well
    ours = losses.total(commitment=beta, regularizer=ENTROPY_WEIGHT)
    assert_gradient(gradients(ours, x)["input"], expected, tolerance=5e-3)


def test_zero_is_negative():
    numbers, quantizer = load("vqp_lfq_zeros"), LFQ(8, temperature=1 / 10)
    x = leaf(numbers["input"])
    z, indices, losses = quantizer(x)
    assert torch.equal(indices, reversed_bits(numbers["indices"], 8))
    assert torch.equal(z, numbers["z"])
    expected = numbers["per_token"] - numbers["batch"] + 8 * math.log(2)
    assert_values(losses.regularizer, expected)
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(through, numbers["grad.z.input"])


def test_projected_lfq():
    numbers = load("vqp_lfq_projected")
    projected = Projected(LFQ(8, temperature=1 / 10), 6)
    load_state(projected, numbers)
    x = leaf(numbers["input"])
    z, indices, losses = ChannelFirst(projected)(x)
    u = projected.enter(x.movedim(1, -1))
    assert_indices(projected.quantizer, u, indices, reversed_bits(numbers["indices"], 8))
    assert_values(z, numbers["z"])
    assert_values(ChannelFirst(projected).decode(indices), numbers["z"])
    per_token, batch, most = entropies(projected.quantizer, u)
    assert_values(per_token, numbers["per_token"], atol=256 * EPS)
    assert_values(batch, numbers["batch"], atol=256 * EPS)
    assert_values(losses.regularizer, per_token + most - batch)

    value = (z * numbers["cotangent"]).sum()
    penalty = ENTROPY_WEIGHT * floored_penalty(projected.quantizer, u)
    assert_values(penalty, numbers["loss"])
    assert_gradient(gradients(value, x)["input"], numbers["grad.z.input"])
    assert_gradient(gradients(penalty, x)["input"], numbers["grad.loss.input"])
    actual = gradients(value + penalty, x, projected)
    del actual["input"]
    assert actual.keys() == below(numbers, "grad.total").keys()
    for name, gradient in actual.items():
        assert_gradient(gradient, numbers[f"grad.total.{name}"])


def ema_vq(dim, codes=16, decay=0.8, **options) -> VQ:
    return VQ(dim, codes, codebook=partial(EMACodebook, decay=decay, revive=0.0), **options)


class EMACase(NamedTuple):
    make: Callable[[], Quantizer | Wrapper]
    weight: float = 1.0


EMAS = {
    "vqp_vq": EMACase(lambda: ema_vq(8, 32), 0.25),
    "vqp_vq_rotated": EMACase(lambda: ema_vq(8, 32, 0.99, estimator=rotation_trick), 0.25),
    "vqp_vq_cosine": EMACase(lambda: ema_vq(8, 32, normalize=True), 0.25),
    "vqp_heads_shared": EMACase(lambda: ProductQuantizer(ema_vq(4, 32), P=2, shared=True), 0.25),
    "vqp_heads_separate": EMACase(lambda: ProductQuantizer(ema_vq(4, 32), P=2), 0.25),
    "vqp_residual": EMACase(lambda: ResidualQuantizer(ema_vq(8), 4), 0.25),
    "vqp_residual_shared": EMACase(lambda: ResidualQuantizer(ema_vq(8), 3, shared=True)),
    "vqp_residual_projected": EMACase(lambda: Projected(ResidualQuantizer(ema_vq(4), 3), 8)),
    "vqp_residual_grouped": EMACase(lambda: ProductQuantizer(ResidualQuantizer(ema_vq(8), 3), P=2)),
}


@pytest.fixture(params=EMAS)
def ema(request):
    numbers, (make, weight) = load(request.param), EMAS[request.param]
    quantizer = make()
    load_state(quantizer, numbers)
    return numbers, quantizer, weight


def inner(quantizer):
    return quantizer.quantizer if isinstance(quantizer, Projected) else quantizer


def commitments(quantizer, u, indices):
    """Of each step apart: how far the sums of its leading steps are from the input."""
    if isinstance(quantizer, ProductQuantizer):
        branches = list(quantizer.branches) * (quantizer.P if quantizer.shared else 1)
        indices = indices.unbind(-len(quantizer.code_shape))
        parts = zip(branches, quantizer.split(u), indices, strict=True)
        found = torch.stack([commitments(*part) for part in parts])
        # of heads theirs is one loss
        return found if found.ndim > 1 else found.mean()
    steps = torch.stack([F.mse_loss(z, u) for z in quantizer.partials(indices)])
    return steps if isinstance(quantizer, ResidualQuantizer) else steps[0]


def test_learning_by_averages(ema):
    numbers, quantizer, weight = ema
    tree = inner(quantizer)
    for step in count():
        run = below(numbers, str(step))
        if not run:
            break
        x = leaf(run["input"])
        z, indices, losses = quantizer(x)
        u = quantizer.enter(x) if isinstance(quantizer, Projected) else quantizer.bound(x)
        assert_indices(tree, u, indices, run["indices"])
        assert_values(z, run["z"])
        # in training mode too, where theirs has moved its codes already
        assert torch.equal(quantizer.decode(indices), z)
        assert_values(weight * commitments(tree, u, indices), run["losses"])
        assert_values(weight * losses.commitment, run["losses"].mean())
        assert losses.codebook == 0

        through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
        assert_gradient(tree.depth * through, run["grad.z"])
        loss = weight * run["losses"].numel() * losses.commitment
        assert_gradient(gradients(loss, x)["input"], run["grad.loss"])
        if not (isinstance(tree, ResidualQuantizer) and tree.shared):
            assert_same_averages(quantizer, below(run, "after"))
    assert step > 0


@torch.no_grad()
def assert_same_averages(quantizer, after):
    """Smoothing moves their codes by less than the tolerance."""
    quantizer = copy.deepcopy(quantizer)
    for module in quantizer.modules():
        if isinstance(module, EMACodebook):
            module.refresh()
    for module in quantizer.modules():
        if isinstance(module, VQ) and module.normalize:
            module.codebook.weight.copy_(F.normalize(module.codebook.weight, dim=-1))
    state = {key: value for key, value in quantizer.state_dict().items() if "codebook" in key}
    state = {key: value for key, value in state.items() if not key.endswith(".step")}
    assert state.keys() == after.keys()
    for key, value in state.items():
        assert_values(value, after[key])


def test_averages_of_a_shared_codebook():
    """Theirs decay once a step of the residual, ours once a forward pass."""
    numbers = load("vqp_residual_shared")
    quantizer = EMAS["vqp_residual_shared"].make()
    load_state(quantizer, numbers)
    theirs = copy.deepcopy(quantizer)
    run = below(numbers, "0")
    _, indices, _ = quantizer(run["input"])
    hits = torch.bincount(indices.flatten(), minlength=16)
    expected = 0.8 * numbers["state.steps.0.codebook.count"] + 0.2 * hits
    assert_values(quantizer.steps[0].codebook.count, expected)

    book = theirs.steps[0].codebook
    sums = [torch.zeros_like(run["input"]), *theirs.partials(indices)]
    for k in range(theirs.depth):
        book.observe(run["input"] - sums[k], indices[..., k])
        book.fold()
        for pending in book.pending():
            pending.zero_()
    assert_same_averages(theirs, below(run, "after"))


def test_projections_of_a_residual():
    numbers = load("vqp_residual_projected")
    quantizer = EMAS["vqp_residual_projected"].make()
    load_state(quantizer, numbers)
    run = below(numbers, "0")
    x = leaf(run["input"])
    z, _, losses = quantizer(x)
    value = (z * numbers["cotangent"]).sum()
    loss = run["losses"].numel() * losses.commitment
    # what stands before the three steps gets the gradient of z thrice
    before, behind = 3 * value + loss, value
    for name, parameter in quantizer.named_parameters():
        scalar = before if name.startswith("project_in") else behind
        (gradient,) = torch.autograd.grad(scalar, parameter, retain_graph=True)
        assert_gradient(gradient, numbers[f"grad.total.{name}"])


def test_residual_lfq():
    numbers = load("vqp_residual_lfq")
    quantizer = ResidualQuantizer(LFQ(8, temperature=1 / 100), 3)
    x = leaf(numbers["input"])
    z, indices, losses = quantizer(x)
    assert_indices(quantizer, x, indices, reversed_bits(numbers["indices"], 8))
    assert_values(z, numbers["z"])
    assert_values(quantizer.decode(indices), numbers["z"])
    through = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    assert_gradient(quantizer.depth * through, numbers["grad.z"])

    # ours: the entropy of what each step sees; theirs: at the scale of its codes
    sums = [torch.zeros_like(x), *quantizer.partials(indices)][:-1]
    rests = [x - total.detach() for total in sums]
    ours = [quantizer.steps[k].entropy(rest / 0.5**k) for k, rest in enumerate(rests)]
    penalties = torch.stack([entropy.penalty() for entropy in ours])
    assert_values(losses.regularizer, penalties.mean())
    theirs = [sign_entropy(rest * (4 * 100 * 0.5**k)) for k, rest in enumerate(rests)]
    penalties = ENTROPY_WEIGHT * torch.stack([e.per_token - e.batch for e in theirs])
    assert_values(penalties, numbers["losses"], atol=ENTROPY_WEIGHT * 256 * EPS)
    # EPS in their logarithm, as in `test_lfq_gradients`
    assert_gradient(gradients(penalties.sum(), x)["input"], numbers["grad.loss"], tolerance=5e-3)


def test_rotation_trick():
    numbers = load("vqp_rotation")
    x, code = leaf(numbers["input"]), numbers["code"]
    z = rotation_trick(x, code)
    assert torch.equal(z, code)
    actual = gradients((z * numbers["cotangent"]).sum(), x)["input"]
    opposite, zero = 3, 6
    regular = [row for row in range(len(x)) if row not in (opposite, zero)]
    assert_values(numbers["output"][regular], code[regular])
    for row in regular:
        assert_gradient(actual[row], numbers["grad"][row])
    for row in (opposite, zero):
        assert torch.equal(actual[row], numbers["cotangent"][row])
    # theirs misses the code of an opposite vector, and explodes at zero
    assert (numbers["output"] - code).abs()[opposite].max() > 0.01
    assert numbers["grad"][zero].abs().max() > 1e6


def test_diveq():
    numbers = load("vqp_vq_diveq")
    quantizer = VQ(8, 32, estimator=DiVeQ(0.005))
    load_state(quantizer, numbers)
    x = leaf(numbers["input"])
    # the seed of their step, whose first draw is the noise
    torch.manual_seed(777)
    z, indices, _ = quantizer(x)
    assert_indices(quantizer, x, indices, numbers["indices"])
    assert_values(z, numbers["z"], atol=1e-6)
    actual = gradients((z * numbers["cotangent"]).sum(), x, quantizer)
    for name, gradient in actual.items():
        assert_gradient(gradient, numbers[f"grad.z.{name}"], tolerance=1e-5)
    quantizer.eval()
    assert_values(quantizer(x).z, numbers["z.eval"], atol=0)


def test_residual_diveq_is_silent_in_eval_mode():
    numbers = load("vqp_residual_diveq")
    quantizer = ResidualQuantizer(VQ(8, 16, estimator=DiVeQ(0.005)), 3).eval()
    load_state(quantizer, numbers)
    z, indices, _ = quantizer(numbers["input"])
    assert_indices(quantizer, numbers["input"], indices, numbers["indices"])
    assert torch.equal(z, quantizer.decode(indices))
    # theirs is not
    assert (numbers["z"] - z).abs().max() > 0.2


def test_random_projection():
    numbers = load("vqp_random_projection")
    # their projections, then the map that mixes them, as one matrix of vectors with a one behind
    mixed = numbers["projection"].permute(1, 0, 2).flatten(1) @ numbers["mix.weight"].T
    matrix = torch.cat([mixed, numbers["mix.bias"][None]])
    quantizer = RandomProjectionQuantizer(9, 16, code_dim=8, num_codebooks=2, normalize=False)
    state = {"projection": matrix.unflatten(1, (2, 8)).transpose(0, 1), "codes": numbers["codes"]}
    quantizer.load_state_dict(state)
    x = F.pad(F.layer_norm(numbers["input"], (8,)), (0, 1), value=1.0)
    assert torch.equal(quantizer.encode(x), numbers["indices"])
    plain = RandomProjectionQuantizer(8, 16, code_dim=8, num_codebooks=2)
    plain.load_state_dict({**state, "projection": state["projection"][:, :8]})
    assert torch.equal(plain.encode(numbers["input"]), quantizer.encode(F.pad(x[..., :8], (0, 1))))
