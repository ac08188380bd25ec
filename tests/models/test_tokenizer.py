import json
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import xq.pretrained
from xq.images import pad_to_multiple
from xq.models import CNNDecoder, CNNEncoder, LinearDecoder, LinearEncoder, Tokenizer
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ChannelFirst,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Pyramid,
    Refine,
    ResidualQuantizer,
    rotation_trick,
)

FILES = ["config.json", "model.safetensors"]


class ToChannelFirst(nn.Module):
    """A user's encoder: patches to `(b, dim, h, w)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 2, stride=2)

    def forward(self, image):
        return self.conv(image)

    def config(self):
        return {"dim": self.conv.out_channels}


class FromChannelFirst(nn.Module):
    """A user's decoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(dim, 3, 2, stride=2)

    def forward(self, z):
        return self.conv(z)

    def config(self):
        return {"dim": self.conv.in_channels}


class Unsaveable(ToChannelFirst):
    """Has no config()."""

    config = None


class Tied(nn.Module):
    """Registers one layer under two names, as tied weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.decoder = LinearDecoder(4, 2)

    def forward(self, z):
        return self.decoder(self.second(self.first(z)))

    def config(self):
        return {}


class OwnTokenizer(Tokenizer):
    """A tokenizer of one's own."""


def own_rotation(u, z):
    """An estimator of one's own."""
    return rotation_trick(u, z)


def linear(quantizer) -> Tokenizer:
    """8 x 8 images, a 4 x 4 grid of tokens."""
    return Tokenizer(LinearEncoder(quantizer.dim, 2), quantizer, LinearDecoder(quantizer.dim, 2))


def ema(dim: int) -> VQ:
    return VQ(dim, 11, codebook=partial(EMACodebook, decay=0.9))


QUANTIZERS = {
    "vq": lambda: VQ(4, 11),
    "ema": lambda: ema(4),
    "bsq": lambda: BSQ(4),
    "lfq": lambda: LFQ(4, bound="tanh"),
    "residual": lambda: ResidualQuantizer(ema(4), depth=3),
    "residual-shared": lambda: ResidualQuantizer(ema(4), depth=3, shared=True),
    "product-shared": lambda: ProductQuantizer(VQ(4, 11), P=2, shared=True),
    "product-of-residuals": lambda: ProductQuantizer(ResidualQuantizer(VQ(2, 11), depth=3), P=2),
    "product-of-unlike": lambda: ProductQuantizer([VQ(2, 11), VQ(3, 11, metric="cosine")]),
    "pyramid": lambda: ResidualQuantizer(ema(4), multiscale=(1, 2, (3, 4), 4)),
    "pyramid-product": lambda: ProductQuantizer(
        ResidualQuantizer(BSQ(3), multiscale=Pyramid((1, 2, 4), [Refine(3)])), P=2
    ),
    "projected": lambda: Projected(VQ(3, 11, estimator=rotation_trick), dim=6),
}


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 8, 8) * 2 - 1


def trained(model: Tokenizer) -> Tokenizer:
    """After two steps, so that averages and weights are not what a constructor makes."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        image = pixels(3)
        out = model(image)
        loss = (out.image - image).square().mean() + out.quantized.losses.total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_forward_is_decode_of_encode(name):
    model, image = linear(QUANTIZERS[name]()).eval(), pixels()
    out, quantized = model(image)
    assert out.shape == image.shape
    assert torch.equal(model.encode(image), quantized.indices)
    assert torch.equal(model.decode(quantized.indices), out)
    assert torch.equal(model.decoder(quantized.z), out)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_partials_end_with_the_image(name):
    model = linear(QUANTIZERS[name]()).eval()
    indices = model.encode(pixels())
    images = list(model.partials(indices))
    assert len(images) == model.quantizer.depth
    assert torch.equal(images[-1], model.decode(indices))


def test_leading_scales_give_the_coarser_image():
    model = linear(QUANTIZERS["pyramid"]())
    indices = model.encode(pixels())
    sizes = torch.tensor([h * w for h, w in model.quantizer.grids]).cumsum(0).tolist()
    for tokens, image in zip(sizes, model.partials(indices), strict=True):
        assert torch.equal(model.decode(indices[:, :tokens]), image)


@pytest.mark.parametrize("per_sample", [False, True], ids=["number", "per-sample"])
def test_depth_goes_to_the_quantizer(per_sample):
    model = linear(QUANTIZERS["product-of-residuals"]()).eval()
    image = pixels()
    depth = torch.tensor([1, 3]) if per_sample else 2
    out = model(image, depth)
    assert torch.equal(out.quantized.z, model.quantizer(model.encoder(image), depth).z)
    assert torch.equal(out.image, model.decoder(out.quantized.z))
    assert not torch.equal(out.image, model(image).image)


def test_gradients_reach_every_part():
    model = linear(QUANTIZERS["pyramid-product"]())
    out = model(pixels())
    (out.image.square().mean() + out.quantized.losses.total()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_encode_takes_no_gradient_and_learns_nothing():
    model = linear(ema(4)).train()
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    assert not model.encode(pixels()).requires_grad
    for key, tensor in model.named_buffers():
        assert torch.equal(tensor, before[key]), key


def test_with_scales_shares_the_modules():
    model = linear(QUANTIZERS["pyramid-product"]())
    larger = model.with_scales((1, 3, 5))
    assert larger.encode(torch.randn(1, 3, 10, 10)).shape == (1, 1 + 9 + 25, 2)
    assert model.quantizer.scales == (1, 2, 4)
    assert {id(p) for p in larger.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="VQ has no scales"):
        linear(VQ(4, 11)).with_scales((1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_tokenizer_codes_both_ways(dtype):
    model = linear(ProductQuantizer(ResidualQuantizer(VQ(4, 16), 2), P=2)).to(dtype).eval()
    image = pixels().to(dtype)
    indices = model.encode(image)
    assert torch.equal(model.decode(indices), model(image).image)
    assert [part.dtype for part in model.partials(indices)] == [dtype, dtype]


def test_a_compiled_part_is_not_written(tmp_path):
    model = linear(VQ(4, 16))
    model.encoder = torch.compile(model.encoder, backend="eager")
    with pytest.raises(TypeError, match=r"a compiled LinearEncoder has no JSON form.*_orig_mod"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_wrapper_gives_the_layout():
    model = Tokenizer(ToChannelFirst(4), ChannelFirst(VQ(4, 11)), FromChannelFirst(4))
    out = model(pixels())
    assert out.image.shape == (2, 3, 8, 8)
    assert out.quantized.z.shape == (2, 4, 4, 4)
    assert out.quantized.indices.shape == (2, 4, 4)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_saved_and_read_back(name, tmp_path):
    model = trained(linear(QUANTIZERS[name]()))
    model.save_pretrained(tmp_path / "model")
    again = Tokenizer.from_pretrained(tmp_path / "model")
    assert [p.name for p in sorted((tmp_path / "model").iterdir())] == FILES
    assert not any(part.training for part in again.modules())
    assert again.config() == model.config()
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    image, depth = pixels(), None if model.quantizer.depth < 2 else 2
    assert torch.equal(again(image, depth).image, model.eval()(image, depth).image)
    assert torch.equal(again.encode(image), model.encode(image))


def test_training_resumes_bit_for_bit(tmp_path):
    model = trained(linear(QUANTIZERS["residual-shared"]()))
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path).train()
    torch.manual_seed(1)
    trained(model)
    torch.manual_seed(1)
    trained(again)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_the_convolutional_tokenizer_with_scales_changed(tmp_path):
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}
    quantizer = ResidualQuantizer(BSQ(4), multiscale=(1, 2, 4))
    model = Tokenizer(CNNEncoder(4, **sizes), quantizer, CNNDecoder(4, **sizes))
    model.with_scales((1, 2, 3, 6)).save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 12, 12)
    assert again.quantizer.scales == (1, 2, 3, 6)
    model = model.with_scales((1, 2, 3, 6)).eval()
    assert torch.equal(again(image).image, model(image).image)


def test_fewer_scales_than_refinements(tmp_path):
    model = linear(ResidualQuantizer(BSQ(4), multiscale=(1, 2, 3))).with_scales((1, 4)).eval()
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    image = pixels()
    assert torch.equal(again(image).image, model(image).image)


def test_own_classes_and_functions_are_passed_in(tmp_path):
    quantizer = ChannelFirst(VQ(4, 11, estimator=own_rotation))
    model = Tokenizer(ToChannelFirst(4), quantizer, FromChannelFirst(4))
    model.save_pretrained(tmp_path)
    own = [ToChannelFirst, FromChannelFirst, own_rotation]
    for missing in own:
        rest = [c for c in own if c is not missing]
        with pytest.raises(ValueError, match=f"'{missing.__name__}' is not a part of xq"):
            Tokenizer.from_pretrained(tmp_path, classes=rest)
    again = Tokenizer.from_pretrained(tmp_path, classes=own)
    assert again.quantizer.quantizer.estimator is own_rotation
    image = pixels()
    assert torch.equal(again(image).image, model.eval()(image).image)


def test_a_tokenizer_of_ones_own(tmp_path):
    model = OwnTokenizer(LinearEncoder(4, 2), VQ(4, 11), LinearDecoder(4, 2))
    model.save_pretrained(tmp_path)
    assert type(OwnTokenizer.from_pretrained(tmp_path)) is OwnTokenizer
    with pytest.raises(ValueError, match="'OwnTokenizer' is not a part of xq"):
        Tokenizer.from_pretrained(tmp_path)


def test_tied_weights_are_written_once(tmp_path):
    model = Tokenizer(LinearEncoder(4, 2), VQ(4, 11), Tied())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "decoder.first.weight" in stored
    assert "decoder.second.weight" not in stored
    again = Tokenizer.from_pretrained(tmp_path, classes=[Tied])
    assert again.decoder.second.weight is again.decoder.first.weight
    image = pixels()
    assert torch.equal(again(image).image, model.eval()(image).image)


def test_the_files_hold_json_and_numbers_alone(tmp_path):
    linear(ema(4)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["class"] == "Tokenizer"
    weights = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} <= {"F32", "I64"}
    # every byte is accounted for: nothing is pickled behind the numbers
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(weights) - 8 - length


def test_reading_executes_nothing(tmp_path, monkeypatch):
    linear(VQ(4, 11)).save_pretrained(tmp_path)
    for loader in ("torch.load", "pickle.load", "pickle.loads", "builtins.eval", "builtins.exec"):
        monkeypatch.setattr(loader, lambda *a, **k: pytest.fail("executes what it reads"))
    Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Tokenizer(Unsaveable(4), ChannelFirst(VQ(4, 11)), FromChannelFirst(4)),
            r"Unsaveable has no config\(\): add one",
        ),
        (
            lambda: Tokenizer(nn.Identity(), VQ(4, 11), LinearDecoder(4, 2)),
            r"Identity has no config\(\)",
        ),
        (lambda: linear(VQ(4, 11, estimator=lambda u, z: z)), "cannot write <function <lambda>"),
    ],
    ids=["own", "torch", "lambda"],
)
def test_nothing_is_written_without_a_config(model, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        model().save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    linear(VQ(4, 11)).save_pretrained(tmp_path / "old")
    before = tree(tmp_path / "old")
    with pytest.raises(TypeError, match=message):
        model().save_pretrained(tmp_path / "old")
    assert tree(tmp_path / "old") == before


def test_an_existing_folder_is_replaced_whole(tmp_path):
    linear(QUANTIZERS["pyramid"]()).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = linear(VQ(6, 5))
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.config() == model.config()
    assert sorted(tree(tmp_path)) == [*FILES, "notes.txt"]


@pytest.mark.parametrize("new", [False, True], ids=["existing", "new"])
def test_a_failed_write_changes_nothing(new, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if not new:
        linear(VQ(4, 11)).save_pretrained(folder)
    before = tree(tmp_path / "model") if not new else None

    def fail(state, path, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(xq.pretrained, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        linear(VQ(6, 5)).save_pretrained(folder)
    if new:
        assert not folder.exists()
    else:
        assert tree(folder) == before


@pytest.fixture
def saved(tmp_path) -> Path:
    linear(ema(4)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", FILES)
def test_missing_file(saved, file):
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"finds no {file} in .*save_pretrained wrote"):
        Tokenizer.from_pretrained(saved)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"finds no config\.json in .*nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "config.json is damaged or no JSON file"),
        (b'{"class": "Tokenizer", "enc', "config.json is damaged or no JSON file"),
        (b"\xff\xfe\x00", "config.json is damaged or no JSON file"),
        (b"[" * 100_000, "config.json is damaged or no JSON file"),
        (b"[]", 'config.json describes no xq model: it has no "class"'),
        (b'{"model_type": "vq"}', 'config.json describes no xq model: it has no "class"'),
        (b'{"class": "Tokenizer"}', "cannot build Tokenizer from .*missing"),
        (b'{"class": "os.system"}', "'os.system' is not a part of xq"),
        (b'{"class": "BSQ", "dim": 4}', "config.json describes a BSQ, not a Tokenizer"),
    ],
    ids=[
        "empty",
        "truncated",
        "binary",
        "nested",
        "list",
        "foreign",
        "bare",
        "command",
        "quantizer",
    ],
)
def test_damaged_configuration(saved, text, message):
    (saved / "config.json").write_bytes(text)
    before = tree(saved)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(saved)
    assert tree(saved) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-3],
        lambda data: data + b"more",
        lambda data: b"\x80\x04" + data,
        lambda data: struct.pack("<Q", 2**62) + data[8:],
    ],
    ids=["empty", "length", "header", "data", "longer", "pickle", "huge-header"],
)
def test_damaged_weights(saved, damage):
    weights = saved / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    before = tree(saved)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        Tokenizer.from_pretrained(saved)
    assert tree(saved) == before


def test_a_checkpoint_of_another_model(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    linear(VQ(4, 11)).save_pretrained(other)
    (other / "model.safetensors").replace(saved / "model.safetensors")
    message = r"does not fit its config.json: 3 tensors missing \(quantizer.codebook.count, "
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(saved)


def test_unknown_tensors(saved):
    path = saved / "model.safetensors"
    save_file({**load_file(path), "quantize.embedding.weight": torch.zeros(2)}, path)
    message = r"0 tensors missing \(\), 1 unknown \(quantize.embedding.weight\)"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(saved)


def test_tensors_of_another_shape(saved):
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"codebook_size": 11', '"codebook_size": 12'))
    message = r"has quantizer.codebook.\w+ of shape \(11.*, its config.json wants \(12"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(saved)


def test_tensors_of_another_kind(saved):
    path = saved / "model.safetensors"
    state = load_file(path)
    save_file({**state, "quantizer.codebook.count": torch.zeros(11, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match=r"has quantizer.codebook.count of torch.int64"):
        Tokenizer.from_pretrained(saved)


def rand_pictures(b: int, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(b)
    return torch.rand(b, 3, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_chunks_give_the_same(name, chunk):
    model, image = linear(QUANTIZERS[name]()).eval(), rand_pictures(5)
    indices = model.encode(image)
    assert torch.equal(model.encode(image, chunk=chunk), indices)
    close = {"atol": 1e-6, "rtol": 0.0}
    torch.testing.assert_close(model.decode(indices, chunk=chunk), model.decode(indices), **close)
    parts = zip(model.partials(indices, chunk=chunk), model.partials(indices), strict=True)
    for got, want in parts:
        torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(
        model.reconstruct(image, chunk=chunk), model.reconstruct(image), **close
    )


def test_chunks_bound_what_the_networks_see():
    model, seen = linear(VQ(4, 11)).eval(), []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    indices = model.encode(rand_pictures(5), chunk=2)
    model.decode(indices, chunk=3)
    list(model.partials(indices, chunk=4))
    model.reconstruct(rand_pictures(3), chunk=2)
    assert seen == [2, 2, 1, 3, 2, 4, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_an_image(chunk):
    model = linear(VQ(4, 11))
    indices = model.encode(pixels())
    message = f"Tokenizer needs a chunk of 1 image or more, got chunk={chunk}"
    calls = (
        lambda: model.encode(pixels(), chunk=chunk),
        lambda: model.decode(indices, chunk=chunk),
        lambda: next(model.partials(indices, chunk=chunk)),
        lambda: model.reconstruct(rand_pictures(1), chunk=chunk),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


class Dropping(LinearEncoder):
    """Without dropout, only in eval mode what it encodes is certain."""

    def forward(self, images):
        return nn.functional.dropout(super().forward(images), 0.5, self.training)


def test_reconstruct_is_for_looking_at():
    torch.manual_seed(0)
    model = Tokenizer(Dropping(4, 2), ema(4), LinearDecoder(4, 2)).train()
    model.decoder.eval()
    with torch.no_grad():
        model.decoder.linear.weight.mul_(20)
    image = rand_pictures(3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = model.reconstruct(image)
    assert not made.requires_grad
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert (model.training, model.encoder.training, model.decoder.training) == (True, True, False)
    model.eval()
    want = model(image).image
    assert want.abs().max() > 1
    assert torch.equal(made, want.clamp(-1, 1))


def test_reconstruct_restores_the_mode_after_an_error():
    model = linear(VQ(4, 11)).train()
    with pytest.raises(ValueError, match="multiples of its stride 2"):
        model.reconstruct(rand_pictures(1, 7, 8))
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 3, 8, 8), 255.0), r"in \[-1, 1\], got values from 255 to 255; xq.images"),
        (torch.full((1, 3, 8, 8), 200, dtype=torch.uint8), "got values from 200 to 200"),
        (torch.full((1, 3, 8, 8), -1.5), "got values from -1.5 to -1.5"),
        (torch.zeros((1, 3, 8, 8), dtype=torch.uint8), "floating-point images.*torch.uint8"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN or infinite"),
        (torch.zeros(1, 8, 8, 3), r"channel-first images \(b, 3, H, W\)"),
    ],
    ids=["bytes", "uint8", "below", "black", "nan", "layout"],
)
def test_reconstruct_refuses(image, message):
    with pytest.raises(ValueError, match=message):
        linear(VQ(4, 11)).reconstruct(image)


def test_pictures_are_no_tensors():
    from PIL import Image

    for way in ("encode", "reconstruct"):
        with pytest.raises(ValueError, match=r"got Image; xq.images.to_images makes them of pict"):
            getattr(linear(VQ(8, 16)), way)(Image.new("RGB", (8, 8)))


def test_padding_and_cropping_take_any_size():
    model, image = linear(VQ(4, 11)).eval(), rand_pictures(2, 7, 5)
    padded = pad_to_multiple(image, model.encoder.stride)
    assert padded.shape == (2, 3, 8, 6)
    made = model.reconstruct(padded)[:, :, :7, :5]
    assert made.shape == image.shape
    # patches that were whole before are what they would have been without the padding
    assert torch.equal(made[:, :, :6, :4], model.reconstruct(image[:, :, :6, :4]))


@pytest.mark.parametrize("call", ["encode", "reconstruct", "__call__"])
def test_scales_say_how_large_images_are(call):
    model = linear(ResidualQuantizer(BSQ(4), multiscale=(1, (3, 4))))
    message = (
        r"scales up to 3 x 4 tokens, those of images of 6 x 8 pixels, got 8 x 10 pixels, "
        r"which are 4 x 5 tokens; resize or crop the images, or .* tokenizer.with_scales"
    )
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(rand_pictures(1, 8, 10))
    assert getattr(model, call)(rand_pictures(1, 6, 8)) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_tokenizer_takes_what_to_images_makes(dtype):
    model = linear(ProductQuantizer(ResidualQuantizer(VQ(4, 16), 2), P=2)).to(dtype).eval()
    image = rand_pictures(3)
    indices = model.encode(image)
    assert torch.equal(indices, model.encode(image.to(dtype)))
    assert model(image).image.dtype == dtype
    made = model.reconstruct(image)
    assert made.dtype == torch.float32
    assert torch.equal(made, model.decode(indices).clamp(-1, 1).float())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_indices_within_autocast_are_those_of_float32(name):
    model, image = linear(QUANTIZERS[name]()).eval(), rand_pictures(4)
    with torch.autocast("cpu", torch.bfloat16):
        indices, z = model.encode(image), model.encoder(image)
        made = model.reconstruct(image)
    assert z.dtype == torch.bfloat16
    assert torch.equal(indices, model.quantizer.encode(z.float()))
    assert made.dtype == torch.float32
    assert torch.equal(model.quantizer.decode(indices), model.quantizer(z.float()).z)


@pytest.mark.compile
def test_encode_and_decode_compile():
    torch._dynamo.reset()
    sizes = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "z_channels": 4}
    quantizer = ProductQuantizer(VQ(4, 13), P=2)
    model = Tokenizer(CNNEncoder(8, **sizes), quantizer, CNNDecoder(8, **sizes)).eval()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    image = rand_pictures(2)
    indices = model.encode(image)
    assert torch.equal(encode(image), indices)
    torch.testing.assert_close(decode(indices), model.decode(indices))
