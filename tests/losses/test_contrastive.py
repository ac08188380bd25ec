"""Contrast and cosine against their definitions: values, gradients, memory, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xq.losses import (
    ContrastiveLoss,
    CosineLoss,
    contrastive_loss,
    cooling_temperature,
    cosine_loss,
    pairs,
)

SHAPES = [(1, 3), (2, 1), (7, 5), (7, 3, 5), (5, 3, 2, 4), (3, 1, 6)]


def naive(teacher, student, keep, temperature, normalize=True) -> Tensor:
    """Whole matrices of logits, of the images that count alone, one position after the other."""
    places = (x[keep].unsqueeze(1).flatten(1, -2).unbind(1) for x in (teacher, student))
    losses = []
    for t, s in zip(*places, strict=True):
        if normalize:
            t, s = F.normalize(t, dim=-1), F.normalize(s, dim=-1)
        logits, own = t @ s.T / temperature, torch.arange(len(t))
        losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    return torch.stack(losses).mean()


def features(shape, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))


def masks(length: int) -> list[Tensor]:
    """All, every second one, and one alone."""
    places = torch.arange(length)
    return [places >= 0, places % 2 == 0, places == length - 1]


@pytest.mark.parametrize("blocks", ["whole", "positions", "rows"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contrast_is_that_of_whole_matrices(shape, normalize, blocks, monkeypatch):
    # logits of some positions, or of two rows of one
    limit = {"whole": 1 << 20, "positions": 2 * shape[0] ** 2, "rows": 2 * shape[0]}[blocks]
    monkeypatch.setattr(pairs, "_LOGITS", limit)
    teacher, student = features(shape)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for keep in masks(shape[0]):
        got = contrastive_loss(teacher, student, keep, temperature=temperature, normalize=normalize)
        want = naive(teacher, student, keep, temperature, normalize)
        torch.testing.assert_close(got, want)
        inputs = (teacher, student, temperature)
        found, expected = (torch.autograd.grad(3 * x, inputs) for x in (got, want))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    got = contrastive_loss(teacher, student, temperature=0.3, normalize=normalize)
    want = naive(teacher, student, masks(shape[0])[0], 0.3, normalize)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_is_the_mean_over_what_counts(shape):
    teacher, student = features(shape)
    for keep in masks(shape[0]):
        got = cosine_loss(teacher, student, keep)
        want = (1 - F.cosine_similarity(teacher[keep], student[keep], dim=-1)).mean()
        torch.testing.assert_close(got, want)
        found, expected = (torch.autograd.grad(x, (teacher, student)) for x in (got, want))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_gradcheck():
    teacher, student = features((4, 2, 3))
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, False, True])
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda t, s, c, n=normalize: contrastive_loss(t, s, keep, temperature=c, normalize=n),
            (teacher, student, temperature),
        )
    assert torch.autograd.gradcheck(lambda t, s: cosine_loss(t, s, keep), (teacher, student))


@pytest.mark.parametrize("loss", [contrastive_loss, cosine_loss])
def test_what_is_left_out_may_be_anything(loss):
    teacher, student = features((4, 2, 3), torch.float32)
    keep = torch.tensor([True, False, True, True])
    want = loss(teacher, student, keep)
    with torch.no_grad():
        teacher[1], student[1] = math.nan, math.inf
    got = loss(teacher, student, keep)
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got, (teacher, student)):
        assert grad.isfinite().all()
        assert not grad[1].any()
        assert grad[0].any()


@pytest.mark.parametrize("loss", [contrastive_loss, cosine_loss])
def test_nothing_counts(loss):
    teacher, student = features((3, 2), torch.float32)
    got = loss(teacher, student, torch.zeros(3, dtype=torch.bool))
    got.backward()
    assert got == 0
    assert not teacher.grad.any()
    assert not student.grad.any()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-6, 1e15])
def test_lengths_of_any_size_are_finite(length):
    teacher, student = features((4, 3), torch.float32)
    with torch.no_grad():
        teacher *= length
        student[0] = 0
    for loss in (
        contrastive_loss(teacher, student, temperature=1e-4),
        contrastive_loss(teacher, student, temperature=1.0, normalize=False),
        cosine_loss(teacher, student),
    ):
        assert loss.isfinite()
        for grad in torch.autograd.grad(loss, (teacher, student)):
            assert grad.isfinite().all()


def test_certain_answers():
    pairs = 1e4 * torch.eye(4)
    assert contrastive_loss(pairs, pairs, normalize=False) == 0
    wrong = contrastive_loss(pairs, pairs.roll(1, 0), normalize=False, temperature=1.0)
    assert wrong == 1e8
    assert contrastive_loss(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("loss", [ContrastiveLoss(), CosineLoss()], ids=["contrast", "cosine"])
def test_autocast_changes_nothing(loss):
    teacher, student = features((6, 8), torch.float32)
    want = loss(teacher, student)
    wanted = torch.autograd.grad(want, (teacher, student))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(teacher, student)
        found = torch.autograd.grad(got, (teacher, student))
    assert torch.equal(got, want)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    rounded = loss(teacher.bfloat16(), student.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, want, rtol=0.05, atol=0)


def test_a_temperature_is_set_by_name():
    teacher, student = features((5, 4), torch.float32)
    loss = ContrastiveLoss(0.5)
    assert not list(loss.parameters())
    for temperature in (0.5, 0.1, 2.0):
        loss.temperature = temperature
        assert loss.temperature == pytest.approx(temperature)
        want = contrastive_loss(teacher, student, temperature=temperature)
        torch.testing.assert_close(loss(teacher, student), want)
    again = ContrastiveLoss()
    again.load_state_dict(loss.state_dict())
    assert again.temperature == pytest.approx(2.0)
    assert ContrastiveLoss(0.5).half().bfloat16().log_scale.dtype == torch.float32


def test_a_learned_temperature_moves_and_stays_in_bounds():
    pairs = torch.eye(6)
    loss = ContrastiveLoss(0.07, learned=True)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(pairs, pairs + 0.3).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(pairs, pairs + 0.3).backward()
        optimizer.step()
    assert loss.temperature < 0.07
    assert loss(pairs, pairs + 0.3).item() < before
    loss.temperature = 1e-4
    assert loss.temperature == pytest.approx(0.01)
    # wrong pairs want it warmer, and the bound does not hold it
    loss.zero_grad()
    loss(pairs, pairs.roll(1, 0)).backward()
    assert loss.log_scale.grad > 1


def test_memory_is_that_of_blocks():
    teacher, student = features((1024, 16, 4), torch.float32)

    def step() -> None:
        contrastive_loss(teacher, student).backward()

    step()
    logits = 16 * 1024 * 1024 * 4
    assert peak_bytes(step) < logits / 3


def test_largest_tensor_of_a_large_batch():
    """None has the size of all logits, forward or backward."""
    teacher, student = features((1024, 3, 4), torch.float32)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    with Sizes():
        contrastive_loss(teacher, student).backward()
    assert max(sizes) <= pairs._LOGITS == 1 << 20


def test_copies_are_equal():
    teacher, student = features((5, 4), torch.float32)
    for loss in (ContrastiveLoss(0.2, learned=True, normalize=False), CosineLoss()):
        assert torch.equal(copy.deepcopy(loss)(teacher, student), loss(teacher, student))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_are_positive(temperature):
    with pytest.raises(ValueError, match="ContrastiveLoss needs a positive temperature, got"):
        ContrastiveLoss(temperature)
    loss = ContrastiveLoss()
    with pytest.raises(ValueError, match="positive temperature"):
        loss.temperature = temperature


@pytest.mark.parametrize("bad", [{"start": 0.0}, {"end": -1.0}, {"progress": -0.1}], ids=str)
def test_schedules_are_positive(bad):
    with pytest.raises(ValueError, match="cooling_temperature needs positive"):
        cooling_temperature(**{"progress": 0.5, **bad})


@pytest.mark.parametrize("loss", [contrastive_loss, cosine_loss])
def test_bad_input(loss):
    x, name = torch.randn(4, 3), loss.__name__
    with pytest.raises(ValueError, match=rf"{name} expects floats, got torch.int64"):
        loss(x.long(), x)
    shapes = r"teacher \(4, 3\) and student \(3, 3\)"
    with pytest.raises(ValueError, match=rf"{name} .*one shape .* {shapes}"):
        loss(x, x[:3])
    with pytest.raises(ValueError, match=r"teacher \(3,\)"):
        loss(x[0], x[0])
    wrong = [torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool)]
    for keep in wrong:
        with pytest.raises(ValueError, match=rf"{name} expects keep as 4 bools"):
            loss(x, x, keep)


@pytest.mark.compile
@pytest.mark.parametrize("loss", [ContrastiveLoss(0.3, learned=True), CosineLoss()], ids=["c", "d"])
def test_compiled(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    teacher, student = features((4, 2, 3), torch.float32)
    keep = torch.tensor([True, False, True, True])
    got, want = compiled(teacher, student, keep), loss(teacher, student, keep)
    torch.testing.assert_close(got, want)
    inputs = [teacher, student, *loss.parameters()]
    found, expected = (torch.autograd.grad(x, inputs) for x in (got, want))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
