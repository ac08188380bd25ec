"""The trained tokenizer that comes with the package: its file, and what it makes of photographs."""

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from xq.images import pad_to_multiple, to_images
from xq.metrics import psnr
from xq.models import Tokenizer
from xq.models.presets import tiny
from xq.models.presets.trained import _WEIGHTS
from xq.quantizers import Codebook

MEBIBYTE = 2**20
# what it reached when it was trained, less half a dB
PHOTOGRAPHS = {"astronaut.png": 31.0, "chelsea.png": 34.0, "coffee.png": 29.5}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tiny(pretrained=True)


@pytest.fixture(params=PHOTOGRAPHS)
def photograph(request) -> tuple[torch.Tensor, float]:
    """One of scikit-image's at its own size, and the least PSNR."""
    skimage = pytest.importorskip("skimage")
    image = pytest.importorskip("PIL.Image")
    with image.open(Path(skimage.__file__).parent / "data" / request.param) as picture:
        return to_images(picture.convert("RGB")), PHOTOGRAPHS[request.param]


def test_the_file_is_small_and_of_half_precision():
    assert _WEIGHTS.stat().st_size < 4 * MEBIBYTE
    state = load_file(_WEIGHTS)
    assert all(x.isfinite().all() for x in state.values())
    kinds = {key.rpartition(".")[2] for key, x in state.items() if x.dtype != torch.float16}
    # how often codes have moved
    assert kinds == {"step"}
    card = _WEIGHTS.with_suffix(".md").read_text()
    assert "640" in card
    assert "Limits" in card


def test_loads_as_it_is_without_a_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, state = tiny(pretrained=True), load_file(_WEIGHTS)
    assert not model.training
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64), key
        assert torch.equal(value, state[key].to(value.dtype)), key


def test_with_and_without_weights_it_is_one_architecture(trained):
    fresh = tiny()
    assert fresh.training
    assert fresh.config() == trained.config()
    learned = sum(p.numel() for p in fresh.parameters())
    books = [part for part in fresh.modules() if isinstance(part, Codebook)]
    assert learned == 1_264_320
    assert [(book.codebook_size, book.dim) for book in books] == [(1024, 32)] * 8
    # training begins with the linear path
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    encoder, decoder = fresh.encoder, fresh.decoder
    z = encoder(images)
    assert torch.equal(z, encoder.parts["linear"](images))
    assert torch.equal(decoder(z), decoder.parts["linear"](z))


def test_saved_and_read_again(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 24, 16) * 2 - 1
    assert torch.equal(again.reconstruct(images), trained.reconstruct(images))


@torch.no_grad()
def test_photographs(trained, photograph):
    image, least = photograph
    h, w = image.shape[2:]
    padded = pad_to_multiple(image, trained.encoder.stride)
    indices = trained.encode(padded)
    assert indices.shape == (1, math.ceil(h / 8), math.ceil(w / 8), 8)
    assert indices.min() >= 0
    assert indices.max() < 1024
    made = [part[:, :, :h, :w].clamp(-1, 1) for part in trained.partials(indices)]
    assert torch.equal(made[-1], trained.reconstruct(padded)[:, :, :h, :w])
    found = [float(psnr(part, image)) for part in made]
    assert found == sorted(found)
    # as many numbers as a token has squares of pixels, smoothly between them
    means = F.interpolate(F.avg_pool2d(padded, 8), scale_factor=8, mode="bicubic")
    smooth = float(psnr(means[:, :, :h, :w].clamp(-1, 1), image))
    assert found[-1] > max(least, smooth + 6)
    assert found[3] > smooth


@pytest.mark.parametrize(("height", "width"), [(8, 16), (1, 9), (40, 17)])
def test_any_size(trained, height, width):
    image = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    made = trained.reconstruct(pad_to_multiple(image, trained.encoder.stride))
    made = made[:, :, :height, :width]
    assert made.shape == image.shape
    assert made.isfinite().all()


def test_an_install_without_the_weights(monkeypatch, tmp_path):
    path = tmp_path / "tiny.safetensors"
    monkeypatch.setattr("xq.models.presets.trained._WEIGHTS", path)
    with pytest.raises(FileNotFoundError, match=r"finds no .*tiny\.safetensors, .* install xq"):
        tiny(pretrained=True)
    path.write_bytes(_WEIGHTS.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"tiny\.safetensors is damaged, install xq again"):
        tiny(pretrained=True)
    state = load_file(_WEIGHTS)
    save_file({**state, "other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r'(?s)damaged, install xq again: .* "other"'):
        tiny(pretrained=True)
    assert tiny().training
