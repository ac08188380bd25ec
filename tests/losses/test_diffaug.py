import copy
import json
import math

import pytest
import torch

from xq.config import build, describe
from xq.losses import DiffAug, fading_blur
from xq.losses.diffaug import gaussian_blur


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(images: torch.Tensor, translation: float, cutout: float, seed: int) -> torch.Tensor:
    """Image by image and pixel by pixel, all three applied."""
    draws = torch.rand(3, generator=(generator := seeded(seed)))
    draws = torch.rand(7, len(images), 1, 1, generator=generator).flatten(1)
    results = []
    for image, draw in zip(images, draws.T.tolist(), strict=True):
        channels, height, width = image.shape
        down, right, bright, saturation, contrast, top, left = draw
        most = round(height * translation), round(width * translation)
        down = math.floor(down * (2 * most[0] + 1)) - most[0]
        right = math.floor(right * (2 * most[1] + 1)) - most[1]
        moved = torch.zeros_like(image)
        for row in range(height):
            for column in range(width):
                r, c = row + down, column + right
                if 0 <= r < height and 0 <= c < width:
                    moved[:, row, column] = image[:, r, c]
        moved = moved + bright - 0.5
        grey = sum(moved[c] for c in range(channels)) / channels
        moved = grey + 2 * saturation * (moved - grey)
        moved = moved.mean() + (0.5 + contrast) * (moved - moved.mean())
        box = round(height * cutout), round(width * cutout)
        top = math.floor(top * (height + 1 - box[0] % 2)) - box[0] // 2
        left = math.floor(left * (width + 1 - box[1] % 2)) - box[1] // 2
        keep = torch.ones(height, width)
        keep[max(top, 0) : max(top + box[0], 0), max(left, 0) : max(left + box[1], 0)] = 0
        results.append(moved * keep)
    return torch.stack(results)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("shape", "translation", "cutout"),
    [((3, 3, 17, 12), 0.125, 0.2), ((2, 1, 5, 23), 0.5, 0.6), ((2, 4, 8, 8), 0.0, 0.0)],
    ids=["H17-W12", "large", "colour-alone"],
)
def test_equals_the_naive_one(shape, translation, cutout, seed):
    images = torch.randn(shape, requires_grad=True)
    augment = DiffAug(translation=translation, cutout=cutout, generator=seeded(seed))
    actual, expected = augment(images), naive(images, translation, cutout, seed)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    weights = torch.randn(shape)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), images)
    (right,) = torch.autograd.grad((expected * weights).sum(), images)
    torch.testing.assert_close(gradient, right, atol=1e-5, rtol=0)


def test_each_part_comes_with_its_probability():
    images = torch.rand(1, 3, 16, 16) + 0.5
    augment = DiffAug(0.3, generator=seeded())
    unchanged = sum(torch.equal(augment(images), images) for _ in range(1000)) / 1000
    # 17 x 17 shifts by at most 2 pixels: one of 25 is none
    translated = 0.3 * 24 / 25
    assert abs(unchanged - (1 - translated) * 0.7**2) < 0.04


def test_colour_stays_in_its_bounds():
    images = torch.rand(256, 3, 8, 8) * 2 - 1
    level = images.mean((1, 2, 3))
    augmented = DiffAug(translation=0.0, cutout=0.0, generator=seeded())(images)
    moved = augmented.mean((1, 2, 3)) - level
    assert moved.abs().max() <= 0.5 + 1e-6
    assert moved.min() < -0.4
    assert moved.max() > 0.4
    contrast = augmented.mean(1).std((1, 2)) / images.mean(1).std((1, 2))
    assert 0.5 - 1e-5 <= contrast.min() < 0.55
    assert 1.45 < contrast.max() <= 1.5 + 1e-5
    before, after = images.std(1).mean((1, 2)), augmented.std(1).mean((1, 2))
    saturation = after / before / contrast
    assert saturation.min() < 0.1
    assert 1.9 < saturation.max() <= 2 + 1e-4


def test_images_of_a_batch_differ():
    images = torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1)
    augmented = DiffAug(generator=seeded())(images)
    assert all(not torch.equal(augmented[0], other) for other in augmented[1:])


def test_seeds():
    images = torch.randn(2, 3, 9, 9)
    first = DiffAug(generator=seeded(1))
    assert torch.equal(first(images), DiffAug(generator=seeded(1))(images))
    # real and generated images get draws of their own
    assert not torch.equal(first(images), DiffAug(generator=seeded(1))(images))
    torch.manual_seed(3)
    drawn = DiffAug()(images)
    torch.manual_seed(3)
    assert torch.equal(DiffAug()(images), drawn)


def test_nothing_draws_nothing():
    images = torch.randn(2, 3, 9, 9)
    state = torch.get_rng_state()
    assert torch.equal(DiffAug(0.0)(images), images)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradcheck():
    images = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)

    def augment(x, blur):
        return DiffAug(generator=seeded())(x, blur)

    for blur in (0.0, 0.7):
        assert torch.autograd.gradcheck(augment, (images, blur))
        assert torch.autograd.gradgradcheck(augment, (images, blur))


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.15])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 20), (2, 3)])
def test_blur_equals_a_sum(strength, height, width):
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    blurred = gaussian_blur(image, strength)
    for axis, side in ((2, height), (3, width)):
        sigma = strength * (side / 2) ** 0.5
        radius = min(int(3 * sigma), side - 1)
        matrix = torch.zeros(side, side, dtype=torch.float64)
        for i in range(side):
            for r in range(-radius, radius + 1):
                j = abs(i + r)
                j = min(j, 2 * (side - 1) - j)
                matrix[i, j] += 2 ** -((r / sigma) ** 2)
        matrix /= matrix.sum(1, keepdim=True)
        image = torch.tensordot(image, matrix, ([axis], [1])).movedim(-1, axis)
    torch.testing.assert_close(blurred, image)


def test_blur_keeps_constants():
    ones = torch.ones(1, 3, 31, 64, dtype=torch.float64)
    torch.testing.assert_close(DiffAug(0.0)(ones, 1.0), ones)


def test_blur_fades():
    strengths = [fading_blur(step, start=3, fade=1) for step in range(7)]
    assert strengths == [1, 1, 1, 1, 0.5, 0, 0]
    assert [fading_blur(step, start=1) for step in range(4)] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="fade >= 0 steps, got -1"):
        fading_blur(0, 0, -1)


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_finite_at_extremes(scale):
    images = torch.randn(2, 3, 16, 16).mul(scale).requires_grad_()
    augmented = DiffAug(generator=seeded())(images, 0.5)
    augmented.sum().backward()
    assert augmented.isfinite().all()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    images = torch.randn(2, 3, 16, 16)
    expected = DiffAug(generator=seeded())(images, 0.5)
    halved = DiffAug(generator=seeded())(images.to(dtype), 0.5)
    assert halved.dtype == dtype
    torch.testing.assert_close(halved.float(), expected, atol=5e-2, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = DiffAug(generator=seeded())(images, 0.5)
    assert torch.equal(again, expected)


def test_no_device_waits():
    # a tensor without data cannot be waited for
    images = torch.empty(2, 3, 16, 16, device="meta")
    assert DiffAug(0.5)(images, 0.5).shape == images.shape


def test_config_round_trip():
    augment = DiffAug(0.5, translation=0.25, cutout=0.1, generator=seeded())
    again = build(json.loads(json.dumps(describe(augment))))
    assert isinstance(again, DiffAug)
    assert (
        again.config()
        == augment.config()
        == {
            "probability": 0.5,
            "translation": 0.25,
            "cutout": 0.1,
        }
    )
    assert not augment.state_dict()


@pytest.mark.parametrize("name", ["probability", "translation", "cutout"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_refuses_arguments(name, value):
    with pytest.raises(ValueError, match=rf"DiffAug needs {name} in \[0, 1\], got {value}"):
        DiffAug(**{name: value})


def test_refuses_images():
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3, 8, 8\)"):
        DiffAug()(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(1, 3, 8, 8\)"):
        DiffAug()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"blur in \[0, 1\], got 1.5; fading_blur"):
        DiffAug()(torch.zeros(1, 3, 8, 8), 1.5)


@pytest.mark.compile
def test_compiles():
    torch._dynamo.reset()
    augment = DiffAug(0.5)
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 16, 16)
    for blur in (0.0, 0.5):
        torch.manual_seed(1)
        expected = augment(images, blur)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(images, blur), expected)
