import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.cnn_blocks import AttentionBlock, Downsample, Upsample, norm

GOLDEN = Path(__file__).parents[1] / "golden" / "xqgan_cnn_vq16.txt"
SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}


def golden_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    rows = (line.split() for line in GOLDEN.read_text().splitlines())
    return {
        key.removeprefix(prefix): tuple(map(int, shape))
        for key, *shape in rows
        if key.startswith(prefix)
    }


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("sizes", "image", "grid"),
    [
        pytest.param({}, (2, 3, 8, 12), (4, 6), id="B2-H8-W12"),
        pytest.param({"multipliers": (1,)}, (1, 3, 5, 7), (5, 7), id="one-level-H5-W7"),
        pytest.param({"patch": 4}, (1, 3, 24, 40), (3, 5), id="patch4-H24-W40"),
        pytest.param({"patch": 3, "multipliers": (2, 1, 3)}, (2, 3, 24, 12), (2, 1), id="patch3"),
        pytest.param({"image_channels": 1}, (2, 1, 6, 6), (3, 3), id="grey"),
        pytest.param({"channels": 48}, (1, 3, 4, 4), (2, 2), id="48-channels"),
        pytest.param({"blocks": 3}, (1, 3, 4, 4), (2, 2), id="3-blocks"),
        pytest.param({"quant_kernel": 3}, (1, 3, 4, 6), (2, 3), id="quant-kernel-3"),
        pytest.param({"attention": False}, (1, 3, 4, 6), (2, 3), id="no-attention"),
    ],
)
def test_shapes(sizes, image, grid):
    encoder, decoder = CNNEncoder(5, **SMALL | sizes), CNNDecoder(5, **SMALL | sizes)
    tokens = encoder(torch.randn(image))
    assert tokens.shape == (image[0], *grid, 5)
    assert decoder(tokens).shape == image
    assert encoder.stride == decoder.stride == image[2] // grid[0]


def test_empty_batch():
    encoder, decoder = CNNEncoder(5, **SMALL), CNNDecoder(5, **SMALL)
    assert decoder(encoder(torch.randn(0, 3, 4, 4))).shape == (0, 3, 4, 4)


def test_defaults_are_vq16():
    with torch.device("meta"):
        encoder, decoder = CNNEncoder(8), CNNDecoder(8)
    projection, expansion = parameters(encoder.quant_conv), parameters(decoder.post_quant_conv)
    assert (projection, expansion) == (2056, 2304)
    assert parameters(encoder) - projection == 29_298_176
    assert parameters(decoder) - expansion == 42_449_795
    assert encoder.stride == decoder.stride == 16


def test_state_dict_is_the_original_one():
    with torch.device("meta"):
        encoder, decoder = CNNEncoder(8), CNNDecoder(8)
    assert shapes(encoder) == golden_shapes("encoder.") | {
        "quant_conv.weight": (8, 256, 1, 1),
        "quant_conv.bias": (8,),
    }
    assert shapes(decoder) == golden_shapes("decoder.") | {
        "post_quant_conv.weight": (256, 8, 1, 1),
        "post_quant_conv.bias": (256,),
    }


def test_meta_module_takes_a_state_dict():
    with torch.device("meta"):
        empty = CNNEncoder(5, **SMALL)
    full = CNNEncoder(5, **SMALL)
    empty.load_state_dict(full.state_dict(), assign=True)
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(empty(images), full(images))


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
def test_config_round_trip(cls):
    sizes = {"blocks": 3, "z_channels": 7, "patch": 2, "quant_kernel": 3, "attention": False}
    module = cls(5, channels=8, multipliers=(1, 3), **sizes)
    config = module.config()
    again = cls(**json.loads(json.dumps(config)))
    assert again.config() == config
    assert shapes(again) == shapes(module)
    assert again.stride == module.stride == 4


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
def test_without_attention_there_is_none(cls):
    def attentions(module: torch.nn.Module) -> int:
        return sum(isinstance(part, AttentionBlock) for part in module.modules())

    module = cls(5, **SMALL, attention=False)
    assert attentions(cls(5, **SMALL)) > 0
    assert attentions(module) == 0
    # all else has the same names
    assert shapes(module).items() <= shapes(cls(5, **SMALL)).items()


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
def test_deepcopy_computes_the_same(cls):
    module = cls(5, **SMALL)
    x = torch.randn((1, 3, 4, 4) if cls is CNNEncoder else (1, 2, 2, 5))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_every_parameter_learns():
    encoder, decoder = CNNEncoder(5, **SMALL), CNNDecoder(5, **SMALL)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    decoder(encoder(images)).square().mean().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    for module in (encoder, decoder):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        assert module.conv_in.weight.grad.abs().sum() > 0


def test_last_layer_is_the_last_convolution():
    decoder = CNNDecoder(5, **SMALL, patch=2)
    assert decoder.last_layer is decoder.conv_out.weight
    assert decoder.last_layer.shape == (12, 8, 3, 3)


def test_zero_output():
    images, tokens = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 2, 5)
    for module, x in ((CNNEncoder(5, **SMALL), images), (CNNDecoder(5, **SMALL), tokens)):
        assert module(x).abs().max() > 0
        assert module.zero_output_() is module
        output = module(x)
        assert torch.equal(output, torch.zeros_like(output))
        # the first step moves the last convolution, so the others learn from the second on
        (output - 1).square().mean().backward()
        last = module.quant_conv if isinstance(module, CNNEncoder) else module.last_layer
        weight = last.weight if isinstance(last, torch.nn.Conv2d) else last
        assert weight.grad.abs().sum() > 0


def test_attention_is_softmax_over_positions():
    block = AttentionBlock(6)
    x = torch.randn(2, 6, 3, 5)
    h = block.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (block.q, block.k, block.v))
    weights = torch.einsum("bci,bcj->bij", q, k).div(6**0.5).softmax(-1)
    attended = torch.einsum("bij,bcj->bci", weights, v).unflatten(2, (3, 5))
    torch.testing.assert_close(block(x), x + block.proj_out(attended), atol=1e-5, rtol=0)


def test_resampling_keeps_its_side_of_the_padding():
    down, up = Downsample(1), Upsample(1)
    with torch.no_grad():
        for conv in (down.conv, up.conv):
            conv.weight.zero_()
            conv.bias.zero_()
        # picks the first pixel under the kernel, which padding never touches
        down.conv.weight[0, 0, 0, 0] = 1
        up.conv.weight[0, 0, 1, 1] = 1
        x = torch.randn(1, 1, 4, 6)
        assert torch.equal(down(x), x[:, :, ::2, ::2])
        assert torch.equal(up(x), F.interpolate(x, scale_factor=2.0))


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 8), (32, 32), (37, 1), (48, 24), (64, 32), (80, 20), (512, 32)]
)
def test_norm_groups(channels, groups):
    assert norm(channels).num_groups == groups


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 6, 8, 3),
            r"CNNEncoder expects channel-first images \(b, 3, H, W\), got shape \(2, 6, 8, 3\); "
            r"move the channels with images.permute\(0, 3, 1, 2\)",
        ),
        (
            torch.zeros(3, 8, 8),
            r"CNNEncoder expects images \(b, 3, H, W\), got shape \(3, 8, 8\); add a batch axis",
        ),
        (torch.zeros(1, 4, 8, 8), r"got shape \(1, 4, 8, 8\).* another `image_channels`"),
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            r"CNNEncoder expects floating-point images in \[-1, 1\], got torch.uint8; "
            r"bytes become that with images / 127.5 - 1",
        ),
        (
            torch.zeros(1, 3, 8, 10),
            r"CNNEncoder needs a height and width that are multiples of its stride 4, "
            r"got \(8, 10\); crop or pad the images",
        ),
        (torch.zeros(1, 3, 10, 8), r"stride 4, got \(10, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"stride 4, got \(0, 8\)"),
    ],
    ids=["channel-last", "no-batch", "channels", "bytes", "width", "height", "empty"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        CNNEncoder(5, **SMALL, patch=2)(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.zeros(1, 5, 2, 2),
            r"CNNDecoder expects channel-last tokens \(b, h, w, 5\), got shape \(1, 5, 2, 2\); "
            r"move the channels last",
        ),
        (torch.zeros(1, 4, 5), r"got shape \(1, 4, 5\); .* give flat tokens their grid"),
        (torch.zeros(1, 2, 2, 6), r"got shape \(1, 2, 2, 6\); .* another `dim`"),
        (
            torch.zeros(1, 2, 2, 5, dtype=torch.int64),
            r"CNNDecoder expects floating-point tokens, got torch.int64; .* quantizer.decode",
        ),
        (torch.zeros(1, 0, 2, 5), r"CNNDecoder needs at least one token, got shape \(1, 0, 2, 5\)"),
    ],
    ids=["channel-first", "flat", "dim", "indices", "empty"],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        CNNDecoder(5, **SMALL)(tokens)


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
@pytest.mark.parametrize(
    "argument",
    ["dim", "channels", "blocks", "z_channels", "quant_kernel", "patch", "image_channels"],
)
@pytest.mark.parametrize("value", [0, -2])
def test_bad_sizes(cls, argument, value):
    message = f"{cls.__name__} needs `{argument}` to be a positive integer, got {value}"
    with pytest.raises(ValueError, match=message):
        cls(**{"dim": 5, argument: value})


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
def test_even_quant_kernel(cls):
    message = f"{cls.__name__} needs an odd `quant_kernel`, got 2: an even kernel would shift"
    with pytest.raises(ValueError, match=message):
        cls(5, quant_kernel=2)


def test_quant_kernel_is_of_the_last_and_the_first_convolution():
    encoder, decoder = (cls(5, **SMALL, quant_kernel=3) for cls in (CNNEncoder, CNNDecoder))
    assert encoder.quant_conv.weight.shape == (5, 6, 3, 3)
    assert decoder.post_quant_conv.weight.shape == (6, 5, 3, 3)
    # at the border it sees zeros
    tokens, edge = torch.zeros(1, 1, 1, 5), torch.zeros(1, 3, 3, 5)
    tokens[0, 0, 0, 0] = edge[0, 1, 1, 0] = 1
    alone, within = (decoder.post_quant_conv(t.permute(0, 3, 1, 2)) for t in (tokens, edge))
    torch.testing.assert_close(alone[0, :, 0, 0], within[0, :, 1, 1])


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
@pytest.mark.parametrize("multipliers", [(), (1, 0), (-1,)])
def test_bad_multipliers(cls, multipliers):
    message = rf"{cls.__name__} needs `multipliers` to be positive integers, one for each .* got \("
    with pytest.raises(ValueError, match=message):
        cls(5, multipliers=multipliers)
