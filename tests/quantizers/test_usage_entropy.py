"""The entropy of codebook usage, against the softmax over all codes written out."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_entropy import LargestTensor

from xq.quantizers import (
    BSQ,
    IBQ,
    LFQ,
    VQ,
    EMACodebook,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimCodebook,
    blocks,
    usage_entropy,
)


def full_softmax(
    u: torch.Tensor, codes: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies from the N x K matrix of squared distances."""
    distances = (u.flatten(0, -2)[:, None] - codes).square().sum(-1)
    log_p = (-distances / temperature).log_softmax(-1)
    mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean(), torch.special.entr(mean).sum()


def in_blocks_of(vectors: int, codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SCORES", vectors * codes)


VQS = {
    "euclidean": lambda t: VQ(5, 13, entropy_temperature=t),
    "cosine": lambda t: VQ(5, 13, metric="cosine", entropy_temperature=t),
    "unit": lambda t: VQ(5, 13, normalize=True, entropy_temperature=t),
}


@pytest.mark.parametrize("temperature", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", VQS)
def test_values_and_gradients_equal_the_full_softmax(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(4, 13, monkeypatch)
    vq = VQS[name](temperature).double()
    torch.nn.init.normal_(vq.codebook.weight)
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    tensors = (x, vq.codebook.weight)
    u, codes = tensors if name == "euclidean" else (F.normalize(t, dim=-1) for t in tensors)
    entropy = vq.entropy(vq.bound(x))
    per_token, batch = full_softmax(u, codes, temperature)
    assert entropy.maximum == math.log(13)
    for ours, naive in ((entropy.per_token, per_token), (entropy.batch, batch)):
        torch.testing.assert_close(ours, naive)
        found = torch.autograd.grad(ours, tensors, retain_graph=True)
        wanted = torch.autograd.grad(naive, tensors, retain_graph=True)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(vq(x).losses.regularizer, per_token + math.log(13) - batch)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(2, 4, monkeypatch)
    u = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def penalty(u: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return usage_entropy.distance_entropy(u, codes, 0.7).penalty()

    assert torch.autograd.gradcheck(penalty, (u, codes))


@pytest.mark.parametrize("leaf", [VQ(3, 5, entropy_temperature=1.0), IBQ(3, 5)])
def test_a_second_derivative_is_refused(leaf: Quantizer) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    q = leaf(x)
    (grad,) = torch.autograd.grad(q.losses.regularizer, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="have no second derivative"):
        grad.square().sum().backward()


def test_float32_equals_float64_far_from_the_origin() -> None:
    vq = VQ(6, 100, entropy_temperature=0.5)
    torch.nn.init.normal_(vq.codebook.weight, mean=300.0)
    x = 300 + torch.randn(200, 6)
    single = vq.entropy(x)
    double = copy.deepcopy(vq).double().entropy(x.double())
    for ours, exact in zip(single[:2], double[:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_no_tensor_of_all_scores_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks_of(8, 64, monkeypatch)
    u, codes, bias = torch.randn(100, 4), torch.randn(64, 4), torch.randn(64)
    mass, entropy = usage_entropy._usage(u, codes, bias)
    with LargestTensor() as largest:
        usage_entropy._usage(u, codes, bias)
        usage_entropy._usage_backward(u, codes, bias, mass, entropy)
    assert largest.elements == 8 * 64


OPS = {
    "usage": lambda: (torch.randn(7, 3), torch.randn(5, 3), torch.randn(5)),
    "usage_backward": lambda: (*OPS["usage"](), torch.randn(5), torch.randn(())),
    "propagated": lambda: (torch.randn(7, 3), torch.randn(5, 3), torch.randn(7, 3)),
    "propagate": lambda: (torch.randn(7, 3), torch.randn(5, 3), torch.randn(7, 3)),
    "sample": lambda: (torch.randn(7, 3), torch.randn(5, 4), torch.rand(7).double()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_ops_keep_what_they_tell_compilers(name: str, dtype: torch.dtype) -> None:
    args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in OPS[name]()]
    if name == "sample":
        args[2] = args[2].double()
    op = getattr(torch.ops.xq, name)
    torch.library.opcheck(op, tuple(args), test_utils=("test_schema", "test_faketensor"))


def test_the_penalty_is_zero_where_vectors_are_codes_used_alike() -> None:
    vq = VQ(3, 8, entropy_temperature=1e-3)
    torch.nn.init.normal_(vq.codebook.weight)
    codes = vq.codebook.weight.detach()
    torch.testing.assert_close(vq.entropy(codes).penalty(), torch.tensor(0.0), atol=1e-6, rtol=0)
    one = vq.entropy(codes[:1]).penalty()
    torch.testing.assert_close(one, torch.tensor(math.log(8)))
    unsure = VQ(3, 8, entropy_temperature=1e6).entropy(codes)
    torch.testing.assert_close(unsure.per_token, torch.tensor(math.log(8)))


def test_minimizing_it_spreads_the_use_of_codes() -> None:
    vq = VQ(2, 32, entropy_temperature=0.1)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05)
    x = torch.randn(500, 2)
    before = len(vq.encode(x).unique())
    for _ in range(100):
        optimizer.zero_grad()
        vq(x).losses.total(regularizer=1.0).backward()
        optimizer.step()
    assert before < 12
    assert len(vq.encode(x).unique()) > 28


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_broken_code_takes_no_part(value: float) -> None:
    whole, broken = VQ(3, 9, entropy_temperature=0.5), VQ(3, 9, entropy_temperature=0.5)
    torch.nn.init.normal_(whole.codebook.weight)
    with torch.no_grad():
        broken.codebook.weight.copy_(whole.codebook.weight)
        broken.codebook.weight[4] = value
        whole.codebook.weight[4] = 1e6
    x = torch.randn(20, 3, requires_grad=True)
    for one, two in zip(whole.entropy(x)[:2], broken.entropy(x)[:2], strict=True):
        torch.testing.assert_close(one, two)
    broken.entropy(x).penalty().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert broken.codebook.weight.grad.isfinite().all()


@pytest.mark.parametrize("u", [torch.zeros(7, 3), torch.full((7, 3), 1e12), torch.randn(7, 3)])
@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_gradients_are_finite_however_large_the_input(u: torch.Tensor, temperature: float) -> None:
    vq = VQ(3, 9, entropy_temperature=temperature)
    u = u.clone().requires_grad_()
    vq.entropy(u).penalty().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()
    assert vq.codebook.weight.grad.isfinite().all()


def test_the_regularizer_is_computed_in_training_with_gradients_only() -> None:
    vq = VQ(3, 9, entropy_temperature=0.5)
    x = torch.randn(6, 3)
    assert vq(x).losses.regularizer > 0
    assert VQ(3, 9)(x).losses.regularizer == 0
    with torch.no_grad():
        assert vq(x).losses.regularizer == 0
    assert vq.eval()(x).losses.regularizer == 0


@pytest.mark.parametrize("multiscale", [False, (1, 2)])
def test_in_a_residual_it_reaches_the_encoder(multiscale: bool | tuple[int, ...]) -> None:
    leaf = VQ(4, 9, codebook=EMACodebook, entropy_temperature=0.5)
    residual = ResidualQuantizer(leaf, depth=2, multiscale=multiscale)
    assert residual.regularizes
    x = torch.randn(2, 2, 2, 4, requires_grad=True)
    residual(x).losses.regularizer.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_codes_made_of_others_learn_from_it() -> None:
    vq = VQ(4, 9, codebook=SimCodebook, entropy_temperature=0.5)
    vq(torch.randn(20, 4)).losses.regularizer.backward()
    assert vq.codebook.transform.weight.grad.abs().sum() > 0


def test_temperatures_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"VQ.entropy needs an entropy_temperature, got None"):
        VQ(3, 9).entropy(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"IBQ.entropy needs an entropy_temperature, got None"):
        IBQ(3, 9, entropy_temperature=None).entropy(torch.randn(2, 3))
    for leaf in (VQ, IBQ):
        with pytest.raises(ValueError, match=r"entropy needs a temperature above 0, got 0.0"):
            leaf(3, 9, entropy_temperature=0.0)


LEAVES = {
    "VQ": partial(VQ, 4, 16, entropy_temperature=0.5),
    "IBQ": partial(IBQ, 4, 16),
    "LFQ": partial(LFQ, 4),
    "BSQ": partial(BSQ, 4),
}


@pytest.mark.parametrize("name", LEAVES)
def test_processes_may_keep_their_batch_to_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = []

    def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
        summed.append(x)
        return x

    monkeypatch.setattr("xq.quantizers.entropy.sum_over_processes", sum_over_processes)
    x = torch.randn(6, 4)
    shared, alone = LEAVES[name](), LEAVES[name](across_processes=False)
    alone.load_state_dict(shared.state_dict())
    losses = [leaf(x).losses.regularizer for leaf in (shared, alone)]
    torch.testing.assert_close(*losses)
    assert len(summed) == 1
    assert alone.config()["across_processes"] is False


def test_each_leaf_of_a_tree_reduces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    summed = []
    monkeypatch.setattr("xq.quantizers.entropy.sum_over_processes", lambda x: summed.append(x) or x)
    tree: Quantizer = ProductQuantizer([IBQ(2, 16), LFQ(4), VQ(2, 16, entropy_temperature=1.0)])
    tree(torch.randn(6, 8))
    assert len(summed) == 3


@pytest.mark.parametrize("leaf", [VQ(3, 50, entropy_temperature=0.01), IBQ(3, 50)])
def test_a_backward_pass_under_autocast_is_exact_too(leaf: Quantizer) -> None:
    x = torch.randn(40, 3)
    grads = []
    for enabled in (False, True):
        a = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            q = leaf(a)
            q.losses.regularizer.backward()
        grads.append(a.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 1e-3
