"""Adversarial losses against their textbook forms, and against what a mean must do."""

import math

import pytest
import torch
import torch.nn.functional as F
from quantizers.test_no_sync import NoSync
from torch import Tensor, nn

from xq.config import build, describe
from xq.losses import (
    DiscriminatorLoss,
    GeneratorLoss,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1,
)
from xq.losses.adversarial import KINDS
from xq.losses.logits import check_logits

SHAPES = {"one": (), "one an image": (5,), "patches": (3, 1, 4, 5), "joined scales": (2, 7)}
WIDTHS = [torch.bfloat16, torch.float16]


def naive_discriminator(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """Logit after logit; cross-entropies by their probabilities."""
    if kind == "hinge":
        of_real = [max(1 - r, 0) for r in real.flatten().tolist()]
        of_fake = [max(1 + f, 0) for f in fake.flatten().tolist()]
    else:
        of_real = [-math.log(1 / (1 + math.exp(-r))) for r in real.flatten().tolist()]
        of_fake = [-math.log(1 - 1 / (1 + math.exp(-f))) for f in fake.flatten().tolist()]
    halves = sum(of_real) / len(of_real), sum(of_fake) / len(of_fake)
    return torch.tensor(sum(halves) / 2, dtype=real.dtype)


def naive_generator(fake: Tensor, kind: str) -> Tensor:
    chance = 1 / (1 + torch.exp(-fake))
    terms = {"hinge": -fake, "vanilla": (1 - chance).log(), "non_saturating": -chance.log()}
    return terms[kind].mean()


def logits(shape: tuple[int, ...], batches: tuple[int, int] = (0, 0)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(shape[0] + more, *shape[1:]) if shape else shape for more in batches]
    return [torch.randn(s, generator=generator, dtype=torch.float64) * 2 for s in shapes]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, shape):
    # as many generated images as real ones, or not
    real, fake = logits(shape, (0, 2))
    loss = DiscriminatorLoss(kind)(real, fake)
    torch.testing.assert_close(loss, naive_discriminator(real, fake, kind))
    torch.testing.assert_close(GeneratorLoss(kind)(fake), naive_generator(fake, kind))
    assert torch.equal(loss, discriminator_loss(real, fake, kind))
    assert torch.equal(GeneratorLoss(kind)(fake), generator_loss(fake, kind))


def test_hinge_is_the_default():
    real, fake = logits((4, 3))
    assert torch.equal(DiscriminatorLoss()(real, fake), discriminator_loss(real, fake, "hinge"))
    assert torch.equal(GeneratorLoss()(fake), generator_loss(fake, "hinge"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    real, fake = (x.requires_grad_() for x in logits((3, 5)))
    # no logit stands on the corner of a hinge
    assert min((1 - real).abs().min(), (1 + fake).abs().min()) > 1e-3
    loss = DiscriminatorLoss(kind)
    assert torch.autograd.gradcheck(loss, (real, fake))
    assert torch.autograd.gradgradcheck(loss, (real, fake))
    assert torch.autograd.gradcheck(GeneratorLoss(kind), (fake,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminator_parts_both(kind):
    """It raises real logits and lowers generated ones; the generator raises its own."""
    real, fake = (x.requires_grad_() for x in logits((40,)))
    by_real, by_fake = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (by_real <= 0).all()
    assert (by_fake >= 0).all()
    assert by_real.min() < 0 < by_fake.max()
    (by_own,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    assert (by_own < 0).all()


def test_which_generator_saturates():
    fake = torch.tensor([-30.0], requires_grad=True)
    found = {k: torch.autograd.grad(generator_loss(fake, k), fake)[0].item() for k in KINDS}
    assert found["hinge"] == -1.0
    assert found["non_saturating"] == pytest.approx(-1.0)
    assert -1e-12 < found["vanilla"] < 0


@pytest.mark.parametrize("dtype", [torch.float32, *WIDTHS])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, dtype):
    values = [1e4, -1e4, 0.0, 3.0]
    for x, y in ((1e4, -1e4), (-1e4, 1e4)):
        real, fake = (torch.tensor([*values, v], dtype=dtype).requires_grad_() for v in (x, y))
        losses = [discriminator_loss(real, fake, kind), generator_loss(fake, kind)]
        wanted = [*torch.autograd.grad(losses[0], (real, fake), retain_graph=True)]
        wanted += torch.autograd.grad(losses[1], (fake,))
        assert all(found.isfinite().all() for found in (*losses, *wanted))
    sure, wrong = torch.tensor([1e4], dtype=dtype), torch.tensor([-1e4], dtype=dtype)
    assert discriminator_loss(sure, wrong, kind) == 0
    assert discriminator_loss(wrong, sure, kind) == pytest.approx(float(sure), rel=1e-3)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_float32(kind, dtype):
    real, fake = (x.to(dtype) for x in logits((64, 1, 30, 30)))
    with torch.autocast("cpu", dtype):
        of_half = discriminator_loss(real, fake, kind), generator_loss(fake, kind)
    of_float = (
        discriminator_loss(real.float(), fake.float(), kind),
        generator_loss(fake.float(), kind),
    )
    for half, full in zip(of_half, of_float, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_float64_stays():
    real, fake = logits((3,))
    assert discriminator_loss(real, fake).dtype == torch.float64
    assert generator_loss(fake).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(kind, bad):
    real, fake = logits((4,))
    wrong = fake.clone()
    # the wrong way around for both: real images taken for generated ones
    wrong[1] = bad
    assert not discriminator_loss(real, wrong, kind).isfinite()
    assert not discriminator_loss(-wrong, fake, kind).isfinite()
    # the vanilla loss is bounded by zero on the other side
    assert not generator_loss(wrong if kind == "vanilla" else -wrong, kind).isfinite()


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph(kind):
    torch._dynamo.reset()

    def both(real: Tensor, fake: Tensor) -> Tensor:
        return DiscriminatorLoss(kind)(real, fake) + GeneratorLoss(kind)(fake)

    graph = torch.compile(both, fullgraph=True, backend="aot_eager")
    pairs = [[x.float().requires_grad_() for x in logits((3, 1, 4, 4))] for _ in range(2)]
    losses = [f(*pair) for f, pair in zip((both, graph), pairs, strict=True)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for plain, compiled in zip(*pairs, strict=True):
        torch.testing.assert_close(plain.grad, compiled.grad)


def test_modules_are_plain():
    for module in (DiscriminatorLoss("vanilla"), GeneratorLoss("non_saturating")):
        assert not module.state_dict()
        assert describe(build(describe(module))) == describe(module)
        assert module.kind in repr(module)


@pytest.mark.parametrize("name", ["wgan", "non-saturating", ""])
def test_unknown_kinds(name):
    known = "has the kinds 'hinge', 'vanilla', 'non_saturating', got "
    real, fake = logits((4,))
    with pytest.raises(ValueError, match=f"DiscriminatorLoss {known}{name!r}"):
        DiscriminatorLoss(name)
    with pytest.raises(ValueError, match=f"GeneratorLoss {known}{name!r}"):
        GeneratorLoss(name)
    with pytest.raises(ValueError, match=f"discriminator_loss {known}{name!r}"):
        discriminator_loss(real, fake, name)
    with pytest.raises(ValueError, match=f"generator_loss {known}{name!r}"):
        generator_loss(fake, name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_makes_a_gpu_wait(kind):
    """No value of a tensor is read in a step of either side."""
    x, lecam = torch.randn(4, 6), LeCam()
    decoder, discriminator = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    with NoSync() as counter:
        made = decoder(x)
        reconstruction = (made - x).square().mean()
        adversarial = generator_loss(discriminator(made), kind)
        weight = adaptive_weight(reconstruction, adversarial, decoder.weight)
        (reconstruction + weight * adversarial).backward()
        images = x.clone().requires_grad_()
        real, fake = discriminator(images), discriminator(made.detach())
        loss = discriminator_loss(real, fake, kind) + lecam(real, fake) + r1(images, real)
        loss.backward()
    assert counter.calls > 50


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.zeros(2, 3, 8, 8), r"fake logits, got shape \(2, 3, 8, 8\), which looks like imag"),
        (torch.zeros(0, 1, 4, 4), r"no fake logits, shape \(0, 1, 4, 4\): skip empty batches"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "floating-point fake logits, got torch.int64"),
    ],
    ids=["images", "empty", "integers"],
)
def test_no_logits(bad, match):
    with pytest.raises(ValueError, match=f"^generator_loss .*{match}"):
        generator_loss(bad)
    with pytest.raises(ValueError, match=f"^discriminator_loss .*{match}"):
        discriminator_loss(torch.zeros(2, 1, 4, 4), bad)
    with pytest.raises(ValueError, match=f"^discriminator_loss .*{match.replace('fake', 'real')}"):
        discriminator_loss(bad, torch.zeros(2, 1, 4, 4))


def test_images_with_logits():
    match = r"one shape but for the batch, got real \(2, 1, 8, 8\), fake \(2, 1, 4, 4\)"
    with pytest.raises(ValueError, match=match):
        discriminator_loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"got real \(2,\), fake \(2, 1\)"):
        discriminator_loss(torch.zeros(2), torch.zeros(2, 1))


def test_a_list_of_scales():
    scales = [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)]
    with pytest.raises(ValueError, match=r"fake logits as one tensor, got a list; .*torch\.cat"):
        check_logits("generator_loss", fake=scales)
    joined = torch.cat([x.flatten(1) for x in scales], 1)
    assert generator_loss(joined) == 0


def test_smoothness_beyond_float32():
    """The logarithm keeps its digits where a probability would be rounded to 0 or 1."""
    fake = torch.tensor([-40.0, 40.0])
    assert generator_loss(fake[1:], "non_saturating") == pytest.approx(math.exp(-40))
    assert discriminator_loss(-fake[:1], fake[:1], "vanilla") == pytest.approx(math.exp(-40))
    assert F.binary_cross_entropy(fake[1:].sigmoid(), torch.ones(1)) == 0
