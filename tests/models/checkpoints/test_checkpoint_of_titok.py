"""TiTok's released files: their names at full size, and what small ones compute.

The numbers are computed anew here from what its code does, in float64; no file of it was at hand.
"""

import pytest
import torch
import torch.nn.functional as F
from key_lists import listed, shapes
from naive_transformer import (
    in_float64,
    linear,
    normal,
    random_state,
    transformer,
    transformer_shapes as of_transformer,
)
from safetensors.torch import save_file

from xq.models import Tokenizer
from xq.models.checkpoints import load_checkpoint
from xq.models.checkpoints.titok import FORMAT
from xq.models.presets.transformers import titok
from xq.quantizers import VQ

BLOCKS = "transformer."
DIM, CODES, TOKENS, PATCH, SIDE = 6, 20, 5, 4, 3
# of encoder and decoder
WIDTHS, DEPTHS = {"encoder.": 128, "decoder.": 64}, {"encoder.": 2, "decoder.": 1}
PIXEL_DIM, PIXEL_CODES = 8, 10
# of the levels of the pixel decoder, full resolution first; none has groups of one channel
CHANNELS = (32, 64, 64)


def trunk_shapes():
    shapes = {
        "latent_tokens": [TOKENS, WIDTHS["encoder."]],
        "encoder.patch_embed.weight": [WIDTHS["encoder."], 3, PATCH, PATCH],
        "encoder.patch_embed.bias": [WIDTHS["encoder."]],
        "encoder.conv_out.weight": [DIM, WIDTHS["encoder."], 1, 1],
        "encoder.conv_out.bias": [DIM],
        "decoder.mask_token": [1, 1, WIDTHS["decoder."]],
        "decoder.decoder_embed.weight": [WIDTHS["decoder."], DIM],
        "decoder.decoder_embed.bias": [WIDTHS["decoder."]],
        "quantize.embedding.weight": [CODES, DIM],
    }
    for part, width in WIDTHS.items():
        shapes |= of_transformer(part, BLOCKS, width, DEPTHS[part])
        shapes |= {
            f"{part}class_embedding": [1, width],
            f"{part}positional_embedding": [1 + SIDE**2, width],
            f"{part}latent_token_positional_embedding": [TOKENS, width],
        }
    return shapes


def pixel_shapes():
    """Of those that make pixels at once."""
    return {
        "decoder.ffn.0.weight": [3 * PATCH**2, 64, 1, 1],
        "decoder.ffn.0.bias": [3 * PATCH**2],
        "decoder.conv_out.weight": [3, 3, 3, 3],
        "decoder.conv_out.bias": [3],
    }


def code_shapes():
    """Of those that predict the codes of a VQGAN."""
    shapes = {
        "decoder.ffn.0.weight": [128, 64, 1, 1],
        "decoder.ffn.0.bias": [128],
        "decoder.ffn.2.weight": [PIXEL_CODES, 128, 1, 1],
        "decoder.ffn.2.bias": [PIXEL_CODES],
        "pixel_quantize.embedding.weight": [PIXEL_CODES, PIXEL_DIM],
        "pixel_decoder.conv_in.weight": [CHANNELS[-1], PIXEL_DIM, 3, 3],
        "pixel_decoder.conv_in.bias": [CHANNELS[-1]],
        "pixel_decoder.norm_out.weight": [CHANNELS[0]],
        "pixel_decoder.norm_out.bias": [CHANNELS[0]],
        "pixel_decoder.conv_out.weight": [3, CHANNELS[0], 3, 3],
        "pixel_decoder.conv_out.bias": [3],
    }
    places = [("mid.", CHANNELS[-1], CHANNELS[-1])]
    for level, channels in enumerate(CHANNELS):
        before = CHANNELS[min(level + 1, len(CHANNELS) - 1)]
        places.append((f"up.{level}.block.", before, channels))
        if level:
            name = f"pixel_decoder.up.{level}.upsample_conv"
            shapes |= {f"{name}.weight": [channels, channels, 3, 3], f"{name}.bias": [channels]}
    for place, before, after in places:
        for k in range(2):
            first, name = (after if k else before), f"pixel_decoder.{place}{k}."
            shapes |= {
                f"{name}norm1.weight": [first],
                f"{name}norm1.bias": [first],
                f"{name}conv1.weight": [after, first, 3, 3],
                f"{name}norm2.weight": [after],
                f"{name}norm2.bias": [after],
                f"{name}conv2.weight": [after, after, 3, 3],
            }
            if first != after:
                shapes[f"{name}nin_shortcut.weight"] = [after, after, 1, 1]
    return shapes


@pytest.fixture(params=["codes", "pixels"])
def state(request):
    head = code_shapes() if request.param == "codes" else pixel_shapes()
    state = random_state(trunk_shapes() | head)
    # so that tokens tell images apart
    state["encoder.patch_embed.weight"] *= 4
    return state


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def their_indices(images, state):
    """From images in [0, 1]."""
    patches = images.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
    patches = torch.einsum("bcipjq->bijcpq", patches).reshape(-1, SIDE**2, 3 * PATCH**2)
    x = linear(patches, state, "encoder.patch_embed")
    first = state["encoder.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["encoder.positional_embedding"]
    latents = state["latent_tokens"] + state["encoder.latent_token_positional_embedding"]
    x = torch.cat([x, latents.expand(len(x), -1, -1)], 1)
    x = transformer(x, state, "encoder.", BLOCKS, DEPTHS["encoder."], 2)
    x = normal(x[:, -TOKENS:], state, "encoder.ln_post")
    codes = state["quantize.embedding.weight"]
    if "decoder.ffn.2.weight" in state:
        # without a transposition
        columns = x.reshape(len(x), WIDTHS["encoder."], TOKENS)
        x = torch.stack([columns[..., token] for token in range(TOKENS)], 1)
        x, codes = unit(linear(x, state, "encoder.conv_out")), unit(codes)
    else:
        x = linear(x, state, "encoder.conv_out")
    return (x[:, :, None] - codes).square().sum(-1).argmin(-1)


def their_images(indices, state):
    """In [0, 1]."""
    predicts_codes = "decoder.ffn.2.weight" in state
    codes = state["quantize.embedding.weight"]
    x = linear((unit(codes) if predicts_codes else codes)[indices], state, "decoder.decoder_embed")
    x = x + state["decoder.latent_token_positional_embedding"]
    masks = [state["decoder.class_embedding"][None]] + [state["decoder.mask_token"]] * SIDE**2
    masks = torch.cat(masks, 1) + state["decoder.positional_embedding"]
    x = torch.cat([masks.expand(len(x), -1, -1), x], 1)
    x = transformer(x, state, "decoder.", BLOCKS, DEPTHS["decoder."], 1)
    x = normal(x[:, 1 : 1 + SIDE**2], state, "decoder.ln_post")
    x = linear(x, state, "decoder.ffn.0")
    if not predicts_codes:
        x = x.reshape(-1, SIDE, SIDE, PATCH, PATCH, 3)
        x = torch.einsum("bijpqc->bcipjq", x).flatten(4, 5).flatten(2, 3)
        return convolved(x, state, "decoder.conv_out")
    x = linear(x.tanh(), state, "decoder.ffn.2")
    weights = x.exp() / x.exp().sum(-1, keepdim=True)
    x = torch.einsum("bnk,kc->bcn", weights, state["pixel_quantize.embedding.weight"])
    return pixel_decoder(x.unflatten(2, (SIDE, SIDE)), state)


def pixel_decoder(x, state):
    x = convolved(x, state, "pixel_decoder.conv_in")
    for k in range(2):
        x = residual(x, state, f"pixel_decoder.mid.{k}")
    for level in reversed(range(len(CHANNELS))):
        for k in range(2):
            x = residual(x, state, f"pixel_decoder.up.{level}.block.{k}")
        if level:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = convolved(x, state, f"pixel_decoder.up.{level}.upsample_conv")
    x = grouped_swish(x, state, "pixel_decoder.norm_out")
    return convolved(x, state, "pixel_decoder.conv_out")


def residual(x, state, name):
    h = convolved(grouped_swish(x, state, f"{name}.norm1"), state, f"{name}.conv1")
    h = convolved(grouped_swish(h, state, f"{name}.norm2"), state, f"{name}.conv2")
    shortcut = state.get(f"{name}.nin_shortcut.weight")
    # of the result, not of the input
    return h + (x if shortcut is None else torch.einsum("bchw,dc->bdhw", h, shortcut.flatten(1)))


def grouped_swish(x, state, name):
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    x = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).view_as(x)
    x = x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]
    return x / (1 + (-x).exp())


def convolved(x, state, name):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=1)


@torch.no_grad()
def test_tokens_and_images_are_theirs(state):
    tokenizer = FORMAT.read(state)
    # of different colours, since tokens see means
    images = torch.rand(8, 3, SIDE * PATCH, SIDE * PATCH) * torch.rand(8, 3, 1, 1)
    exact = in_float64(state)
    expected = their_indices(images.double(), exact)
    assert len(expected.unique(dim=0)) > 4
    indices = tokenizer.encode(2 * images - 1)
    assert torch.equal(indices, expected)
    wanted = 2 * their_images(expected, exact) - 1
    torch.testing.assert_close(tokenizer.decode(indices).double(), wanted, atol=1e-4, rtol=0)
    exact_images = tokenizer.double()(2 * images.double() - 1).image
    torch.testing.assert_close(exact_images, wanted, atol=1e-6, rtol=0)


def test_what_the_small_file_is(state):
    tokenizer, predicts_codes = FORMAT.read(state), "decoder.ffn.2.weight" in state
    assert not tokenizer.training
    assert tokenizer.quantizer.config() == VQ(DIM, CODES, normalize=predicts_codes).config()
    sizes = {"dim": DIM, "image_size": 12, "patch_size": 4, "tokens": TOKENS}
    sizes |= {"checkpointing": False, "image_channels": 3}
    encoder = {"width": 128, "depth": 2, "heads": 2, "mixed": predicts_codes}
    assert tokenizer.encoder.config() == sizes | encoder
    config = tokenizer.decoder.config()
    vqgan = config.pop("vqgan")
    assert config == sizes | {"width": 64, "depth": 1, "heads": 1}
    if predicts_codes:
        assert (vqgan.dim, vqgan.codebook_size) == (PIXEL_DIM, PIXEL_CODES)
        assert (vqgan.channels, vqgan.multipliers, vqgan.blocks) == (32, (1, 2, 2), 2)
    else:
        assert vqgan is None


def test_there_and_back(state):
    back = FORMAT.table(state).revert(FORMAT.read(state).state_dict())
    assert back.keys() == state.keys()
    for key, tensor in back.items():
        assert torch.equal(tensor, state[key]), key


def test_averages_of_clustering_are_left_out(state):
    averages = {"quantize.embed_prob": torch.zeros(CODES)}
    assert FORMAT.read(state | averages).config() == FORMAT.read(state).config()


@pytest.mark.parametrize("name", ["l32", "b64", "s128", "bl64_vq8k"])
def test_released_file_there_and_back(name):
    state = listed("titok")[name]
    assert FORMAT.recognise(state)
    tokenizer = FORMAT.read(state)
    with torch.device("meta"):
        preset = titok(name)
    assert preset.config() == tokenizer.config()
    assert shapes(FORMAT.table(state).revert(tokenizer.state_dict())) == shapes(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize.embedding.weight": None}, r"no quantize.embedding.weight: .* continuous tok"),
        ({"pixel_quantize.embedding.weight": None}, r"no pixel_decoder, so .* the first stage"),
        ({"encoder.positional_embedding": [9, 128]}, r"has 8 patches, which are no square, .*into"),
        ({"decoder.text_guidance_proj.weight": [8, 4]}, r"no place for 1 tensors \(decoder.text_g"),
        ({"encoder.conv_out.bias": None}, r"lacks 1 \(encoder.to_tokens.bias"),
        ({"encoder.patch_embed.weight": None}, r"there is no tensor 'encoder.patch_embed.weight'"),
        ({"decoder.decoder_embed.weight": [64, 7]}, r"decoder.from_tokens.weight .* \(64, 7\)"),
    ],
    ids=["continuous", "first-stage", "oblong", "text", "missing", "size-missing", "shape"],
)
def test_other_files_are_refused(change, message):
    state = random_state(trunk_shapes() | code_shapes())
    for key, shape in change.items():
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        FORMAT.read(state)


def test_recognises_its_own():
    state = listed("titok")["l32"]
    for key in ("latent_tokens", "decoder.mask_token"):
        assert not FORMAT.recognise({k: t for k, t in state.items() if k != key})


@torch.no_grad()
def test_from_a_file_to_a_folder(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    tokenizer = load_checkpoint(tmp_path / "model.safetensors")
    tokenizer.save_pretrained(tmp_path / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "folder")
    images = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH)
    assert torch.equal(again.encode(images), FORMAT.read(state).encode(images))
    assert torch.equal(again(images).image, tokenizer(images).image)
