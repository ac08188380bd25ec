"""BSQ-ViT's released files: their names at full size, and what a small one computes.

The numbers are computed anew here from what its code does, in float64; no file of it was at hand.
"""

import pytest
import torch
from key_lists import listed, shapes
from naive_transformer import (
    in_float64,
    linear,
    normal,
    random_state,
    transformer,
    transformer_shapes as of_transformer,
)

from xq.models import PatchDecoder, PatchEncoder, Tokenizer
from xq.models.checkpoints import load_checkpoint
from xq.models.checkpoints.bsq_vit import FORMAT
from xq.models.presets.transformers import bsq_vit
from xq.quantizers import BSQ

BLOCKS = "transformer.resblocks."
BITS, PATCH, SIDE = 6, 4, 3
WIDTH, DEPTH, HEADS = 128, 2, 2
DROPPED = {"quantize.basis", "quantize.group_basis"}


def small_shapes():
    numbers = 3 * PATCH**2
    return {
        **of_transformer("encoder.", BLOCKS, WIDTH, DEPTH),
        **of_transformer("decoder.", BLOCKS, WIDTH, DEPTH),
        "encoder.positional_embedding": [SIDE**2, WIDTH],
        "encoder.conv1.weight": [WIDTH, numbers],
        "decoder.positional_embedding": [SIDE**2, WIDTH],
        "decoder.ffn.0.weight": [4 * WIDTH, WIDTH],
        "decoder.ffn.0.bias": [4 * WIDTH],
        "decoder.conv_out.weight": [numbers, 4 * WIDTH],
        "decoder.conv_out.bias": [numbers],
        "quant_embed.weight": [BITS, WIDTH],
        "quant_embed.bias": [BITS],
        "post_quant_embed.weight": [WIDTH, BITS],
        "post_quant_embed.bias": [WIDTH],
    }


@pytest.fixture
def state():
    basis = {
        "quantize.basis": 2 ** torch.arange(BITS - 1, -1, -1),
        "quantize.group_basis": 2 ** torch.arange(1, -1, -1),
    }
    return random_state(small_shapes()) | basis


def their_indices(images, state):
    patches = images.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
    patches = torch.einsum("bcipjq->bijcpq", patches).reshape(-1, SIDE**2, 3 * PATCH**2)
    x = patches @ state["encoder.conv1.weight"].T + state["encoder.positional_embedding"]
    x = transformer(x, state, "encoder.", BLOCKS, DEPTH, HEADS)
    x = linear(normal(x, state, "encoder.ln_post"), state, "quant_embed")
    # the first channel is the highest bit
    return ((x > 0).long() * state["quantize.basis"].long()).sum(-1)


def their_images(indices, state):
    bits = (indices[..., None] // state["quantize.basis"].long()) % 2
    x = linear((2.0 * bits - 1).double() / BITS**0.5, state, "post_quant_embed")
    x = x + state["decoder.positional_embedding"]
    x = transformer(x, state, "decoder.", BLOCKS, DEPTH, HEADS)
    x = linear(normal(x, state, "decoder.ln_post"), state, "decoder.ffn.0").tanh()
    x = linear(x, state, "decoder.conv_out").unflatten(-1, (3, PATCH, PATCH))
    x = torch.einsum("bijcpq->bcipjq", x.unflatten(1, (SIDE, SIDE)))
    return x.flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def test_tokens_and_images_are_theirs(state):
    tokenizer = FORMAT.read(state)
    images = torch.rand(3, 3, SIDE * PATCH, SIDE * PATCH) * 2 - 1
    exact = in_float64(state)
    expected = their_indices(images.double(), exact)
    assert len(expected.unique()) > 10
    indices = tokenizer.encode(images)
    assert torch.equal(indices.flatten(1), expected)
    wanted = their_images(expected, exact)
    torch.testing.assert_close(tokenizer.decode(indices).double(), wanted, atol=1e-4, rtol=0)
    reconstruction = tokenizer(images)
    assert torch.equal(reconstruction.quantized.indices, indices)
    assert torch.equal(reconstruction.image, tokenizer.decode(indices))
    exact_images = tokenizer.double()(images.double()).image
    torch.testing.assert_close(exact_images, wanted, atol=1e-7, rtol=0)


def test_what_the_small_file_is(state):
    tokenizer = FORMAT.read(state)
    assert not tokenizer.training
    quantizer = tokenizer.quantizer
    assert quantizer.config() == BSQ(BITS, group_size=2).config()
    assert tokenizer.encoder.config() == {
        "dim": BITS,
        "image_size": 12,
        "patch_size": 4,
        "width": 128,
        "depth": 2,
        "heads": 2,
        "feedforward": False,
        "checkpointing": False,
        "image_channels": 3,
    }


def test_there_and_back(state):
    back = FORMAT.table(state).revert(FORMAT.read(state).state_dict())
    assert back.keys() == state.keys() - DROPPED
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key


def test_encoder_and_decoder_of_two_sizes(state):
    wide = of_transformer("decoder.", BLOCKS, 64, 1)
    wide |= {
        "decoder.positional_embedding": [SIDE**2, 64],
        "decoder.ffn.0.weight": [256, 64],
        "decoder.ffn.0.bias": [256],
        "decoder.conv_out.weight": [3 * PATCH**2, 256],
        "post_quant_embed.weight": [64, BITS],
        "post_quant_embed.bias": [64],
    }
    state = {key: t for key, t in state.items() if not key.startswith(f"decoder.{BLOCKS}")}
    tokenizer = FORMAT.read(state | random_state(wide))
    assert (tokenizer.encoder.depth, tokenizer.decoder.depth) == (2, 1)
    assert (tokenizer.decoder.width, tokenizer.decoder.heads) == (64, 1)


@pytest.mark.parametrize("group", [1, 9])
def test_released_file_there_and_back(group):
    state = listed("bsq_vit")["b18g18"]
    state["quantize.group_basis"] = torch.empty(group, device="meta", dtype=torch.int64)
    assert FORMAT.recognise(state)
    tokenizer = FORMAT.read(state)
    with torch.device("meta"):
        preset = bsq_vit()
    preset.quantizer.group_size = group
    assert tokenizer.config() == preset.config()
    back = shapes(FORMAT.table(state).revert(tokenizer.state_dict()))
    assert back == {key: shape for key, shape in shapes(state).items() if key not in DROPPED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_out.weight": [96, 512]}, r"sees 48 numbers a patch and predicts 96; .*Lap"),
        ({"encoder.positional_embedding": [8, 128]}, r"has 8 patches, which are no square"),
        (
            {"encoder.temporal_positional_embedding": [4, 128]},
            r"no place for 1 tensors .*encoder.temporal",
        ),
        ({"encoder.positional_embedding": [9, 100]}, r"2 blocks of width 100; .* 64 channels"),
        ({"encoder.conv1.weight": None}, r"BSQ-ViT .*there is no tensor 'encoder.conv1.weight'"),
        ({"decoder.ffn.0.bias": None}, r"lacks 1 .*decoder.feedforward.0.bias"),
    ],
    ids=["laplace", "oblong", "video", "width", "size-missing", "missing"],
)
def test_other_files_are_refused(state, change, message):
    for key, shape in change.items():
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        FORMAT.read(state)


def test_recognises_its_own():
    state = listed("bsq_vit")["b18g18"]
    for key in ("quantize.group_basis", "quant_embed.weight", "post_quant_embed.weight"):
        assert not FORMAT.recognise({k: t for k, t in state.items() if k != key})


def test_a_file_with_averages(state, tmp_path):
    averages = {key: t + 1 if t.is_floating_point() else t for key, t in state.items()}
    content = {
        "iter": 3,
        "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
        "ema_state_dict": {f"module.module.{key}": tensor for key, tensor in averages.items()},
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    averaged = load_checkpoint(tmp_path / "checkpoint.pt").state_dict()
    plain = load_checkpoint(tmp_path / "checkpoint.pt", weights="model").state_dict()
    for key, tensor in FORMAT.read(averages).state_dict().items():
        assert torch.equal(averaged[key], tensor)
    for key, tensor in FORMAT.read(state).state_dict().items():
        assert torch.equal(plain[key], tensor)


def test_oblong_images_into_a_module(state):
    state["encoder.positional_embedding"] = torch.randn(8, WIDTH)
    state["decoder.positional_embedding"] = torch.randn(8, WIDTH)
    sizes = {"image_size": (8, 16), "patch_size": 4, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
    encoder, decoder = PatchEncoder(BITS, **sizes), PatchDecoder(BITS, **sizes)
    tokenizer = FORMAT.read(state, Tokenizer(encoder, BSQ(BITS), decoder))
    assert tokenizer.encode(torch.rand(1, 3, 8, 16)).shape == (1, 2, 4)
    assert torch.equal(encoder.positions, state["encoder.positional_embedding"])
