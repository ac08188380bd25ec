"""FeatureAlignment: what it compares, which gradients it gives, what it saves and refuses."""

import copy
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.losses import (
    ContrastiveLoss,
    CosineLoss,
    FeatureAlignment,
    Features,
    Teacher,
    TimmTeacher,
    alignment,
    contrastive,
    contrastive_loss,
    cosine_loss,
    teachers,
)


class Grid(Teacher):
    """A token of 5 channels and patches of 6, counting its forward passes."""

    def __init__(self, side: int = 4) -> None:
        self.side, self.calls = side, 0
        super().__init__(nn.Conv2d(3, 6, 2, 2), 16, (0.5,) * 3, (0.5,) * 3)

    def extract(self, image: Tensor) -> Features:
        self.calls += 1
        maps = F.adaptive_avg_pool2d(self.model(image).sin(), self.side)
        return Features(maps.mean((2, 3))[:, :5], maps.movedim(1, -1))


class Pixels(Teacher):
    """Patches of pixels and their mean."""

    def extract(self, image: Tensor) -> Features:
        return Features(image.mean((2, 3)), F.avg_pool2d(image, 4).movedim(1, -1))


def picture(batch: int = 5) -> Tensor:
    return torch.rand(batch, 3, 16, 16) * 2 - 1


def branch(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("places", [(), (7,), (2, 3), (2, 3, 2)], ids=str)
def test_a_token_is_contrasted_with_the_mean_over_places(places):
    teacher = Grid()
    aligned = FeatureAlignment(teacher, 8)
    image, z, keep = picture(), branch(5, *places, 8), torch.arange(5) != 2
    got = aligned(image, z, keep)
    target = aligned.projector(teacher(image).token)
    mean = z.flatten(1, -2).mean(1) if places else z
    want = contrastive_loss(target, mean, keep, temperature=0.07)
    torch.testing.assert_close(got, want)
    inputs = [z, *aligned.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(x, inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.any()


@pytest.mark.parametrize(
    ("side", "grid"), [(4, (4, 4)), (4, (2, 2)), (2, (4, 4)), (4, (3, 5)), (3, (1, 7))], ids=str
)
def test_patches_are_contrasted_place_by_place(side, grid):
    teacher = Grid(side)
    aligned = FeatureAlignment(teacher, 8, level="patch", loss=ContrastiveLoss(0.2))
    image, z = picture(), branch(5, *grid, 8)
    got = aligned(image, z)
    size = tuple(min(side, length) for length in grid)
    pooled = [
        F.interpolate(x.movedim(-1, 1), size=size, mode="area").movedim(1, -1)
        for x in (teacher(image).patches, z)
    ]
    losses = [
        contrastive_loss(aligned.projector(pooled[0][:, y, x]), pooled[1][:, y, x], temperature=0.2)
        for y in range(size[0])
        for x in range(size[1])
    ]
    torch.testing.assert_close(got, torch.stack(losses).mean())
    (grad,) = torch.autograd.grad(got, z)
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), z)
    torch.testing.assert_close(grad, want)


def test_places_are_not_scrambled():
    """Only when both grids have one order does a permutation of both change nothing."""
    aligned, teacher = FeatureAlignment(Grid(), 6, level="patch", projector=nn.Identity()), Grid()
    features = teacher(picture())
    own = features.patches
    assert aligned(features, own) < aligned(features, own.transpose(1, 2))
    swapped = Features(features.token, own.transpose(1, 2))
    torch.testing.assert_close(aligned(swapped, own.transpose(1, 2)), aligned(features, own))


@pytest.mark.parametrize("level", ["token", "patch"])
def test_distillation_projects_the_student(level):
    teacher = Grid()
    aligned = FeatureAlignment(teacher, 8, level=level, loss=CosineLoss())
    image, z, keep = picture(), branch(5, 4, 4, 8), torch.arange(5) > 0
    features = teacher(image)
    token, mean = (features.token, z.mean((1, 2))) if level == "token" else (features.patches, z)
    want = cosine_loss(token, aligned.projector(mean), keep)
    torch.testing.assert_close(aligned(image, z, keep), want)
    assert not any("log_scale" in name for name in aligned.state_dict())


def test_one_forward_pass_serves_several_branches():
    teacher = Grid()
    semantic, detail = FeatureAlignment(teacher, 8), FeatureAlignment(teacher, 4, level="patch")
    image, z, other = picture(), branch(5, 2, 2, 8), branch(5, 2, 2, 4)
    want = semantic(image, z) + detail(image, other)
    teacher.calls = 0
    features = teacher(image)
    assert torch.equal(semantic(features, z) + detail(features, other), want)
    assert teacher.calls == 1


def test_two_teachers_stand_beside_each_other():
    first, last = Grid(), TimmTeacher(timm.create_model("test_efficientnet"), size=32)
    aligned = nn.ModuleList([FeatureAlignment(first, 4), FeatureAlignment(last, 4, level="patch")])
    image, z = picture(), branch(5, 1, 1, 4)
    total = sum((module(image, z) for module in aligned), start=torch.zeros(()))
    total.backward()
    assert z.grad.any()
    assert [p.shape[1] for p in aligned.parameters() if p.ndim == 2] == [5, 256]


@pytest.mark.parametrize("learned", [True, False])
def test_the_state_is_the_projector_and_the_temperature(learned):
    aligned = FeatureAlignment(Grid(), 8, loss=ContrastiveLoss(learned=learned))
    names = ["loss.log_scale", "projector.weight", "projector.bias"]
    assert sorted(aligned.state_dict()) == sorted(names)
    assert sorted(n for n, _ in aligned.named_parameters()) == sorted(names[0 if learned else 1 :])
    aligned.load_state_dict(dict(aligned.state_dict()))
    aligned.train()
    assert not aligned.teacher.model.training
    again = copy.deepcopy(aligned)
    image, z = picture(), branch(5, 8)
    assert torch.equal(again(image, z), aligned(image, z))
    assert aligned.bfloat16().projector.weight.dtype == torch.float32


def test_a_projector_may_be_that_of_the_tokenizer():
    teacher = Grid()
    tokenizer = nn.Linear(5, 8)
    aligned = FeatureAlignment(teacher, 8, projector=tokenizer)
    together = list(nn.ModuleList([tokenizer, aligned]).parameters())
    assert len(together) == 2
    image, z = picture(), branch(5, 8)
    loss = aligned(image, z)
    loss.backward()
    assert tokenizer.weight.grad.any()
    rounded = FeatureAlignment(teacher, 8, projector=copy.deepcopy(tokenizer).bfloat16())
    torch.testing.assert_close(rounded(image, z), loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("loss", [ContrastiveLoss(), CosineLoss()], ids=["contrast", "cosine"])
@pytest.mark.parametrize("level", ["token", "patch"])
def test_autocast_and_half_precision(level, loss):
    aligned = FeatureAlignment(Grid(), 8, level=level, loss=loss)
    image, z = picture(), branch(5, 4, 4, 8)
    features = aligned.teacher(image)
    want = aligned(features, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aligned(features, z), want)
        torch.testing.assert_close(aligned(image, z), want, rtol=0.02, atol=0.02)
    rounded = aligned(features, z.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, want, rtol=0.02, atol=0.02)
    (grad,) = torch.autograd.grad(rounded, z)
    assert grad.isfinite().all()


@pytest.mark.parametrize("loss", [ContrastiveLoss(0.3, learned=True), CosineLoss()], ids=["c", "d"])
@pytest.mark.parametrize("level", ["token", "patch"])
def test_gradcheck(level, loss):
    aligned = FeatureAlignment(Grid(2), 3, level=level, loss=copy.deepcopy(loss)).double()
    features = aligned.teacher(picture(3))
    z = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(lambda z: aligned(features, z, keep), (z,))
    assert torch.autograd.gradcheck(
        lambda *_: aligned(features, z.detach(), keep), tuple(aligned.parameters())
    )


@pytest.mark.parametrize("loss", [ContrastiveLoss(learned=True), CosineLoss()], ids=["c", "d"])
@pytest.mark.parametrize("level", ["token", "patch"])
def test_the_loss_falls(level, loss):
    aligned = FeatureAlignment(Grid(), 8, level=level, loss=copy.deepcopy(loss))
    image = picture(8)
    student = nn.Conv2d(3, 8, 4, 4)
    optimizer = torch.optim.Adam([*student.parameters(), *aligned.parameters()], lr=0.02)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = aligned(image, student(image).movedim(1, -1))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def test_bad_input():
    teacher = Grid()
    with pytest.raises(ValueError, match="has the levels token, patch, got 'class'"):
        FeatureAlignment(teacher, 8, level="class")
    with pytest.raises(ValueError, match="needs a positive dim, got 0"):
        FeatureAlignment(teacher, 0)
    aligned, image = FeatureAlignment(teacher, 8), picture()
    patches = FeatureAlignment(teacher, 8, level="patch")
    with pytest.raises(ValueError, match=r"got 5 images and z of 4; .*same images"):
        aligned(image, branch(4, 8))
    with pytest.raises(ValueError, match=r"8 channels in the last axis, got \(5, 8, 2, 2\); move"):
        aligned(image, branch(5, 8, 2, 2))
    with pytest.raises(ValueError, match=r"8 channels in the last axis, got \(5, 7\)$"):
        aligned(image, branch(5, 7))
    with pytest.raises(ValueError, match=r"z of floats, got torch.int64"):
        aligned(image, torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r'level="patch" expects z \(b, h, w, 8\), got \(5, 4, 8\)'
    ):
        patches(image, branch(5, 4, 8))
    with pytest.raises(ValueError, match=r"keep as 5 bools, one an image, got torch.int64"):
        aligned(image, branch(5, 8), torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Grid expects images in -1..1"):
        FeatureAlignment(Grid(), 8)(100 * image, branch(5, 8))
    with pytest.raises(ValueError, match=r"projector of the last axis from 5 to 8 channels, got"):
        FeatureAlignment(teacher, 8, projector=nn.Linear(5, 7))(image, branch(5, 8))


def test_losses_do_not_know_quantizers():
    for module in (alignment, contrastive, teachers):
        assert "xq.quantizers" not in inspect.getsource(module)


@pytest.mark.compile
@pytest.mark.parametrize("level", ["token", "patch"])
def test_compiled(level):
    aligned = FeatureAlignment(Pixels(nn.Identity(), 16, (0.5,) * 3, (0.5,) * 3), 8, level=level)
    compiled = torch.compile(aligned, backend="aot_eager", fullgraph=True)
    image, z, keep = picture(3), branch(3, 2, 2, 8), torch.tensor([True, False, True])
    got, want = compiled(image, z, keep), aligned(image, z, keep)
    torch.testing.assert_close(got, want)
    inputs = [z, *aligned.parameters()]
    found, expected = (torch.autograd.grad(x, inputs) for x in (got, want))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
