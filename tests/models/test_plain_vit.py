import copy
import io
import json

import pytest
import torch
from torch import nn

from xq.config import build, describe
from xq.models import PatchDecoder, PatchEncoder, Tokenizer
from xq.models.transformer import Transformer, TransformerBlock
from xq.quantizers import VQ

SMALL = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 3}
BOTH = pytest.mark.parametrize("cls", [PatchEncoder, PatchDecoder])


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def input_of(module, batch=2):
    if isinstance(module, PatchEncoder):
        return torch.randn(batch, module.image_channels, *module.image_size)
    return torch.randn(batch, *module.grid, module.dim)


@pytest.mark.parametrize(
    ("sizes", "image", "grid"),
    [
        pytest.param({}, (2, 3, 8, 8), (2, 2), id="B2-8x8"),
        pytest.param({"image_size": (8, 12)}, (1, 3, 8, 12), (2, 3), id="8x12"),
        pytest.param(
            {"image_size": (6, 10), "patch_size": (3, 2)}, (3, 3, 6, 10), (2, 5), id="patch3x2"
        ),
        pytest.param({"patch_size": 1, "image_size": (1, 2)}, (1, 3, 1, 2), (1, 2), id="pixels"),
        pytest.param({"image_channels": 1, "depth": 1}, (2, 1, 8, 8), (2, 2), id="grey-1-block"),
        pytest.param({"heads": 1}, (1, 3, 8, 8), (2, 2), id="1-head"),
        pytest.param({}, (0, 3, 8, 8), (2, 2), id="empty"),
    ],
)
@pytest.mark.parametrize("feedforward", [False, True])
def test_shapes(sizes, image, grid, feedforward):
    encoder = PatchEncoder(5, **SMALL | sizes, feedforward=feedforward)
    decoder = PatchDecoder(5, **SMALL | sizes)
    tokens = encoder(torch.randn(image))
    assert tokens.shape == (image[0], *grid, 5)
    assert decoder(tokens).shape == image


def test_a_block_is_that_of_pytorch():
    block = TransformerBlock(12, 3).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    pairs = {
        "norm1": theirs.norm1,
        "projection": theirs.self_attn.out_proj,
        "norm2": theirs.norm2,
        "expand": theirs.linear1,
        "contract": theirs.linear2,
    }
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        for name, module in pairs.items():
            getattr(block, name).load_state_dict(module.state_dict())
        block.qkv.weight.copy_(theirs.self_attn.in_proj_weight)
        block.qkv.bias.copy_(theirs.self_attn.in_proj_bias)
    x, y = (torch.randn(2, 7, 12, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    ours, want = block(x), theirs(y)
    torch.testing.assert_close(ours, want, atol=1e-11, rtol=1e-11)
    ours.sin().sum().backward()
    want.sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def silence(transformer):
    """Blocks that add nothing, so that no token sees another."""
    for block in transformer.blocks:
        for part in (block.projection, block.contract):
            part.weight.zero_()
            part.bias.zero_()


@pytest.mark.parametrize("patch", [(2, 2), (2, 3)])
def test_a_token_stands_where_its_patch_is(patch):
    sizes = SMALL | {"image_size": (4 * patch[0], 3 * patch[1]), "patch_size": patch}
    encoder, decoder = PatchEncoder(5, **sizes), PatchDecoder(5, **sizes)
    for module in (encoder, decoder):
        silence(module.transformer)
    images, tokens = input_of(encoder, 1), input_of(decoder, 1)
    for i in range(4):
        for j in range(3):
            rows = slice(i * patch[0], (i + 1) * patch[0])
            columns = slice(j * patch[1], (j + 1) * patch[1])
            changed = images.clone()
            changed[..., rows, columns] += 1
            moved = (encoder(changed) != encoder(images)).any(-1)[0]
            assert moved.nonzero().tolist() == [[i, j]]
            changed = tokens.clone()
            changed[:, i, j] += 1
            moved = (decoder(changed) != decoder(tokens))[0].any(0)
            assert moved[rows, columns].all()
            assert moved.sum() == patch[0] * patch[1]


def test_a_patch_is_read_channel_by_channel():
    encoder = PatchEncoder(5, **SMALL | {"image_size": (4, 4)})
    silence(encoder.transformer)
    images = torch.randn(1, 3, 4, 4)
    x = images.reshape(1, 48) @ encoder.patches.weight.T + encoder.positions
    body = encoder.transformer
    expected = encoder.to_tokens(body.norm_out(body.norm_in(x)))
    torch.testing.assert_close(encoder(images)[:, 0, 0], expected, atol=1e-6, rtol=0)


def test_feedforward_is_two_layers_with_a_tanh():
    plain = PatchEncoder(5, **SMALL)
    deep = PatchEncoder(5, **SMALL, feedforward=True)
    deep.load_state_dict(plain.state_dict(), strict=False)
    features = []
    hook = deep.transformer.register_forward_hook(lambda *args: features.append(args[-1]))
    images = input_of(plain)
    tokens = deep(images)
    hook.remove()
    first, _, second = deep.feedforward
    hidden = (features[0] @ first.weight.T + first.bias).tanh()
    assert hidden.shape[-1] == 48
    expected = (hidden @ second.weight.T + second.bias) @ deep.to_tokens.weight.T
    torch.testing.assert_close(tokens.flatten(1, 2), expected + deep.to_tokens.bias)


@BOTH
@pytest.mark.parametrize("extra", [{}, {"image_size": [8, 12], "checkpointing": True}])
def test_config_round_trip(cls, extra):
    module = cls(5, **SMALL | extra)
    again = cls(**json.loads(json.dumps(module.config())))
    assert again.config() == module.config()
    assert shapes(again) == shapes(module)
    assert build(describe(module)).config() == module.config()


def test_config_keeps_the_feedforward():
    encoder = PatchEncoder(5, **SMALL, feedforward=True)
    assert shapes(build(describe(encoder))) == shapes(encoder)


@BOTH
def test_copies_compute_the_same(cls):
    module = cls(5, **SMALL)
    x = input_of(module)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with torch.device("meta"):
        empty = cls(5, **SMALL)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_learns(checkpointing):
    encoder = PatchEncoder(5, **SMALL, feedforward=True, checkpointing=checkpointing)
    decoder = PatchDecoder(5, **SMALL, checkpointing=checkpointing)
    decoder(encoder(input_of(encoder))).square().mean().backward()
    for module in (encoder, decoder):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().sum() > 0, key
    assert decoder.last_layer is decoder.pixels.weight


def test_checkpointing_changes_memory_alone():
    plain = PatchEncoder(5, **SMALL)
    frugal = PatchEncoder(5, **SMALL, checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    images = input_of(plain)
    kept = []
    for module in (plain, frugal):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module(images).square().sum()
        kept.append(count)
        loss.backward()
    assert kept[1] < kept[0] / 2
    for one, two in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_bfloat16():
    encoder = PatchEncoder(5, **SMALL).bfloat16()
    images = input_of(encoder).bfloat16()
    assert encoder(images).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PatchDecoder(5, **SMALL)(torch.randn(1, 2, 2, 5)).isfinite().all()


def test_in_a_tokenizer():
    sizes = SMALL | {"image_size": (8, 12)}
    tokenizer = Tokenizer(PatchEncoder(5, **sizes), VQ(5, 7), PatchDecoder(5, **sizes)).eval()
    images = torch.randn(2, 3, 8, 12)
    indices = tokenizer.encode(images)
    assert indices.shape == (2, 2, 3)
    assert torch.equal(tokenizer.decode(indices), tokenizer(images).image)


def test_starts_near_the_usual_deviation():
    encoder = PatchEncoder(5, **SMALL | {"width": 96})
    for part in (
        encoder.positions,
        encoder.patches.weight,
        encoder.transformer.blocks[0].qkv.weight,
    ):
        assert 0.017 < part.std() < 0.023
    assert not encoder.transformer.blocks[0].qkv.bias.any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 8, 8),
            r"PatchEncoder is built for images of \(8, 12\), got \(8, 8\); resize or crop them, "
            r"or build it with image_size=\(8, 8\)",
        ),
        (torch.zeros(1, 8, 12, 3), r"PatchEncoder expects channel-first images .*permute"),
        (torch.zeros(3, 8, 12), r"PatchEncoder expects images .* images\[None\]"),
        (torch.zeros(1, 3, 8, 12).byte(), r"PatchEncoder expects floating-point .* torch.uint8"),
    ],
    ids=["size", "channel-last", "no-batch", "bytes"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        PatchEncoder(5, **SMALL | {"image_size": (8, 12)})(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.zeros(1, 3, 2, 5),
            r"PatchDecoder is built for images of \(8, 12\), a grid of \(2, 3\) tokens, got "
            r"\(3, 2\); build it with image_size=\(12, 8\)",
        ),
        (torch.zeros(1, 5, 2, 3), r"PatchDecoder expects channel-last tokens \(b, h, w, 5\)"),
        (torch.zeros(1, 6, 5), r"got shape \(1, 6, 5\); .* give flat tokens their grid"),
        (torch.zeros(1, 2, 3, 5).long(), r"PatchDecoder expects floating-point tokens"),
        (torch.zeros(1, 0, 3, 5), r"PatchDecoder needs at least one token"),
    ],
    ids=["grid", "channel-first", "flat", "indices", "empty"],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        PatchDecoder(5, **SMALL | {"image_size": (8, 12)})(tokens)


@BOTH
@pytest.mark.parametrize("argument", ["dim", "width", "depth", "heads", "image_channels"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_bad_numbers(cls, argument, value):
    message = f"{cls.__name__} needs `{argument}` to be a positive integer, got {value}"
    with pytest.raises(ValueError, match=message):
        cls(**{"dim": 5, **SMALL, argument: value})


@BOTH
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, r"needs `heads` to divide the width 12, got 5; 64 channels a head"),
        ({"image_size": 0}, r"needs `image_size` to be a positive integer or two of them.* got 0"),
        ({"image_size": (8, 8, 8)}, r"needs `image_size` .* got \(8, 8, 8\)"),
        ({"patch_size": (4, -4)}, r"needs `patch_size` .* got \(4, -4\)"),
        (
            {"image_size": (9, 13)},
            r"an image_size that is a multiple of the patch_size \(4, 4\), got \(9, 13\); "
            r"\(8, 12\) is one",
        ),
        ({"image_size": 3}, r"got \(3, 3\); \(4, 4\) is one"),
    ],
)
def test_bad_sizes(cls, sizes, message):
    with pytest.raises(ValueError, match=f"{cls.__name__} .*{message}"):
        cls(5, **SMALL | sizes)


def test_a_transformer_alone_checks_its_sizes():
    with pytest.raises(ValueError, match="Transformer needs `heads` to divide the width 12, got 5"):
        Transformer(12, 1, 5)


@pytest.mark.compile
@pytest.mark.parametrize(("cls", "checkpointing"), [(PatchEncoder, True), (PatchDecoder, False)])
def test_one_graph(cls, checkpointing):
    torch._dynamo.reset()
    sizes = SMALL | {"image_size": (8, 12), "depth": 1}
    module = cls(5, **sizes, checkpointing=checkpointing)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = input_of(module)
    torch.testing.assert_close(compiled(x), module(x))
    want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.compile
@BOTH
def test_export_with_any_batch(cls):
    module = cls(5, **SMALL | {"image_size": (8, 12), "depth": 1}).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (input_of(module),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 3):
        x = input_of(module, size)
        torch.testing.assert_close(loaded(x), module(x))
