"""Defects and complaints of docs/complaints.md that take several processes to be seen."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from family import state
from torch import Tensor

from xq.quantizers import (
    LFQ,
    VQ,
    EMACodebook,
    Masked,
    ProductQuantizer,
    ResidualQuantizer,
    initialize,
)

pytestmark = pytest.mark.distributed

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier")
COLLECTIVES += ("all_gather_object", "broadcast_object_list", "reduce_scatter_tensor")
# how many of the 12 vectors of a batch each process has
SPLITS = {"uneven": (4, 8), "one has none": (0, 12)}
STEPS = 4


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, 4, generator=generator) for _ in range(STEPS)]


def parts(split: str, rank: int) -> list[Tensor]:
    return [x.split(SPLITS[split])[rank] for x in batches()]


def averages(revive: float = 0.0) -> VQ:
    return VQ(4, 6, codebook=partial(EMACodebook, decay=0.8, revive=revive))


def counted(run: Callable[[], Any]) -> int:
    """How many collectives a call takes."""
    calls, before = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return before[name](*args, **kwargs)

        return call

    try:
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        run()
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
    return len(calls)


def batch_entropy(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    entropy = LFQ(4).entropy(x).batch
    return entropy.detach(), torch.autograd.grad(entropy, x)[0]


def learned(quantizer: Any, xs: list[Tensor]) -> dict[str, Tensor]:
    for x in xs:
        quantizer(x)
    return state(quantizer)


def with_other_seeds(rank: int) -> dict[Any, Any]:
    """Built from another seed on each process, and no wrapper that would make them alike."""
    torch.manual_seed(rank)
    out: dict[Any, Any] = {}
    for revive in (0.0, 0.02):
        # more codes than vectors, so that nobody chooses most of them
        vq = VQ(4, 50, codebook=partial(EMACodebook, decay=0.8, revive=revive))
        first = vq.codebook.codes().clone()
        out[revive] = {"first": first, "learned": learned(vq, parts("uneven", rank))}
    torch.manual_seed(rank)
    residual = ResidualQuantizer(averages(), 2)
    initialize(residual, batches()[0].split(SPLITS["uneven"])[rank])
    return {**out, "initialized": state(residual)}


def padded(rank: int, revive: float) -> dict[str, Tensor]:
    """The first process has nothing but padding."""
    torch.manual_seed(0)
    masked = Masked(averages(revive))
    for x in batches():
        masked(x, mask=torch.full((12,), rank == 1))
    return state(masked)


def in_step(rank: int) -> dict[str, int]:
    """Collectives of one training step of a whole tree, and of what learns nothing."""
    torch.manual_seed(0)
    tree = ProductQuantizer([ResidualQuantizer(averages(), 2) for _ in range(2)])
    entropies = ProductQuantizer([VQ(2, 4, codebook=EMACodebook), LFQ(2)])
    part = torch.cat([parts("one has none", rank)[0]] * 2, dim=1)
    narrow = part[:, :4].requires_grad_()

    def silent() -> None:
        for quantizer, x in ((tree, part), (entropies, narrow)):
            quantizer.decode(quantizer.encode(x))
            with torch.no_grad():
                quantizer(x)
            quantizer.eval()
            quantizer(x)

    return {
        "averages": counted(lambda: tree(part)),
        "entropy too": counted(lambda: entropies(narrow).losses.total().backward()),
        "silent": counted(silent),
    }


def work(rank: int, join: Callable[[], None]) -> dict[Any, Any]:
    torch.manual_seed(0)
    early = averages()
    # used while it was alone, so that whatever it asked once it has asked
    early(batches()[0])
    join()
    out: dict[Any, Any] = {"early": learned(early, parts("uneven", rank))}
    for split in SPLITS:
        out["entropy", split] = batch_entropy(parts(split, rank)[0])
        torch.manual_seed(0)
        out["learned", split] = learned(averages(), parts(split, rank))
    out["padded"] = [padded(rank, revive) for revive in (0.0, 0.1)]
    return {**out, "seeds": with_other_seeds(rank), "calls": in_step(rank)}


@pytest.fixture(scope="module")
def both(on_processes: Any) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    return on_processes(work)


def assert_alike(states: list[dict[str, Tensor]]) -> None:
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_defect_02_batch_entropy_over_processes(both: list[Any], split: str) -> None:
    """LFQ throws the sum over processes away and divides by them: 1.7 nats instead of 2.7."""
    want, gradient = batch_entropy(batches()[0])
    for process in both:
        torch.testing.assert_close(process["entropy", split][0], want)
    assert gradient.abs().max() > 1e-3
    found = torch.cat([process["entropy", split][1] for process in both])
    # each process counts it once, and data parallelism takes the mean
    torch.testing.assert_close(found / 2, gradient, rtol=1e-4, atol=1e-6)


def test_defect_03_built_before_the_process_group(both: list[Any]) -> None:
    """A quantizer built before init_process_group turns the sum over processes off for good."""
    torch.manual_seed(0)
    vq = averages()
    want = learned(vq, [batches()[0], *batches()])
    for process in both:
        assert_close(process["early"], want)


def test_defect_04_processes_with_other_seeds_agree(both: list[Any]) -> None:
    """Codes of processes with different seeds stay 0.25 apart after a synchronized step."""
    first, second = (process["seeds"] for process in both)
    for revive in (0.0, 0.02):
        one, other = first[revive], second[revive]
        assert not torch.equal(one["first"], other["first"])
        assert_alike([one["learned"], other["learned"]])
    assert_alike([first["initialized"], second["initialized"]])


def test_defect_05_a_process_with_padding_alone_keeps_nobody_waiting(both: list[Any]) -> None:
    """With codes to revive, a process whose batch is all masked leaves the others hanging."""
    torch.manual_seed(0)
    alone = learned(averages(), batches())
    for process in both:
        kept, revived = process["padded"]
        assert_close(kept, {f"quantizer.{key}": tensor for key, tensor in alone.items()})
        assert all(tensor.isfinite().all() for tensor in revived.values())
    for k in range(2):
        assert_alike([process["padded"][k] for process in both])


@pytest.mark.parametrize("split", SPLITS)
def test_complaint_25_processes_learn_as_one_and_none_hangs(both: list[Any], split: str) -> None:
    """Data parallelism hangs or sums wrongly (lucidrains/vector-quantize-pytorch#105, #198)."""
    torch.manual_seed(0)
    want = learned(averages(), batches())
    for process in both:
        assert_close(process["learned", split], want)
        # one for all averages of a tree, two for an entropy (forward, backward), else none
        assert process["calls"] == {"averages": 1, "entropy too": 3, "silent": 0}
    assert_alike([process["learned", split] for process in both])
