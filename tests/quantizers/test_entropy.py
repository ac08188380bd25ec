"""The factorised entropies, against the softmax over all codes written out."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xq.quantizers import BSQ, LFQ, entropy_in_bits, indices_to_signs, sign_entropy


def full_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both entropies from the N x 2^d matrix; `logits` are the log-odds of each bit."""
    codes = 2.0 * indices_to_signs(torch.arange(2 ** logits.shape[-1]), logits.shape[-1]) - 1
    log_p = (logits @ (codes / 2).T.to(logits)).log_softmax(-1)
    per_token = -(log_p.exp() * log_p).sum(-1).mean()
    mean = log_p.exp().mean(0)
    return per_token, torch.special.entr(mean).sum()


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
def test_both_entropies_and_gradients_equal_the_full_softmax(dim: int, spread: float) -> None:
    a = (spread * torch.randn(13, dim, dtype=torch.float64)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    entropy = sign_entropy(a)
    per_token, batch = full_softmax(b)
    torch.testing.assert_close(entropy.per_token, per_token)
    torch.testing.assert_close(entropy.batch, batch)
    entropy.penalty().backward()
    (per_token - batch).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_float32_equals_float64() -> None:
    logits = 3 * torch.randn(100, 12)
    single, double = sign_entropy(logits), sign_entropy(logits.double())
    torch.testing.assert_close(single.per_token.double(), double.per_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single.batch.double(), double.batch, rtol=1e-5, atol=1e-6)


def test_gradients_near_even_use_do_not_cancel() -> None:
    logits = 0.01 * torch.randn(16, 16)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x = logits.to(dtype).clone().requires_grad_()
        sign_entropy(x).batch.backward()
        assert x.grad is not None
        return x.grad.double()

    exact = gradient(torch.float64)
    # with -p log p, whose gradients cancel, it is ten times as far
    assert (gradient(torch.float32) - exact).norm() < 2e-6 * exact.norm()


def test_groups_sum_their_own_entropies() -> None:
    logits = 2 * torch.randn(50, 6)
    grouped = sign_entropy(logits, group_size=3)
    halves = [sign_entropy(half) for half in logits.split(3, dim=-1)]
    torch.testing.assert_close(grouped.batch, halves[0].batch + halves[1].batch)
    torch.testing.assert_close(grouped.per_token, sign_entropy(logits).per_token)
    assert grouped.batch >= sign_entropy(logits).batch


def test_gradcheck() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sign_entropy(a).penalty(), logits)
    assert torch.autograd.gradcheck(lambda a: sign_entropy(a, group_size=1).batch, logits)


@pytest.mark.parametrize(
    "u",
    [
        torch.full((7, 6), 3.0),
        torch.full((7, 6), -1e4),
        torch.full((7, 6), 1e30),
        torch.zeros(7, 6),
        torch.linspace(-1e6, 1e6, 42).view(7, 6),
    ],
    ids=["3", "-1e4", "1e30", "0", "spread"],
)
@pytest.mark.parametrize("leaf", [LFQ(6), LFQ(6, temperature=0.01), BSQ(6, group_size=2)])
def test_gradients_are_finite_however_large_or_constant_the_input(
    leaf: LFQ | BSQ, u: torch.Tensor
) -> None:
    u = u.clone().requires_grad_()
    penalty = leaf.entropy(u).penalty()
    penalty.backward()
    assert penalty.isfinite()
    assert u.grad is not None
    assert u.grad.isfinite().all()


def test_the_penalty_is_zero_exactly_where_tokens_are_certain_and_codes_alike() -> None:
    codes = 2.0 * indices_to_signs(torch.arange(16), 4) - 1
    best = sign_entropy(100 * codes)
    torch.testing.assert_close(best.penalty(), torch.tensor(0.0), atol=1e-5, rtol=0)
    worst = sign_entropy(100 * codes[:1])
    torch.testing.assert_close(worst.penalty(), torch.tensor(4 * math.log(2)))
    unsure = sign_entropy(torch.zeros(5, 4))
    torch.testing.assert_close(unsure.penalty(), torch.tensor(4 * math.log(2)))


def test_bits_and_shares() -> None:
    report = entropy_in_bits(LFQ(8).entropy(torch.zeros(3, 8)))
    assert report == pytest.approx(
        {"per_token_bits": 8, "per_token_share": 1, "batch_bits": 8, "batch_share": 1}
    )


def test_the_temperature_divides_the_squared_distance() -> None:
    leaf = BSQ(3, temperature=0.3)
    u = leaf.bound(torch.randn(9, 3))
    codes = leaf.decode(torch.arange(8))
    log_p = (-(u[:, None] - codes).square().sum(-1) / 0.3).log_softmax(-1)
    want = -(log_p.exp() * log_p).sum(-1).mean()
    torch.testing.assert_close(leaf.entropy(u).per_token, want)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_codes_times_tokens_or_channels_is_made() -> None:
    leaf = LFQ(18)
    x = torch.randn(64, 18, requires_grad=True)
    with LargestTensor() as largest:
        q = leaf(x)
        q.losses.total().backward()
    assert largest.elements <= 2**18 + 1


def test_the_regularizer_is_computed_in_training_with_gradients_only() -> None:
    leaf = LFQ(4)
    x = torch.randn(6, 4)
    assert leaf(x).losses.regularizer > 0
    with torch.no_grad():
        assert leaf(x).losses.regularizer == 0
    assert leaf.eval()(x).losses.regularizer == 0
    assert LFQ(4, regularize=False)(x).losses.regularizer == 0


@pytest.mark.parametrize("multiscale", [False, (1, 2, 4)])
def test_entropy_in_a_residual_reaches_the_encoder(multiscale: bool | tuple[int, ...]) -> None:
    from xq.quantizers import ResidualQuantizer

    residual = ResidualQuantizer(LFQ(4), depth=3, multiscale=multiscale)
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    residual(x).losses.regularizer.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("dim", "group_size"), [(6, 4), (6, 0), (30, 30)])
def test_groups_that_do_not_fit_are_refused(dim: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"group_size|too large"):
        sign_entropy(torch.zeros(2, dim), group_size)
