"""Two processes with parts of a batch learn what one process learns from all of it."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xq.distributed import all_reduce_sum_, sum_over_processes, world_size
from xq.metrics import CodebookUsage
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    EMACodebook,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    accumulating,
    sign_entropy,
)

pytestmark = pytest.mark.distributed

# how many of the eight samples of a batch each process has
SPLITS = {"halves": (4, 4), "uneven": (3, 5), "one-empty": (0, 8)}
STEPS = 4


def ema(dim: int) -> VQ:
    return VQ(dim, 6, codebook=partial(EMACodebook, decay=0.8, revive=0.0))


TREES: dict[str, Callable[[], Quantizer]] = {
    "leaf": lambda: ema(4),
    "product-of-residuals": lambda: ProductQuantizer(ResidualQuantizer(ema(2), depth=3), P=2),
    "residual-shared": lambda: ResidualQuantizer(ema(4), depth=3, shared=True),
    "pyramid-shared": lambda: ResidualQuantizer(ema(4), multiscale=(1, 2)),
}


def built(name: str) -> Quantizer:
    torch.manual_seed(0)
    return TREES[name]()


def batches(steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 2, 2, 4, generator=generator) for _ in range(steps)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


class CountReductions:
    """Counts the calls of `torch.distributed.all_reduce` within it."""

    def __enter__(self) -> "CountReductions":
        self.calls, self._before = 0, dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._before(*args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._before


def train(quantizer: Quantizer, parts: list[Tensor]) -> dict[str, Any]:
    """Trains on these parts; what came out and what it took."""
    indices, calls = [], []
    for part in parts:
        with CountReductions() as count:
            indices.append(quantizer(part).indices)
        calls.append(count.calls)
    return {"state": state(quantizer), "indices": indices, "calls": calls}


def accumulate(quantizer: Quantizer, parts: list[Tensor]) -> dict[str, Any]:
    """The same, with all but every second part only observed."""
    calls = []
    for k, part in enumerate(parts):
        with accumulating(quantizer) if k % 2 == 0 else nullcontext(), CountReductions() as count:
            quantizer(part)
        calls.append(count.calls)
    return {"state": state(quantizer), "calls": calls}


def silent(quantizer: Quantizer, part: Tensor) -> int:
    """Reductions of all that must not learn."""
    with CountReductions() as count:
        quantizer.encode(part)
        quantizer.decode(quantizer.encode(part))
        with torch.no_grad():
            quantizer(part)
        quantizer.eval()(part)
        quantizer.train()
    return count.calls


def entropy_of(part: Tensor) -> dict[str, Tensor]:
    logits = part.clone().requires_grad_()
    entropy = sign_entropy(logits)
    (grad,) = torch.autograd.grad(entropy.batch, logits)
    return {"batch": entropy.batch.detach(), "grad": grad}


def regularized(leaf: Quantizer, part: Tensor, parallel: bool) -> dict[str, Any]:
    """Gradients of an encoder in front of this leaf, as training has them."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, leaf.dim), copy.deepcopy(leaf))
    if parallel:
        model = DistributedDataParallel(model)
    losses = model(part)[2]
    losses.total().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    return {"regularizer": losses.regularizer.detach(), "grads": grads}


def usage_of(part: Tensor) -> dict[str, Any]:
    quantizer = built("product-of-residuals")
    usage = CodebookUsage.of(quantizer)
    usage.update(quantizer.encode(part))
    usage.update(quantizer.encode(-part))
    return {"usage": list(usage.compute()), "counts": usage.counts.clone()}


LEAVES = {"LFQ": LFQ(5), "LFQ-groups": LFQ(6, group_size=3), "BSQ": BSQ(5)}


def work(rank: int, join: Callable[[], None]) -> dict[str, Any]:
    """All that one of the two processes does."""
    early = built("leaf")
    alone = train(early, batches(1)[:1])
    lonely = (world_size(), sum_over_processes(torch.ones(2)).tolist())
    join()
    out: dict[str, Any] = {"alone": alone, "lonely": lonely, "world_size": world_size()}

    def part(split: str, x: Tensor) -> Tensor:
        return x.split(SPLITS[split])[rank]

    out["early"] = train(early, [part("halves", x) for x in batches()])
    for split in SPLITS:
        parts = [part(split, x) for x in batches()]
        for name in TREES:
            out["train", name, split] = train(built(name), parts)
            out["accumulate", name, split] = accumulate(built(name), parts)
        out["usage", split] = usage_of(parts[0])
    for name in TREES:
        out["silent", name] = silent(built(name), part("uneven", batches()[0]))
    for name, leaf in LEAVES.items():
        out["regularized", name] = regularized(leaf, part("halves", batches()[0]), parallel=True)

    mixed = [torch.full((2,), rank + 1.0), torch.full((3, 1), rank + 1, dtype=torch.int64)]
    mixed.append(torch.full((), 10.0 * (rank + 1)))
    with CountReductions() as count:
        all_reduce_sum_(mixed)
    out["sums"] = (mixed, count.calls)
    return out


def work_on_entropy(rank: int, join: Callable[[], None]) -> dict[str, Any]:
    """Apart from the rest: a process without tokens must not leave the other one waiting."""
    join()
    return {s: entropy_of(batches()[0].split(SPLITS[s])[rank]) for s in SPLITS}


@pytest.fixture(scope="module")
def both(on_processes) -> list[dict[Any, Any]]:
    """What each of the two processes found."""
    return on_processes(work)


@pytest.fixture(scope="module")
def entropies(on_processes) -> list[dict[str, dict[str, Tensor]]]:
    """The entropy that each of the two processes found, and its gradient."""
    return on_processes(work_on_entropy)


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6, msg=None)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TREES)
def test_averages_equal_those_of_the_joint_batch(both, name, split):
    want = train(built(name), batches())
    start = state(built(name))
    assert any(not torch.equal(want["state"][key], start[key]) for key in start)
    for rank in range(2):
        assert_same_state(both[rank]["train", name, split]["state"], want["state"])
    for step, indices in enumerate(want["indices"]):
        parts = [both[rank]["train", name, split]["indices"][step] for rank in range(2)]
        assert torch.equal(torch.cat(parts), indices)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TREES)
def test_processes_stay_alike_bit_for_bit(both, name, split):
    first, second = (process["train", name, split]["state"] for process in both)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TREES)
def test_one_reduction_a_forward(both, name, split):
    assert [process["train", name, split]["calls"] for process in both] == [[1] * STEPS] * 2


@pytest.mark.parametrize("name", TREES)
def test_no_reduction_where_nothing_is_learned(both, name):
    assert [process["silent", name] for process in both] == [0, 0]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TREES)
def test_accumulating_waits_for_the_next_forward(both, name, split):
    joint = batches()
    quantizer = built(name)
    want = accumulate(quantizer, joint)
    for process in both:
        got = process["accumulate", name, split]
        assert got["calls"] == [0, 1] * (STEPS // 2)
        assert_same_state(got["state"], want["state"])


def test_accumulating_equals_the_larger_batch(both):
    want = built("leaf")
    for first, second in zip(batches()[::2], batches()[1::2], strict=True):
        want(torch.cat([first, second]))
    assert_same_state(both[0]["accumulate", "leaf", "uneven"]["state"], state(want))


def test_a_module_built_before_the_group_joins_it(both):
    assert [process["lonely"] for process in both] == [(1, [1.0, 1.0])] * 2
    assert [process["world_size"] for process in both] == [2, 2]
    assert both[0]["alone"]["calls"] == [0]
    quantizer = built("leaf")
    train(quantizer, batches(1))
    want = train(quantizer, batches())
    for process in both:
        assert process["early"]["calls"] == [1] * STEPS
        assert_same_state(process["early"]["state"], want["state"])


@pytest.mark.parametrize("split", SPLITS)
def test_batch_entropy_is_that_of_the_joint_batch(entropies, split):
    want = entropy_of(batches()[0])
    for process in entropies:
        torch.testing.assert_close(process[split]["batch"], want["batch"])


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_of_the_batch_entropy_is_that_of_the_joint_batch(entropies, split):
    want = entropy_of(batches()[0])
    grads = torch.cat([process[split]["grad"] for process in entropies])
    assert want["grad"].abs().max() > 1e-3
    # each process counts the shared entropy once, and data parallelism takes the mean over them
    torch.testing.assert_close(grads / 2, want["grad"])


@pytest.mark.parametrize("name", LEAVES)
def test_gradients_under_data_parallelism_are_those_of_the_joint_batch(both, name):
    want = regularized(LEAVES[name], batches()[0], parallel=False)
    for process in both:
        got = process["regularized", name]
        for mine, theirs in zip(got["grads"], want["grads"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # the entropy of a token is a mean over its own process
    values = torch.stack([process["regularized", name]["regularizer"] for process in both])
    torch.testing.assert_close(values.mean(), want["regularizer"])


@pytest.mark.parametrize("split", SPLITS)
def test_usage_sums_over_processes(both, split):
    want = usage_of(batches()[0])
    for process in both:
        for mine, theirs in zip(process["usage", split]["usage"], want["usage"], strict=True):
            torch.testing.assert_close(mine, theirs)
    counts = [process["usage", split]["counts"] for process in both]
    assert torch.equal(sum(counts), want["counts"])


def test_sums_of_several_tensors_take_one_reduction_a_dtype(both):
    for process in both:
        (small, whole, scalar), calls = process["sums"]
        assert small.tolist() == [3.0, 3.0]
        assert whole.tolist() == [[3], [3], [3]]
        assert whole.dtype == torch.int64
        assert scalar.item() == 30
        assert calls == 2


def fail(rank: int, join: Callable[[], None]) -> None:
    join()
    raise RuntimeError(f"process {rank} gives up")


def test_an_error_of_one_process_is_an_error_here(on_processes):
    with pytest.raises(Exception, match="process 0 gives up"):
        on_processes(fail, world_size=1)
