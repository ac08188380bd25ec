"""DiVeQ: noise in training alone, a gradient to input and codes."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xq.quantizers import (
    VQ,
    DiVeQ,
    EMACodebook,
    ProductQuantizer,
    ResidualQuantizer,
    rotation_trick,
)
from xq.testing import check_quantizer


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_definition() -> None:
    u = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    noise = 0.3 * torch.randn(7, 5, dtype=torch.float64, generator=seeded())
    upstream = torch.randn(7, 5, dtype=torch.float64)
    out = DiVeQ(0.09, generator=seeded())(u, z)
    got = torch.autograd.grad((out * upstream).sum(), (u, z))
    for i in range(7):
        a, b = u[i].detach(), z[i].detach()
        distance = (b - a).norm()
        direction = F.normalize(b - a + noise[i], dim=0)
        torch.testing.assert_close(out[i].detach(), a + distance * direction)
        # d|z - u| / dz is the direction without noise, and d|z - u| / du its negative
        along = (b - a) / distance * (upstream[i] @ direction)
        torch.testing.assert_close(got[0][i], upstream[i] - along)
        torch.testing.assert_close(got[1][i], along)


def test_its_gradient_is_that_of_its_value_along_the_fixed_direction() -> None:
    u = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        direction = DiVeQ(0.1, generator=seeded()).train()(u, z)
    direction = F.normalize(direction - u.detach(), dim=-1)
    fixed = partial(lambda a, b, d: a + (b - a).norm(dim=-1, keepdim=True) * d, d=direction)
    assert torch.autograd.gradcheck(fixed, (u, z))


def test_as_far_from_the_input_as_the_code() -> None:
    u, z = torch.randn(2, 500, 8)
    out = DiVeQ(0.5)(u, z)
    torch.testing.assert_close((out - u).norm(dim=-1), (z - u).norm(dim=-1))
    assert (out - z).norm(dim=-1).mean() > 0.5
    near = DiVeQ(1e-6)(u, z)
    assert (near - z).abs().max() < 0.02


def test_without_variance_it_returns_the_code() -> None:
    u, z = torch.randn(2, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(DiVeQ(0.0)(u, z), z)


@pytest.mark.parametrize("training", [True, False])
def test_no_noise_in_eval_mode_nor_without_gradients(training) -> None:
    tree = ProductQuantizer(ResidualQuantizer(VQ(4, 8, estimator=DiVeQ(0.1)), 3), P=2)
    tree.train(training)
    x = torch.randn(40, 8, requires_grad=True)
    before = torch.random.get_rng_state()
    with torch.set_grad_enabled(not training):
        z, indices, _ = tree(x)
    assert torch.equal(z, tree.decode(indices))
    assert torch.equal(torch.random.get_rng_state(), before)
    if not training:
        (gradient,) = torch.autograd.grad(z.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))


def test_in_training_the_noise_moves_z_alone() -> None:
    leaf = VQ(4, 8, estimator=DiVeQ(0.1))
    plain = VQ(4, 8)
    plain.load_state_dict(leaf.state_dict())
    x = torch.randn(40, 4)
    first, second, silent = leaf(x), leaf(x), plain(x)
    assert not torch.equal(first.z, second.z)
    assert not torch.equal(first.z, leaf.decode(first.indices))
    for noisy in (first, second):
        assert torch.equal(noisy.indices, silent.indices)
        assert torch.equal(noisy.indices, leaf.encode(x))
        assert noisy.losses == silent.losses


def test_a_residual_errs_once_in_all() -> None:
    residual = ResidualQuantizer(VQ(4, 8, estimator=DiVeQ(0.1)), 5)
    x = torch.randn(40, 4, requires_grad=True)
    z, indices, _ = residual(x)
    code = residual.decode(indices)
    torch.testing.assert_close((z - x).norm(dim=-1), (code - x).norm(dim=-1))
    gradients = torch.autograd.grad(z.sum(), [x, *residual.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients), "every step learns"


def test_codes_learn_from_the_reconstruction_alone() -> None:
    leaf = VQ(4, 16, estimator=DiVeQ(1e-3))
    x = torch.randn(400, 4)
    optimizer = torch.optim.Adam(leaf.parameters(), 0.05)

    def error() -> float:
        return F.mse_loss(leaf.decode(leaf.encode(x)), x).item()

    before = error()
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(leaf(x).z, x).backward()
        optimizer.step()
    assert error() < 0.7 * before


def test_zero_tiny_and_huge_distances_have_finite_gradients() -> None:
    base = torch.randn(5)
    u = torch.stack([base, torch.zeros(5), base, 1e18 * base]).requires_grad_()
    z = torch.stack([base, torch.zeros(5), base + 1e-7, -1e18 * base]).requires_grad_()
    for variance in (0.0, 0.005):
        out = DiVeQ(variance)(u, z)
        assert out.isfinite().all()
        assert torch.equal(out[:2], u[:2]), "what lies on its code stays there"
        for gradient in torch.autograd.grad(out.sum(), (u, z)):
            assert gradient.isfinite().all()


TREES = {
    "leaf": lambda: VQ(4, 8, estimator=DiVeQ(0.1)),
    "ema": lambda: VQ(4, 8, normalize=True, codebook=EMACodebook, estimator=DiVeQ(0.1)),
    "residual": lambda: ResidualQuantizer(VQ(4, 8, estimator=DiVeQ(0.1)), 3),
    "product": lambda: ProductQuantizer([VQ(2, 8, estimator=DiVeQ()), VQ(2, 8)]),
    "pyramid": lambda: ResidualQuantizer(VQ(4, 8, estimator=DiVeQ()), multiscale=(1, 2)),
}


@pytest.mark.parametrize("name", TREES)
def test_the_contract(name) -> None:
    tree = TREES[name]()
    assert tree.noisy
    check_quantizer(tree, torch.randn(3, 2, 2, 4))


def test_a_tree_without_noise_says_so() -> None:
    assert not ResidualQuantizer(VQ(4, 8), 2).noisy
    assert not VQ(4, 8, estimator=rotation_trick).noisy


def test_steps_agree_by_what_their_estimators_do() -> None:
    steps = [VQ(4, 8, estimator=DiVeQ(0.1)) for _ in range(3)]
    assert ResidualQuantizer(steps).estimators == {"class": "DiVeQ", "variance": 0.1}
    with pytest.raises(ValueError, match=r"the same estimators, got {.*0\.1} .* and {.*0\.2}"):
        ResidualQuantizer([VQ(4, 8, estimator=DiVeQ(v)) for v in (0.1, 0.2)])
    with pytest.raises(ValueError, match="the same estimators"):
        ResidualQuantizer([VQ(4, 8, estimator=DiVeQ()), VQ(4, 8)])


def test_modes_reach_the_estimator() -> None:
    tree = ResidualQuantizer(VQ(4, 8, estimator=DiVeQ()), 2)
    tree.eval()
    assert not tree.steps[0].estimator.training
    assert tree.train().steps[1].estimator.training
    # on its own as well: the codes learn on, without noise
    tree.steps[0].estimator.eval()
    z, indices, _ = tree(torch.randn(5, 4))
    assert torch.equal(z, tree.decode(indices))


def test_a_generator_repeats_the_noise_and_leaves_the_global_one_alone() -> None:
    u, z = torch.randn(2, 6, 4)
    before = torch.random.get_rng_state()
    one = DiVeQ(0.1, generator=seeded(1))(u, z)
    assert torch.equal(one, DiVeQ(0.1, generator=seeded(1))(u, z))
    assert not torch.equal(one, DiVeQ(0.1, generator=seeded(2))(u, z))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_copies_share_the_generator() -> None:
    generator = seeded()
    product = ProductQuantizer(VQ(4, 8, estimator=DiVeQ(0.1, generator=generator)), P=2)
    estimators = [branch.estimator for branch in product.branches]
    assert all(estimator.generator is generator for estimator in estimators)
    assert estimators[0] is not estimators[1]
    # else both would turn alike
    with torch.no_grad():
        product.branches[1].load_state_dict(product.branches[0].state_dict())
    x = torch.randn(5, 4)
    a, b = product(torch.cat([x, x], -1)).z.chunk(2, -1)
    assert not torch.allclose(a, b)


def test_copies_and_files() -> None:
    leaf = VQ(4, 8, estimator=DiVeQ(0.25))
    leaf.estimator.eval()
    for twin in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert twin.estimator is not leaf.estimator
        assert twin.estimator.variance == 0.25
        assert not twin.estimator.training
    assert repr(leaf.estimator) == "DiVeQ(variance=0.25)"
    assert list(leaf.state_dict()) == ["codebook.weight"]
    assert leaf.config()["estimator"] == {"class": "DiVeQ", "variance": 0.25}


def test_checkpointing_repeats_the_noise() -> None:
    leaf = VQ(4, 8, estimator=DiVeQ(0.1))
    x = torch.randn(20, 4, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return leaf(x).z.square().sum()

    def gradient(run) -> torch.Tensor:
        torch.manual_seed(8)
        return torch.autograd.grad(run(), x)[0]

    plain = gradient(lambda: step(x))
    again = gradient(lambda: checkpoint(step, x, use_reentrant=False))
    assert torch.equal(plain, again)


@pytest.mark.parametrize("variance", [-0.1, float("inf"), float("nan")])
def test_variances_that_are_none(variance) -> None:
    with pytest.raises(ValueError, match=r"DiVeQ needs a finite variance of 0 or more, got"):
        DiVeQ(variance)


@pytest.mark.compile
@pytest.mark.parametrize("depth", [1, 3])
def test_it_compiles_as_one_graph(depth) -> None:
    torch._dynamo.reset()
    quantizer = ResidualQuantizer(VQ(4, 8, estimator=DiVeQ(0.1)), depth)
    graph = copy.deepcopy(quantizer)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = torch.randn(5, 4, requires_grad=True)
        results = []
        for q in (quantizer, compiled):
            torch.manual_seed(step)
            z = q(x).z
            results.append((z.detach(), *torch.autograd.grad(z.square().sum(), x)))
        torch.testing.assert_close(*results)
    quantizer.eval()
    graph.eval()
    assert torch.equal(compiled(x).z, quantizer(x).z)
