"""Bytes and PIL pictures to images in [-1, 1] and back, against loops over single pixels."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xq.images import pad_to_multiple, to_images, to_pil, to_uint8

SHAPES = {
    "last": (2, 5, 7, 3),
    "first": (2, 3, 5, 7),
    "one last": (5, 7, 3),
    "one first": (3, 5, 7),
    "one pixel": (1, 1, 1, 3),
}


def pixels(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def picture(mode: str = "RGB", width: int = 7, height: int = 5) -> Image.Image:
    return Image.fromarray(pixels(height, width, 3).numpy()).convert(mode)


def naive_images(data: torch.Tensor) -> torch.Tensor:
    """One value after the other: byte v is v / 255 of the way from -1 to 1."""
    data = data if data.ndim == 4 else data[None]
    last = data.shape[-1] == 3
    b, h, w = data.shape[:3] if last else (data.shape[0], *data.shape[2:])
    out = torch.empty(b, 3, h, w)
    for i in range(b):
        for c in range(3):
            for y in range(h):
                for x in range(w):
                    value = data[i, y, x, c] if last else data[i, c, y, x]
                    out[i, c, y, x] = int(value) / 255 * 2 - 1
    return out


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize("name", SHAPES)
def test_both_layouts(name, kind):
    data = pixels(*SHAPES[name])
    images = to_images(data if kind is torch.Tensor else data.numpy())
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, naive_images(data), atol=1e-6, rtol=0)


def test_all_bytes_come_back():
    data = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(2, 3, 256, 4)
    images = to_images(data)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), data)
    assert torch.equal(to_uint8(images.double()), data)
    assert torch.equal(to_uint8(images.half()), data)


def test_bytes_are_the_nearest():
    values = torch.linspace(-1.5, 1.5, 4001)
    want = [min(max(round((float(v) + 1) / 2 * 255), 0), 255) for v in values]
    got = to_uint8(values)
    assert got.dtype == torch.uint8
    # float32 may round the other way where a value lies in the middle of two bytes
    clear = ((values.double() + 1) * 127.5 % 1 - 0.5).abs() > 1e-4
    assert torch.equal(got[clear], torch.tensor(want, dtype=torch.uint8)[clear])
    assert to_uint8(torch.tensor([torch.inf, -torch.inf])).tolist() == [255, 0]


def test_a_read_only_array_is_left_alone():
    array = pixels(4, 4, 3).numpy()
    array.flags.writeable = False
    images = to_images(array)
    images.zero_()
    assert array.any()


def test_pictures_and_back():
    first, second = picture(), picture().rotate(180)
    images = to_images([first, second])
    assert images.shape == (2, 3, 5, 7)
    assert torch.equal(images[1], to_images(second)[0])
    for image, want in zip(to_pil(images), (first, second), strict=True):
        assert image.mode == "RGB"
        assert image.tobytes() == want.tobytes()


def test_a_small_picture_has_one_layout():
    # as an array, three rows could be three channels
    small = picture(width=6, height=3)
    assert torch.equal(to_uint8(to_images(small))[0].permute(1, 2, 0), pixels(3, 6, 3))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(mode):
    image = picture(mode)
    want = np.array(image.convert("RGB"))
    assert torch.equal(to_uint8(to_images(image))[0].permute(1, 2, 0), torch.from_numpy(want))


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert to_uint8(to_images(image))[0, :, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize(("height", "width"), [(5, 7), (8, 8), (1, 9), (16, 3)])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_padding_repeats_the_edge(height, width, multiple):
    images = torch.randn(2, 3, height, width)
    padded = pad_to_multiple(images, multiple)
    high, wide = padded.shape[2:]
    assert (high % multiple, wide % multiple) == (0, 0)
    assert high - height < multiple > wide - width
    for y in range(high):
        for x in range(wide):
            want = images[:, :, min(y, height - 1), min(x, width - 1)]
            assert torch.equal(padded[:, :, y, x], want)


def test_bytes_can_be_padded():
    assert pad_to_multiple(pixels(1, 3, 5, 7), 4).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(1, 3, 4, 4), r"got torch.float32; floats in \[0, 1\] .* 2 \* pixels - 1"),
        (np.zeros((4, 4, 3), np.int64), "got int64; .*bytes with pixels.to"),
        (np.zeros((4, 4, 3), np.uint16), "got uint16"),
        (torch.zeros(1, 4, 4, 1, dtype=torch.uint8), r"of shape \(1, 4, 4, 1\) neither fits"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"of shape \(4, 4\) neither fits"),
        (torch.zeros(2, 3, 8, 3, dtype=torch.uint8), r"of shape \(2, 3, 8, 3\) both fit; permute"),
        (torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8), r"\(2, 1, 3, 8, 8\) neither fits"),
        ([picture(), picture(width=8)], r"one size, got \[\(7, 5\), \(8, 5\)\]"),
        ([], r"one size, got \[\]"),
        (["cat.png"], "a sequence of these, got list"),
        ("cat.png", "got str"),
        (Image.new("I;16", (4, 4)), "8 bits a channel, got mode 'I;16'"),
        (Image.new("F", (4, 4)), "got mode 'F'"),
    ],
)
def test_what_is_no_picture(given, message):
    with pytest.raises(ValueError, match=message):
        to_images(given)


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"floating-point images in \[-1, 1\], got torch.uint8"):
        to_uint8(pixels(1, 3, 4, 4))
    broken = torch.zeros(1, 3, 2, 2)
    broken[0, 1] = torch.nan
    with pytest.raises(ValueError, match="to_uint8 got 4 NaN among 12 values"):
        to_uint8(broken)
    for shape in ((3, 4, 4), (1, 4, 4, 3), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"to_pil takes images \(b, 3, h, w\), got shape"):
            to_pil(torch.zeros(shape))


def test_what_cannot_be_padded():
    for multiple in (0, -4):
        with pytest.raises(ValueError, match=f"positive integer, got multiple={multiple}"):
            pad_to_multiple(torch.zeros(1, 3, 4, 4), multiple)
    for shape in ((3, 4, 4), (1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"takes images \(b, c, h, w\), got shape"):
            pad_to_multiple(torch.zeros(shape), 4)


def test_pillow_is_asked_for_only_where_it_is_used():
    code = """if True:
        import sys
        sys.modules["PIL"] = None
        import torch
        from xq.images import to_images, to_pil, to_uint8
        images = to_images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
        to_uint8(images)
        try:
            to_pil(images)
        except ImportError as error:
            sys.stdout.write(str(error))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "to_pil needs pillow: pip install pillow"
