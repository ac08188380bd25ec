"""Codes drawn at random, against the probabilities that they are drawn by."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xq.quantizers import (
    VQ,
    CodeSampling,
    EMACodebook,
    ResidualQuantizer,
    blocks,
    rotation_trick,
)

DRAWS = 50_000


def seeded(temperature: float) -> CodeSampling:
    return CodeSampling(temperature, generator=torch.Generator().manual_seed(0))


def shares(vq: VQ, x: torch.Tensor) -> torch.Tensor:
    """How often each code is drawn for one vector."""
    indices = vq(x.expand(DRAWS, -1)).indices
    return indices.bincount(minlength=vq.codebook_size) / DRAWS


@pytest.mark.parametrize("temperature", [0.2, 2.0])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "unit"])
def test_codes_are_drawn_by_the_softmax_of_negative_distances(
    metric: str, temperature: float
) -> None:
    options = {"normalize": True} if metric == "unit" else {"metric": metric}
    vq = VQ(3, 13, sampling=seeded(temperature), **options)
    torch.nn.init.normal_(vq.codebook.weight)
    x, codes = torch.randn(1, 3), vq.codebook.weight.detach()
    a, b = (x, codes) if metric == "euclidean" else (F.normalize(t, dim=-1) for t in (x, codes))
    p = (-(a - b).square().sum(-1) / temperature).softmax(-1)
    spread = (p * (1 - p) / DRAWS).sqrt()
    assert ((shares(vq, x) - p).abs() < 4 * spread + 1e-9).all()


def test_each_vector_draws_for_itself_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 50, 3)
    found = []
    for size in (1 << 19, 13 * 7, 1):
        monkeypatch.setattr(blocks, "_SCORES", size)
        torch.manual_seed(1)
        vq = VQ(3, 13, sampling=seeded(1.0))
        found.append(vq(x).indices)
    assert found[0].shape == (4, 50)
    assert len(found[0].unique()) == 13
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_z_is_the_drawn_code_and_the_fit_its_own() -> None:
    vq = VQ(3, 13, sampling=CodeSampling(5.0))
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(60, 3, requires_grad=True)
    z, indices, losses = vq(x)
    assert torch.equal(vq.decode(indices), z)
    assert not torch.equal(indices, vq.encode(x))
    torch.testing.assert_close(losses.commitment, F.mse_loss(x, vq.codebook.weight[indices]))
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("how", ["eval", "no_grad", "encode", "cold"])
def test_elsewhere_the_nearest_code_is_taken(how: str) -> None:
    vq = VQ(3, 13, sampling=CodeSampling(1e-6 if how == "cold" else 5.0))
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(60, 3)
    nearest = torch.cdist(x, vq.codebook.weight).argmin(-1)
    vq.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        found = vq.encode(x) if how == "encode" else vq(x).indices
    assert torch.equal(found, nearest)


def test_averages_follow_the_drawn_codes() -> None:
    vq = VQ(3, 13, codebook=partial(EMACodebook, decay=0.0), sampling=CodeSampling(50.0))
    indices = vq(torch.randn(200, 3)).indices
    hits = indices.bincount(minlength=13) / 200
    count = vq.codebook.count
    torch.testing.assert_close(count / count.sum(), hits)


def test_broken_codes_are_never_drawn() -> None:
    vq = VQ(3, 5, sampling=CodeSampling(1e6))
    with torch.no_grad():
        vq.codebook.weight[0], vq.codebook.weight[4] = float("nan"), float("inf")
    assert vq(torch.randn(500, 3)).indices.unique().tolist() == [1, 2, 3]


def test_rare_codes_are_drawn_too() -> None:
    """By numbers closer to one than float32 has any."""
    points, rows = torch.zeros(3, 1), torch.tensor([[0.0, 0.0], [0.0, 40.0]])
    # of the second code the probability is exp(-40)
    drawn = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert torch.ops.xq.sample(points, rows, drawn).tolist() == [0, 0, 0]
    rows[1, 1] = 22.0
    # and now exp(-22), less than half the step of float32 at one
    drawn[2] = 1 - 2.0**-33
    assert torch.ops.xq.sample(points, rows, drawn).tolist() == [0, 0, 1]


def test_each_step_of_a_residual_draws() -> None:
    residual = ResidualQuantizer(VQ(3, 13, sampling=CodeSampling(5.0)), 3)
    for step in residual.steps:
        torch.nn.init.normal_(step.codebook.weight)
    x = torch.randn(60, 3)
    z, indices, _ = residual(x)
    assert torch.equal(residual.decode(indices), z)
    assert (residual(x).indices != indices).any(0).all()


def test_the_temperature_may_follow_a_schedule() -> None:
    vq = VQ(3, 13, sampling=CodeSampling(1e-6))
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(60, 3)
    assert torch.equal(vq(x).indices, vq.encode(x))
    vq.sampling.temperature = 1e6
    assert not torch.equal(vq(x).indices, vq.encode(x))


def test_a_generator_makes_it_repeatable_and_leaves_torchs_alone() -> None:
    vq = VQ(3, 13, sampling=seeded(1.0))
    twin = copy.deepcopy(vq)
    x = torch.randn(60, 3)
    before = torch.get_rng_state()
    indices = vq(x).indices
    assert torch.equal(twin(x).indices, indices)
    assert not torch.equal(vq(x).indices, indices)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_draws_the_same_codes_again() -> None:
    vq = VQ(3, 13, sampling=CodeSampling(5.0))
    x = torch.randn(60, 3)
    grads = []
    for run in (vq, lambda x: checkpoint(vq, x, use_reentrant=False)):
        torch.manual_seed(2)
        run(x).losses.total().backward()
        grads.append(vq.codebook.weight.grad)
        vq.codebook.weight.grad = None
    torch.testing.assert_close(*grads)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not draw codes with estimator=rotation_trick"):
        VQ(3, 13, sampling=CodeSampling(1.0), estimator=rotation_trick)
    with pytest.raises(ValueError, match=r"CodeSampling needs a temperature above 0, got 0\.0"):
        CodeSampling(0.0)


def test_the_configuration_has_no_generator() -> None:
    assert VQ(3, 13, sampling=seeded(0.5)).config()["sampling"] == {
        "class": "CodeSampling",
        "temperature": 0.5,
    }
