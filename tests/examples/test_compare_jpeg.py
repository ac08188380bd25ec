"""A tokenizer beside JPEG files: sizes are counted, the best fitting file is found."""

import io
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from xq.models import LinearDecoder, LinearEncoder, Tokenizer, fit_pca_
from xq.quantizers import VQ, ResidualQuantizer, initialize

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`examples/compare_jpeg.py` as a module, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import compare_jpeg

    return compare_jpeg


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three smooth pictures of 70 x 100 pixels."""
    draws = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        coarse = Image.fromarray(draws.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        large = coarse.resize((100, 70), Image.Resampling.BICUBIC)
        large.save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def folder(script, pictures: Path) -> str:
    """A linear tokenizer of four steps that knows the pictures."""
    images = torch.cat([script.to_float(pixels) for pixels in script.find(str(pictures), 64)])
    encoder, decoder = LinearEncoder(12, 8), LinearDecoder(12, 8)
    quantizer = ResidualQuantizer(VQ(12, 16), 4)
    with torch.no_grad():
        fit_pca_(encoder, decoder, images)
        initialize(quantizer, encoder(images))
    Tokenizer(encoder, quantizer, decoder).save_pretrained("made")
    return "made"


def test_a_table(script, pictures, folder, capsys):
    found = script.main(["--tokenizer", folder, "--data", str(pictures)])
    tokens = math.ceil(70 / 8) * math.ceil(100 / 8)
    for k in (1, 2, 4):
        bits, psnr, ssim = found[f"{k} of 4 steps"]
        assert bits == pytest.approx(tokens * 4 * k / 7000)
        assert 10 < psnr < 60
        assert 0 < ssim < 1
    greedy, beam = found["4 of 4 steps"], found["4 of 4 steps, beam 8"]
    assert greedy[0] == beam[0]
    assert greedy[1] < beam[1]
    assert found["1 of 4 steps"][1] < found["2 of 4 steps"][1] < greedy[1]
    assert found["8 x 8 means, bicubic"][0] == pytest.approx(tokens * 24 / 7000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made; means over 3 pictures"
    assert lines[2] == "|  | bits a pixel | PSNR | SSIM |"
    assert f"| 4 of 4 steps | {greedy[0]:.3f} | {greedy[1]:.2f} | {greedy[2]:.3f} |" in lines
    assert len(lines) == 4 + len(found) == 4 + 8


def test_the_best_file_that_fits(script, pictures):
    (pixels, *_) = script.find(str(pictures), 64)
    picture = script.to_image(pixels[0])
    sizes = {}
    for quality in range(1, 96):
        data = io.BytesIO()
        picture.save(data, "jpeg", quality=quality, optimize=True)
        sizes[quality] = 8 * len(data.getvalue())
    for most in (sizes[1] - 1, sizes[30], sizes[30] + 1, sizes[80] - 1, 1e9):
        bits, made = script.jpeg(pixels, most)
        fitting = [size for size in sizes.values() if size <= most]
        assert bits == max(fitting, default=sizes[1])
        assert made.shape == pixels.shape
    assert script.compare(made, pixels, [])[0] > 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--tokenizer", "nowhere"], "finds no config.json in nowhere"),
        (["--alex", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_errors_are_one_line(script, arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)
