"""A picture becomes tokens and a picture again, with whatever tokenizer is named."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from xq.images import pad_to_multiple, to_images, to_uint8
from xq.models import CNNDecoder, CNNEncoder, LinearDecoder, LinearEncoder, Tokenizer
from xq.quantizers import BSQ, VQ, ProductQuantizer, ResidualQuantizer

EXAMPLES = Path(__file__).parents[2] / "examples"
GAP = 6


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`examples/reconstruct.py` as a module, in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import reconstruct

    return reconstruct


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """40 x 30 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def tokenizer(quantizer) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(LinearEncoder(quantizer.dim, 8), quantizer, LinearDecoder(quantizer.dim, 8))


def drawn(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_folder_and_a_picture_of_any_size(script, picture, tmp_path, capsys):
    model = tokenizer(ResidualQuantizer(VQ(4, 16), 3))
    model.save_pretrained("made")
    script.main([str(picture), "--tokenizer", "made", "--size", "30", "--tokens", "t.npz"])
    image = to_images(Image.open(picture))
    indices = model.encode(pad_to_multiple(image, 8))
    stored = np.load("t.npz")
    assert np.array_equal(stored["indices"], indices.numpy())
    assert stored["codebook_size"] == 16
    sheet = drawn(Path("runs/reconstruction.png"))
    assert torch.equal(sheet[:, GAP : GAP + 30, GAP : GAP + 40], to_uint8(image)[0])
    made = to_uint8(model.eval().decode(indices).detach())[0, :, :30, :40]
    assert torch.equal(sheet[:, GAP : GAP + 30, 2 * GAP + 40 : 2 * GAP + 80], made)
    # three steps in a row below
    assert sheet.shape == (3, 30 + 2 * GAP + 18 + GAP, 2 * 40 + 3 * GAP)
    said = capsys.readouterr().out
    assert "60 indices (4, 5, 3) of 16 values, 240 bits, 0.200 a pixel" in said
    assert " dB PSNR; " in said


def test_scales_grow_with_the_picture(script, picture, tmp_path, capsys):
    model = tokenizer(ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, 2)), P=2))
    model.save_pretrained("made")
    arguments = [str(picture), "--tokenizer", "made", "--tokens", "t.npz", "--size"]
    for size, tokens in (("16", 1 + 4), ("5", 1 + 4), ("32", 4 + 16)):
        script.main([*arguments, size])
        assert np.load("t.npz")["indices"].shape == (1, tokens, 2)
    assert "40 indices (20, 2) of 8 values, 120 bits" in capsys.readouterr().out
    assert drawn(Path("runs/reconstruction.png")).shape == (3, 32 + 2 * GAP + 32 + GAP, 82)


def test_without_arguments_it_takes_what_comes_with_xq(script, capsys):
    pytest.importorskip("skimage")
    script.main(["--out", "new/cat.png", "--size", "128"])
    said = capsys.readouterr().out
    assert "at 192 x 128 pixels; tiny, whose weights come with xq" in said
    assert "3072 indices (16, 24, 8) of 1024 values" in said
    assert float(said.split(" dB")[0].split()[-1]) > 30
    assert drawn(Path("new/cat.png")).shape[2] == 2 * 192 + 3 * GAP


def test_the_preset_with_weights(script, picture, capsys):
    for options in ([], ["--preset", "tiny"]):
        script.main([str(picture), "--size", "30", *options])
        assert "at 40 x 30 pixels; tiny, whose weights come with xq" in capsys.readouterr().out


def test_a_preset_has_random_weights_and_says_so(script, picture, monkeypatch, capsys):
    sizes = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "z_channels": 4}
    small = Tokenizer(CNNEncoder(4, **sizes), VQ(4, 16), CNNDecoder(4, **sizes))
    assert {"msvr10p2", "llamagen_vq16", "titok"} <= set(script.PRESETS)
    assert "xqgan_sc" not in script.PRESETS
    monkeypatch.setattr("xq.models.presets.llamagen_vq16", lambda: small)
    script.main([str(picture), "--preset", "llamagen_vq16", "--size", "15"])
    said = capsys.readouterr().out
    assert "llamagen_vq16 with RANDOM WEIGHTS" in said
    assert "(8, 10)" in said


def test_an_encoder_of_one_size_gets_it(script, picture, monkeypatch, capsys):
    model = tokenizer(VQ(4, 16))
    model.encoder.image_size = (16, 24)
    monkeypatch.setattr("common.tokenizers.load_checkpoint", lambda path: model)
    script.main([str(picture), "--checkpoint", "released.pt"])
    said = capsys.readouterr().out
    assert "at 24 x 16 pixels; released.pt" in said
    assert "6 indices (2, 3)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["--tokenizer", "nowhere"], "finds no config.json in nowhere"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--checkpoint", "picture.png"], "picture.png"),
    ],
)
def test_errors_are_one_line(script, picture, arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments if "--" not in arguments[0] else [str(picture), *arguments])
    assert not Path("runs/reconstruction.png").exists()


def test_a_file_of_something_else(script, picture, monkeypatch):
    monkeypatch.setattr("common.tokenizers.load_checkpoint", lambda path: VQ(4, 16))
    with pytest.raises(SystemExit, match=r"codes.pt holds a VQ, no tokenizer"):
        script.main([str(picture), "--checkpoint", "codes.pt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0"], "--size must be positive, got 0"),
        (["--preset", "nothing"], "invalid choice: 'nothing'"),
        (["--preset", "vq", "--tokenizer", "made"], "not allowed with argument --preset"),
    ],
)
def test_arguments_that_make_no_sense(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err
