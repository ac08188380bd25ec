"""The entropy of codebook usage over two processes is that of the joint batch, or of each."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_sync import SPLITS, CountReductions, batches
from torch import Tensor

from xq.losses import EntropyLoss, code_entropy
from xq.quantizers import IBQ, LFQ, VQ, ProductQuantizer, Quantizer

pytestmark = pytest.mark.distributed


def leaves(**options: bool) -> dict[str, Quantizer]:
    """The same on every process: they draw their codes from one seed."""
    torch.manual_seed(0)
    made: dict[str, Quantizer] = {
        "VQ": VQ(4, 9, entropy_temperature=0.5, **options),
        "IBQ": IBQ(4, 9, entropy_temperature=0.5, **options),
    }
    torch.nn.init.normal_(made["VQ"].codebook.weight)
    return made


def batch_entropy_of(leaf: Any, part: Tensor) -> dict[str, Any]:
    leaf, x = copy.deepcopy(leaf), part.clone().requires_grad_()
    with CountReductions() as count:
        batch = leaf.entropy(x).batch
        grads = torch.autograd.grad(batch, (x, leaf.codebook.weight))
    return {"batch": batch.detach(), "x": grads[0], "codes": grads[1], "calls": count.calls}


def loss_of(part: Tensor, **options: bool) -> dict[str, Any]:
    """A loss on scores of one's own."""
    x = part.clone().requires_grad_()
    with CountReductions() as count:
        loss = EntropyLoss(partial(code_entropy, **options), per_token=0.0)(x)
        (grad,) = torch.autograd.grad(loss, x)
    return {"loss": loss.detach(), "x": grad, "calls": count.calls}


def reductions_of(tree: Quantizer, part: Tensor) -> tuple[int, int]:
    """In a training step, and in all that does not learn."""
    with CountReductions() as learning:
        tree(part).losses.total().backward()
    with CountReductions() as silent:
        tree.encode(part)
        with torch.no_grad():
            tree(part)
        tree.eval()(part)
    return learning.calls, silent.calls


def work(rank: int, join: Callable[[], None]) -> dict[Any, Any]:
    join()
    out: dict[Any, Any] = {}
    for split, sizes in SPLITS.items():
        part = batches()[0].split(sizes)[rank]
        out["loss", split] = loss_of(part)
        out["loss", split, "alone"] = loss_of(part, across_processes=False)
        for name, leaf in leaves().items():
            out[name, split] = batch_entropy_of(leaf, part)
        for name, leaf in leaves(across_processes=False).items():
            out[name, split, "alone"] = batch_entropy_of(leaf, part)
    tree = ProductQuantizer(
        [VQ(2, 4, entropy_temperature=1.0), LFQ(2), IBQ(2, 4, across_processes=False)]
    )
    out["calls"] = reductions_of(tree, torch.randn(5, 6, requires_grad=True))
    return out


@pytest.fixture(scope="module")
def both(on_processes) -> list[dict[Any, Any]]:
    """What each of the two processes found."""
    return on_processes(work)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["VQ", "IBQ"])
def test_value_and_gradients_are_those_of_the_joint_batch(both, name, split):
    want = batch_entropy_of(leaves()[name], batches()[0])
    assert want["x"].abs().max() > 1e-4
    found = [process[name, split] for process in both]
    for mine in found:
        torch.testing.assert_close(mine["batch"], want["batch"])
        # one reduction forward, one backward
        assert mine["calls"] == 2
    # each process counts the shared entropy once, and data parallelism takes the mean over them
    grads = torch.cat([mine["x"] for mine in found])
    torch.testing.assert_close(grads / 2, want["x"], rtol=1e-4, atol=1e-7)
    codes = sum(mine["codes"] for mine in found)
    torch.testing.assert_close(codes / 2, want["codes"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["VQ", "IBQ"])
def test_alone_it_is_that_of_its_own_batch(both, name, split):
    for rank, process in enumerate(both):
        part = batches()[0].split(SPLITS[split])[rank]
        want, mine = batch_entropy_of(leaves()[name], part), process[name, split, "alone"]
        torch.testing.assert_close(mine["batch"], want["batch"])
        torch.testing.assert_close(mine["x"], want["x"])
        assert mine["calls"] == 0


def test_one_reduction_each_way_for_a_batch_entropy_and_none_in_eval(both):
    assert [process["calls"] for process in both] == [(4, 0)] * 2


@pytest.mark.parametrize("split", SPLITS)
def test_the_loss_on_scores_is_that_of_the_joint_batch_or_of_its_own(both, split):
    want = loss_of(batches()[0])
    for mine in (process["loss", split] for process in both):
        torch.testing.assert_close(mine["loss"], want["loss"])
        assert mine["calls"] == 2
    grads = torch.cat([process["loss", split]["x"] for process in both])
    torch.testing.assert_close(grads / 2, want["x"], rtol=1e-4, atol=1e-7)
    for rank, process in enumerate(both):
        want, mine = (
            loss_of(batches()[0].split(SPLITS[split])[rank]),
            process["loss", split, "alone"],
        )
        torch.testing.assert_close(mine["loss"], want["loss"])
        torch.testing.assert_close(mine["x"], want["x"])
        assert mine["calls"] == 0
