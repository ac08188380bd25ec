import copy
import io
import json

import pytest
import torch
import torch.nn.functional as F

from xq.config import build, describe
from xq.models import MaskGITDecoder, TiTokDecoder, TiTokEncoder, Tokenizer
from xq.models.titok_pixels import MaskGITBlock, PatchPixels
from xq.quantizers import VQ

SMALL = {"image_size": 8, "patch_size": 4, "tokens": 3, "width": 12, "depth": 2, "heads": 3}
OBLONG = SMALL | {"image_size": (8, 12)}
VQGAN = {"channels": 8, "multipliers": (1, 2, 1), "blocks": 1}
BOTH = pytest.mark.parametrize("cls", [TiTokEncoder, TiTokDecoder])


def vqgan(**sizes):
    return MaskGITDecoder(6, 9, **VQGAN | sizes)


def modules(**sizes):
    sizes = OBLONG | sizes
    return {
        "encoder": TiTokEncoder(5, **sizes),
        "mixed": TiTokEncoder(5, **sizes, mixed=True),
        "decoder": TiTokDecoder(5, **sizes),
        "vqgan": TiTokDecoder(5, **sizes, vqgan=vqgan()),
        "grey": TiTokDecoder(5, **sizes, image_channels=1, vqgan=vqgan(image_channels=1)),
    }


NAMES = list(modules())


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def input_of(module, batch=2):
    if isinstance(module, TiTokEncoder):
        return torch.randn(batch, module.image_channels, *module.image_size)
    return torch.randn(batch, module.tokens, module.dim)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_shapes(name, batch):
    module = modules()[name]
    output = module(input_of(module, batch))
    if isinstance(module, TiTokEncoder):
        assert output.shape == (batch, 3, 5)
    else:
        assert output.shape == (batch, 1 if name == "grey" else 3, 8, 12)


@pytest.mark.parametrize("patch", [(2, 2), (3, 2)])
def test_patches_of_any_shape(patch):
    sizes = SMALL | {"image_size": (12, 10), "patch_size": patch}
    encoder, decoder = TiTokEncoder(5, **sizes), TiTokDecoder(5, **sizes)
    assert decoder(encoder(torch.randn(2, 3, 12, 10))).shape == (2, 3, 12, 10)


def test_images_are_taken_from_minus_one_to_one():
    encoder, decoder = TiTokEncoder(5, **SMALL), TiTokDecoder(5, **SMALL)
    seen = []
    encoder.patches.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    encoder(torch.full((1, 3, 8, 8), -1.0))
    encoder(torch.full((1, 3, 8, 8), 1.0))
    assert not seen[0].any()
    assert torch.equal(seen[1], torch.ones(1, 4, 48))
    with torch.no_grad():
        decoder.head.conv_out.weight.zero_()
        decoder.head.conv_out.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    image = decoder(torch.randn(1, 3, 5))
    assert image[0].flatten(1).unique(dim=1).tolist() == [[-1.0], [0.0], [1.0]]


def test_mixed_reads_features_as_if_they_were_transposed():
    plain = TiTokEncoder(5, **SMALL)
    mixed = TiTokEncoder(5, **SMALL, mixed=True)
    mixed.load_state_dict(plain.state_dict())
    features = []
    plain.transformer.register_forward_hook(lambda module, args, output: features.append(output))
    images = torch.randn(2, 3, 8, 8)
    plain(images)
    numbers = features[0].flatten(1)
    for token in range(3):
        expected = plain.to_tokens(numbers[:, token::3])
        torch.testing.assert_close(mixed(images)[:, token], expected)


def test_latent_tokens_see_the_image_and_patches_see_the_tokens():
    encoder, decoder = TiTokEncoder(5, **SMALL), TiTokDecoder(5, **SMALL)
    with torch.no_grad():
        for module in (encoder, decoder):
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    images, tokens = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 5)
    changed = images.clone()
    changed[..., 7, 7] += 1
    assert (encoder(changed) != encoder(images)).any(-1).all()
    changed = tokens.clone()
    changed[:, 2] += 1
    assert (decoder(changed) != decoder(tokens)).float().mean() > 0.9


def test_tokens_have_an_order():
    decoder = TiTokDecoder(5, **SMALL)
    tokens = torch.randn(1, 3, 5)
    assert not torch.allclose(decoder(tokens), decoder(tokens.flip(1)), atol=1e-7, rtol=0)


def test_patch_pixels_stand_where_their_patch_is():
    head = PatchPixels(6, (2, 3), 3)
    with torch.no_grad():
        head.conv_out.weight.zero_()
        head.conv_out.bias.zero_()
        for channel in range(3):
            head.conv_out.weight[channel, channel, 1, 1] = 1
    x = torch.randn(1, 4, 5, 6)
    pixels = head(x)
    for i, j in ((0, 0), (3, 1), (2, 4)):
        patch = head.patches(x[0, i, j]).unflatten(0, (2, 3, 3))
        rows, columns = slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3)
        torch.testing.assert_close(pixels[0, :, rows, columns], patch.permute(2, 0, 1))


def test_maskgit_decodes_the_expected_code():
    decoder = vqgan()
    certain = torch.full((1, 2, 2, 9), -1e4)
    certain[..., 4] = 0
    images = decoder(certain)
    with torch.no_grad():
        decoder.codes[:] = decoder.codes[4].clone()
    torch.testing.assert_close(decoder(torch.randn(1, 2, 2, 9)), images)


def test_a_maskgit_block_lets_nothing_around_where_channels_change():
    for channels in (8, 12):
        block = MaskGITBlock(8, channels)
        with torch.no_grad():
            block.conv2.weight.zero_()
        x = torch.randn(1, 8, 4, 4)
        expected = x if channels == 8 else torch.zeros(1, 12, 4, 4)
        assert torch.equal(block(x), expected)


def test_a_maskgit_level_runs_from_coarse_to_fine():
    decoder = vqgan(multipliers=(1, 2, 4))
    assert [level[0][0].conv2.out_channels for level in decoder.levels] == [32, 16, 8]
    assert decoder.stride == 4
    logits = torch.randn(1, 2, 3, 9)
    x = decoder.conv_in((logits.softmax(-1) @ decoder.codes).permute(0, 3, 1, 2))
    x = decoder.mid(x)
    for level in decoder.levels[:2]:
        x = F.interpolate(level[0](x), scale_factor=2.0)
        x = level[1].conv(x)
    x = decoder.conv_out(F.silu(decoder.norm_out(decoder.levels[2][0](x))))
    torch.testing.assert_close(decoder(logits), x)


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name):
    module = modules()[name]
    again = build(json.loads(json.dumps(describe(module))))
    assert describe(again) == describe(module)
    assert shapes(again) == shapes(module)
    again.load_state_dict(module.state_dict())
    x = input_of(module)
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("name", NAMES)
def test_copies_compute_the_same(name):
    module = modules()[name]
    x = input_of(module)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with torch.device("meta"):
        empty = modules()[name]
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    module = modules()[name]
    module(input_of(module)).square().mean().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_last_layer():
    direct, coded = TiTokDecoder(5, **SMALL), TiTokDecoder(5, **SMALL, vqgan=vqgan())
    assert direct.last_layer is direct.head.conv_out.weight
    assert coded.last_layer is coded.head.vqgan.conv_out.weight


@BOTH
def test_checkpointing_changes_no_number(cls):
    plain, frugal = cls(5, **SMALL), cls(5, **SMALL, checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    x = input_of(plain)
    for module in (plain, frugal):
        module(x).square().sum().backward()
    for one, two in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_in_a_tokenizer():
    decoder = TiTokDecoder(5, **SMALL, vqgan=vqgan())
    tokenizer = Tokenizer(TiTokEncoder(5, **SMALL), VQ(5, 7, normalize=True), decoder).eval()
    images = torch.randn(2, 3, 8, 8)
    indices = tokenizer.encode(images)
    assert indices.shape == (2, 3)
    assert torch.equal(tokenizer.decode(indices), tokenizer(images).image)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 8, 12),
            r"TiTokEncoder is built for images of \(8, 8\), got \(8, 12\); resize or crop them, "
            r"or build it with image_size=\(8, 12\)",
        ),
        (torch.zeros(1, 8, 8, 3), r"TiTokEncoder expects channel-first images"),
        (torch.zeros(1, 3, 8, 8).byte(), r"TiTokEncoder expects floating-point images in \[-1, 1"),
    ],
    ids=["size", "channel-last", "bytes"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        TiTokEncoder(5, **SMALL)(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 5, 3), r"expects tokens \(b, 3, 5\), got shape \(1, 5, 3\); its tokens"),
        (torch.zeros(1, 1, 3, 5), r"got shape \(1, 1, 3, 5\); .* a row without height and width"),
        (torch.zeros(1, 4, 5), r"got shape \(1, 4, 5\)"),
        (torch.zeros(1, 3, 5).long(), r"floating-point tokens, got torch.int64; .* quantizer.dec"),
    ],
    ids=["channel-first", "grid", "too-many", "indices"],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=f"TiTokDecoder .*{message}"):
        TiTokDecoder(5, **SMALL)(tokens)


@BOTH
@pytest.mark.parametrize("argument", ["dim", "tokens", "width", "depth", "heads", "image_channels"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_bad_numbers(cls, argument, value):
    message = f"{cls.__name__} needs `{argument}` to be a positive integer, got {value}"
    with pytest.raises(ValueError, match=message):
        cls(**{"dim": 5, **SMALL, argument: value})


@BOTH
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, r"needs `heads` to divide the width 12, got 5"),
        ({"image_size": (8, 0)}, r"needs `image_size` to be a positive .* got \(8, 0\)"),
        ({"image_size": 9}, r"a multiple of the patch_size \(4, 4\), got \(9, 9\); \(8, 8\) is"),
    ],
)
def test_bad_sizes(cls, sizes, message):
    with pytest.raises(ValueError, match=f"{cls.__name__} .*{message}"):
        cls(5, **SMALL | sizes)


@pytest.mark.parametrize(
    ("sizes", "made"),
    [({"multipliers": (1, 2)}, r"\(2, 2, 3\)"), ({"image_channels": 1}, r"\(4, 4, 1\)")],
)
def test_a_vqgan_of_other_patches(sizes, made):
    message = rf"TiTokDecoder needs a vqgan that makes a patch .* \(4, 4, 3\) .* got one for {made}"
    with pytest.raises(ValueError, match=message):
        TiTokDecoder(5, **SMALL, vqgan=vqgan(**sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"multipliers": ()}, r"MaskGITDecoder needs `multipliers`, one for each .* \(1, 1, 2, 2"),
        ({"multipliers": (1, 0)}, r"MaskGITDecoder needs `multipliers\[1\]` .* got 0"),
        ({"channels": 0}, r"MaskGITDecoder needs `channels` to be a positive integer, got 0"),
        ({"blocks": -1}, r"MaskGITDecoder needs `blocks` to be a positive integer, got -1"),
    ],
)
def test_bad_sizes_of_maskgit(sizes, message):
    with pytest.raises(ValueError, match=message):
        vqgan(**sizes)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mixed", "vqgan"])
def test_one_graph(name):
    torch._dynamo.reset()
    module = modules(depth=1)[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = input_of(module)
    torch.testing.assert_close(compiled(x), module(x))
    want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mixed", "vqgan"])
def test_export_with_any_batch(name):
    module = modules(depth=1)[name].eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (input_of(module),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 3):
        x = input_of(module, size)
        torch.testing.assert_close(loaded(x), module(x))
