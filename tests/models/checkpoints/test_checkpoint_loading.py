"""`load_checkpoint`, `inspect_checkpoint` and the command around them."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xq.losses import PatchGAN
from xq.models import Tokenizer
from xq.models.checkpoints import formats, inspect_checkpoint, load_checkpoint
from xq.models.checkpoints.__main__ import main
from xq.models.checkpoints.lora import merge_lora
from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.quantizers import VQ, Quantizer, SimCodebook

SIZES = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 4}


def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    vq = VQ(4, 16, normalize=True)
    return Tokenizer(CNNEncoder(4, **SIZES), vq, CNNDecoder(4, **SIZES)).eval()


def state(model: Tokenizer) -> dict[str, torch.Tensor]:
    state = formats()["xqgan_cnn"].table({}).revert(model.state_dict())
    return state | {"quantize.ema_vocab_hit_SV": torch.zeros(16)}


@pytest.fixture
def model() -> Tokenizer:
    return tokenizer()


@pytest.fixture
def path(tmp_path, model):
    weights = {key: value + 0.5 for key, value in state(model).items()}
    torch.save({"model": weights, "ema": state(model), "steps": 7}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16) * 2 - 1


def test_averages_are_preferred(path, model, caplog):
    with caplog.at_level(logging.INFO, "xq.checkpoints"):
        loaded = load_checkpoint(path)
    x = images()
    assert torch.equal(loaded(x).image, model(x).image)
    (record,) = caplog.records
    assert (
        "XQ-GAN with a CNN (xqgan_cnn): weights 'ema' (the file also has model)" in record.message
    )
    assert str(path) in record.message


def test_choice_of_weights(path, model):
    loaded = load_checkpoint(path, weights="model")
    assert torch.equal(loaded.quantizer.codebook.weight, model.quantizer.codebook.weight + 0.5)
    with pytest.raises(ValueError, match=r"has no weights 'discriminator', it has 'model', 'ema'"):
        load_checkpoint(path, weights="discriminator")


def test_the_only_weights(tmp_path, model):
    save_file(state(model), tmp_path / "x.safetensors")
    found = inspect_checkpoint(tmp_path / "x.safetensors")
    assert (found.format, found.weights, found.sets) == ("xqgan_cnn", "model", ("model",))
    assert found.tensors == len(state(model))
    assert found.numbers == sum(tensor.numel() for tensor in state(model).values())
    with pytest.raises(ValueError, match="has no weights 'ema', it has 'model'"):
        load_checkpoint(tmp_path / "x.safetensors", weights="ema")


def test_into_another_module(path, model):
    other = Tokenizer(
        CNNEncoder(4, **SIZES),
        VQ(4, 16, normalize=True, entropy_temperature=0.1),
        CNNDecoder(4, **SIZES),
    )
    assert load_checkpoint(path, into=other) is other
    x = images()
    assert torch.equal(other(x).image, model(x).image)
    with pytest.raises(ValueError, match=r"cannot be read: .*lacks 2 .*codebook\.basis"):
        load_checkpoint(
            path, into=Tokenizer(nn.Identity(), VQ(4, 16, codebook=SimCodebook), nn.Identity())
        )


def test_unknown_files(tmp_path, model):
    torch.save(state(model) | {"encoder.extra": torch.zeros(1)}, tmp_path / "more.pt")
    load = tmp_path / "more.pt"
    with pytest.raises(ValueError, match=r"more.pt cannot be read: .*left over \(encoder.extra\)"):
        load_checkpoint(load)
    less = {key: value for key, value in state(model).items() if "embedding" not in key}
    torch.save(less, tmp_path / "less.pt")
    message = (
        r"less.pt: these \d+ tensors are of no known format. The nearest is (llamagen|xqgan_cnn): "
        r"unknown to it are \d .*, missing at least 'quantize.embedding.weight'; the formats known"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "less.pt")
    torch.save({"linear.weight": torch.zeros(2)}, tmp_path / "other.pt")
    message = r"these 1 tensors are of no known format: linear.weight; the formats known are .*var"
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(tmp_path / "other.pt")


def test_files_of_this_library(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"xq's own names: Tokenizer.from_pretrained reads"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_format_by_name(path):
    assert inspect_checkpoint(path, format="xqgan_cnn").format == "xqgan_cnn"
    with pytest.raises(ValueError, match=r"cannot be read: TiTok"):
        load_checkpoint(path, format="titok")
    with pytest.raises(ValueError, match=r"knows the formats .*xqgan.*, got 'xq'"):
        load_checkpoint(path, format="xq")


def test_formats_have_names_of_their_own():
    assert all(format.name == name for name, format in formats().items())
    assert len({format.title for format in formats().values()}) == len(formats())


def adapted(rank: int) -> tuple[nn.Module, nn.Module]:
    """A model with adapters of peft, and the same without them, merged by peft."""
    peft = pytest.importorskip("peft")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.fc1(x))

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.token = Block(), nn.Parameter(torch.rand(3))

    part = Part()
    config = peft.LoraConfig(r=rank, target_modules=["fc1"], modules_to_save=["norm"])
    part.model = peft.get_peft_model(part.model, config)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.rand_like(parameter))
    return part, part.model


@torch.no_grad()
@pytest.mark.parametrize("rank", [8, 2])
def test_adapters_are_merged(rank):
    part, model = adapted(rank)
    merged = merge_lora({f"encoder.{key}": tensor for key, tensor in part.state_dict().items()})
    assert merged.keys() == {
        "encoder.token",
        *(
            f"encoder.model.{name}.{kind}"
            for name in ("fc1", "norm")
            for kind in ("weight", "bias")
        ),
    }
    x = torch.rand(2, 4)
    expected = model(x)
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    for layer, name in zip(plain, ("fc1", "norm"), strict=True):
        layer.weight.copy_(merged[f"encoder.model.{name}.weight"])
        layer.bias.copy_(merged[f"encoder.model.{name}.bias"])
    torch.testing.assert_close(plain(x), expected)


def test_adapters_that_do_not_fit():
    base = {"m.fc.base_layer.weight": torch.zeros(3, 2), "m.fc.lora_A.a.weight": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"lora_A.a.weight lacks its m.fc.lora_B.a.weight"):
        merge_lora(base)
    base["m.fc.lora_B.a.weight"] = torch.zeros(3, 1)
    assert merge_lora(base).keys() == {"m.fc.weight"}
    more = {key.replace(".a.", ".b."): value for key, value in base.items()}
    with pytest.raises(ValueError, match=r"m.fc.weight has several adapters"):
        merge_lora(base | more)


def test_convert(path, model, tmp_path, capsys):
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "file of     XQ-GAN with a CNN (format xqgan_cnn)\nweights     ema, of model, ema" in out
    assert f"xq.Tokenizer.from_pretrained({str(tmp_path / 'out')!r})" in out
    read = Tokenizer.from_pretrained(tmp_path / "out")
    loaded, x = load_checkpoint(path), images()
    assert torch.equal(read.encode(x), loaded.encode(x))
    assert torch.equal(read(x).image, loaded(x).image)
    assert read.state_dict().keys() == loaded.state_dict().keys()
    assert main(["convert", str(path), str(tmp_path / "second"), "--weights", "model"]) == 0
    second = Tokenizer.from_pretrained(tmp_path / "second")
    assert not torch.equal(second.quantizer.codebook.weight, read.quantizer.codebook.weight)


def test_convert_a_quantizer_alone(tmp_path, capsys):
    quantizer = VQ(4, 16, codebook=SimCodebook)
    parts = {"frozen_codebook": quantizer.codebook.basis}
    parts["code_transform.weight"] = quantizer.codebook.transform.weight.detach()
    torch.save({f"vq.{key}": value for key, value in parts.items()}, tmp_path / "q.pt")
    assert main(["convert", str(tmp_path / "q.pt"), str(tmp_path / "out"), "--prefix", "vq."]) == 0
    assert "xq.Quantizer.from_pretrained" in capsys.readouterr().out
    read, x = Quantizer.from_pretrained(tmp_path / "out"), torch.randn(5, 4)
    assert torch.equal(read.encode(x), quantizer.encode(x))


def test_inspect(path, capsys):
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "file of     XQ-GAN with a CNN (format xqgan_cnn)",
        "weights     ema, of model, ema",
        f"tensors     {len(state(tokenizer()))} with 0.05 M numbers",
    ]


def refused(arguments, capsys) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    line, rest = capsys.readouterr().err.split("\n")
    assert rest == ""
    assert line.startswith("error: ")
    return line


def test_errors_of_the_command(path, tmp_path, capsys, model):
    out = tmp_path / "out"
    assert "there is no file" in refused(["inspect", tmp_path / "none.pt"], capsys)
    assert "is a file; name a folder" in refused(["convert", path, path], capsys)
    assert "has no weights 'best'" in refused(["convert", path, out, "--weights", "best"], capsys)
    broken = state(model) | {"decoder.conv_out.bias": torch.zeros(7)}
    torch.save(broken, tmp_path / "broken.pt")
    message = "decoder.conv_out.bias of shape (7,), the module asks for (3,)"
    assert message in refused(["convert", tmp_path / "broken.pt", out], capsys)
    torch.save({"model": {}, "discriminator": PatchGAN().state_dict()}, tmp_path / "disc.pt")
    assert "no tokenizer or quantizer" in refused(["convert", tmp_path / "disc.pt", out], capsys)
    assert not out.exists()
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "holds a model already" in refused(["convert", path, out], capsys)
    assert json.loads((out / "config.json").read_text()) == {}


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "xq.models.checkpoints", "inspect", str(tmp_path / "none.pt")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [f"error: there is no file {tmp_path / 'none.pt'}"]
    assert ended.stdout == ""
