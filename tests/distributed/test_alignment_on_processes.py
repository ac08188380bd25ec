"""Alignment over two processes is that of the joint batch: values, gradients, collectives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xq.distributed import gather_with_gradient
from xq.losses import ContrastiveLoss, CosineLoss, FeatureAlignment, Features, Teacher

pytestmark = pytest.mark.distributed

BATCH, DIM = 8, 3
LOSSES = {
    "contrast": lambda: ContrastiveLoss(0.3, learned=True),
    "raw": lambda: ContrastiveLoss(1.0, normalize=False),
    "cosine": CosineLoss,
}
# who counts; the first half of them is on the first process
KEEP = {
    "all": None,
    "some": [True, False, True, True, False, True, True, False],
    "first-none": [False] * 4 + [True] * 4,
    "none": [False] * 8,
}
COLLECTIVES = ("all_gather_into_tensor", "all_reduce")


class Colours(Teacher):
    """A token and four patches of pixels."""

    def extract(self, image: Tensor) -> Features:
        patches = nn.functional.avg_pool2d(image, 2).movedim(1, -1)
        return Features(patches.mean((1, 2)), patches)


class Model(nn.Module):
    """A tokenizer of one layer, and its alignment."""

    def __init__(self, level: str, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, DIM, 2, 2)
        teacher = Colours(nn.Identity(), 4, (0.5,) * 3, (0.5,) * 3)
        self.aligned = FeatureAlignment(teacher, DIM, level=level, loss=LOSSES[loss]())

    def forward(self, image: Tensor, keep: Tensor | None) -> Tensor:
        return self.aligned(image, self.encoder(image).movedim(1, -1), keep)


def batch(keep: str) -> tuple[Tensor, Tensor | None]:
    image = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    bools = KEEP[keep]
    return image, None if bools is None else torch.tensor(bools)


def part(x: Tensor | None, rank: int, sizes: tuple[int, int]) -> Tensor | None:
    return None if x is None else x.split(sizes)[rank]


def step(
    level: str, loss: str, keep: str, rank: int | None = None, sizes: tuple[int, int] = (4, 4)
) -> dict[str, Any]:
    """A training step on the whole batch, or on the part of one process."""
    model = Model(level, loss)
    run: nn.Module = model
    image, mask = batch(keep)
    if rank is not None:
        run = DistributedDataParallel(model)
        image, mask = part(image, rank, sizes), part(mask, rank, sizes)
    counts = dict.fromkeys(COLLECTIVES, 0)
    before = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return before[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        value = run(image, mask)
        value.backward()
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, before[name])
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"value": value.detach(), "grads": grads, "counts": counts}


CASES = [(level, loss, keep) for level in ("token", "patch") for loss in LOSSES for keep in KEEP]


def gathered(rank: int) -> tuple[Tensor, Tensor]:
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    rows = gather_with_gradient(x)
    weight = (rank + 1) * torch.arange(8.0).view(4, 2)
    (grad,) = torch.autograd.grad((rows * weight).sum(), x)
    return rows.detach(), grad


def work(rank: int, join: Callable[[], None]) -> dict[Any, Any]:
    """All that one of the two processes does."""
    x = torch.ones(2, requires_grad=True)
    alone = gather_with_gradient(x) is x
    join()
    out: dict[Any, Any] = {case: step(*case, rank) for case in CASES}
    out["alone"], out["gathered"] = alone, gathered(rank)
    out["uneven"] = step("patch", "cosine", "some", rank, (3, 5))
    try:
        step("token", "contrast", "all", rank, (3, 5))
    except ValueError as error:
        out["refused"] = str(error)
    # the collectives are still in step
    out["after"] = step("token", "contrast", "all", rank)
    return out


@pytest.fixture(scope="module")
def both(on_processes) -> list[dict[Any, Any]]:
    """What each of the two processes found."""
    return on_processes(work)


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    torch.testing.assert_close(got["value"], want["value"])
    assert list(got["grads"]) == list(want["grads"])
    for name, grad in want["grads"].items():
        torch.testing.assert_close(got["grads"][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("level", "loss", "keep"), CASES)
def test_value_and_gradients_are_those_of_the_joint_batch(both, level, loss, keep):
    want = step(level, loss, keep)
    assert want["grads"]["encoder.weight"].any() == (keep != "none")
    for process in both:
        assert_same(process[level, loss, keep], want)


@pytest.mark.parametrize(("level", "loss", "keep"), CASES)
def test_collectives_are_the_same_on_every_process_whoever_counts(both, level, loss, keep):
    counts = [process[level, loss, keep]["counts"] for process in both]
    # contrast: sizes and rows twice, then the sum and two gradients
    contrast = {"all_gather_into_tensor": 4, "all_reduce": 3}
    cosine = {"all_gather_into_tensor": 0, "all_reduce": 2}
    assert counts == [cosine if loss == "cosine" else contrast] * 2


def test_cosine_takes_uneven_batches(both):
    for process in both:
        assert_same(process["uneven"], step("patch", "cosine", "some"))


def test_contrast_refuses_uneven_batches_and_says_what_to_do(both):
    for process in both:
        assert (
            "batches of sizes [3, 5]; pad the smaller batches and pass keep" in process["refused"]
        )
        assert_same(process["after"], step("token", "contrast", "all"))


def test_gathered_rows_get_the_gradients_of_all(both):
    rows = torch.cat([torch.arange(4.0).view(2, 2), torch.arange(4.0).view(2, 2) + 10])
    for rank, process in enumerate(both):
        assert process["alone"]
        assert torch.equal(process["gathered"][0], rows)
        weight = torch.arange(8.0).view(4, 2)
        assert torch.equal(process["gathered"][1], 3 * weight[2 * rank : 2 * rank + 2])
