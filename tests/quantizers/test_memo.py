"""What is derived from weights is derived once a call, and never serves another call."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xq.quantizers import VQ, ChannelFirst, EMACodebook, ProductQuantizer, ResidualQuantizer, memo
from xq.quantizers.memo import once, one_call


class Counted:
    """Makes something, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def made(self, *args: int) -> int:
        self.times += 1
        return sum(args)


def test_once_within_a_call_and_anew_in_the_next() -> None:
    counted = Counted()
    assert once(counted.made, 1) == 1
    assert once(counted.made, 1) == 1
    assert counted.times == 2
    for calls in (3, 4):
        with one_call():
            assert [once(counted.made, 1) for _ in range(3)] == [1, 1, 1]
        assert counted.times == calls
    assert memo._THREAD.kept is None


def test_arguments_owners_and_gradients_tell_apart() -> None:
    one, two = Counted(), Counted()
    with one_call():
        assert (once(one.made, 1), once(one.made, 2), once(two.made, 1)) == (1, 2, 1)
        with torch.no_grad():
            once(one.made, 1)
    assert (one.times, two.times) == (3, 1)


def test_an_inner_call_keeps_to_itself_and_an_error_leaves_nothing() -> None:
    counted = Counted()
    with one_call():
        once(counted.made)
        with pytest.raises(RuntimeError, match="inside"), one_call():  # noqa: PT012
            once(counted.made)
            raise RuntimeError("inside")
        once(counted.made)
    assert counted.times == 2
    assert memo._THREAD.kept is None


def test_threads_do_not_meet() -> None:
    counted = Counted()
    with one_call():
        once(counted.made)
        other = threading.Thread(target=lambda: once(counted.made))
        other.start()
        other.join()
    assert counted.times == 2


@pytest.fixture
def normalized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every table of codes that is normalized."""
    found: list[Tensor] = []
    plain = VQ._codes

    def counted(self: VQ) -> Tensor:
        found.append(plain(self))
        return found[-1]

    monkeypatch.setattr(VQ, "_codes", counted)
    return found


def shared() -> ResidualQuantizer:
    return ResidualQuantizer(VQ(4, 9, normalize=True), depth=5, shared=True)


def test_a_shared_codebook_is_normalized_once_a_call(normalized: list[Tensor]) -> None:
    quantizer = shared()
    x = torch.randn(6, 4)
    _, indices, _ = quantizer(x)
    assert len(normalized) == 1
    quantizer.encode(x)
    assert len(normalized) == 2
    quantizer.decode(indices)
    assert len(normalized) == 3
    ProductQuantizer(VQ(4, 9, normalize=True), P=2)(torch.randn(6, 8))
    assert len(normalized) == 5


CHANGES: dict[str, Callable[[VQ], object]] = {
    "data": lambda vq: vq.codebook.weight.data.normal_(),
    "in place": lambda vq: vq.codebook.weight.detach().normal_(),
    "copy": lambda vq: vq.load_state_dict({"codebook.weight": torch.randn(9, 4)}),
    "numpy": lambda vq: vq.codebook.weight.detach().numpy().__imul__(-1),
}


@pytest.mark.parametrize("how", CHANGES)
def test_codes_are_never_stale(how: str) -> None:
    quantizer = shared()
    x = torch.randn(6, 4)
    quantizer(x)
    CHANGES[how](quantizer.steps[0])
    fresh = shared()
    fresh.load_state_dict(quantizer.state_dict())
    for stale, want in (
        (quantizer(x).z, fresh(x).z),
        (quantizer.decode(fresh.encode(x)), fresh.decode(fresh.encode(x))),
        (quantizer.steps[0].quantize(x).z, fresh.steps[0].quantize(x).z),
    ):
        assert torch.equal(stale, want)


def test_codes_may_change_between_two_partials() -> None:
    quantizer = shared()
    indices = quantizer.encode(torch.randn(6, 4))
    partials = quantizer.partials(indices)
    first = next(partials)
    quantizer.steps[0].codebook.weight.data.neg_()
    torch.testing.assert_close(next(partials) - first, -0.5 * codes(quantizer, indices[:, 1]))


def codes(quantizer: ResidualQuantizer, indices: Tensor) -> Tensor:
    return -F.embedding(indices, F.normalize(quantizer.steps[0].codebook.weight, dim=-1))


def test_averages_move_between_calls() -> None:
    quantizer = ResidualQuantizer(VQ(4, 9, codebook=EMACodebook, normalize=True), 3, shared=True)
    x = torch.randn(60, 4)
    for _ in range(3):
        z, indices, _ = quantizer(x)
        assert torch.equal(quantizer.decode(indices), z)


def test_an_error_in_a_forward_leaves_nothing() -> None:
    quantizer = shared()
    quantizer.estimate = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        quantizer(torch.randn(6, 4))
    assert memo._THREAD.kept is None


def test_gradients_of_shared_codes_are_those_of_a_loop_written_out() -> None:
    quantizer = shared().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    _, indices, losses = quantizer(x)
    weight = quantizer.steps[0].codebook.weight
    (got,) = torch.autograd.grad(losses.codebook, weight)

    u, total, fits = F.normalize(x, dim=-1), torch.zeros_like(x), []
    for k in range(5):
        # normalized anew at each step
        table = F.normalize(weight, dim=-1)
        total = total + 0.5**k * F.embedding(indices[:, k], table)
        fits.append((total - u).square().mean())
    (want,) = torch.autograd.grad(torch.stack(fits).mean(), weight)
    torch.testing.assert_close(got, want)


def test_a_checkpointed_quantizer_has_the_same_gradients() -> None:
    quantizer = ChannelFirst(ResidualQuantizer(VQ(4, 9, normalize=True), multiscale=(1, 2, 3)))
    x = torch.randn(2, 4, 3, 3)
    parameters = list(quantizer.parameters())
    gradients = []
    for run in (quantizer, lambda x: checkpoint(quantizer, x, use_reentrant=False)):
        z, _, losses = run(x)
        gradients.append(torch.autograd.grad(z.square().sum() + losses.total(), parameters))
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_two_threads_share_a_quantizer() -> None:
    quantizer = shared()
    x = torch.randn(2000, 4)
    want = quantizer(x)
    results: dict[str, object] = {}

    def evaluate() -> None:
        with torch.no_grad():
            for _ in range(20):
                results["evaluated"] = quantizer(x).z

    def train() -> None:
        for _ in range(20):
            z, _, losses = quantizer(x)
            (z.sum() + losses.total()).backward()
        results["trained"] = z

    threads = [threading.Thread(target=work) for work in (evaluate, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["evaluated"], want.z)
    assert torch.equal(results["trained"], want.z)
