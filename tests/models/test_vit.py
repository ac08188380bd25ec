import copy
import json
import sys
from functools import partial

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from xq.config import build, describe
from xq.losses import Features, Teacher, TimmTeacher
from xq.models import Tokenizer, ViTDecoder, ViTEncoder
from xq.quantizers import VQ, EMACodebook, ProductQuantizer

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL = {"image_size": 16, "patch_size": 4, "tokens": 2, "options": TINY}
BACKBONES = {
    "dinov2": {},
    "dinov2-registers": {"backbone": "vit_small_patch14_reg4_dinov2"},
    "dinov2-giant": {"backbone": "vit_giant_patch14_dinov2", "options": TINY | {"mlp_ratio": 4}},
    "clip": {"backbone": "vit_base_patch16_clip_224.openai"},
    "plain": {"backbone": "vit_large_patch16_224"},
    "no-class-position": {"backbone": "deit3_base_patch16_224"},
    "no-class-token": {"backbone": "vit_base_patch16_siglip_256"},
    "of-any-size-in-timm": {"backbone": "test_vit", "options": {"depth": 2}},
    "class-token-taken-away": {"options": TINY | {"class_token": False}},
    "pooled-mean": {"backbone": "vit_small_patch16_36x1_224", "options": TINY | {"fc_norm": True}},
}


def images(*shape) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 16, 16)))


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def lively(module):
    """Without the tiny starts, so that everything has an effect."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return module


@pytest.mark.parametrize(
    ("sizes", "image", "grid"),
    [
        pytest.param({}, (2, 3, 16, 16), (2, 2), id="small"),
        pytest.param({"image_size": (8, 20)}, (1, 3, 8, 20), (2, 2), id="wide-image"),
        pytest.param({"tokens": (3, 1)}, (3, 3, 16, 16), (3, 1), id="tall-grid"),
        pytest.param({"patch_size": (8, 2)}, (1, 3, 16, 16), (2, 2), id="oblong-patches"),
        pytest.param({"tokens": 5}, (1, 3, 16, 16), (5, 5), id="more-tokens-than-patches"),
        pytest.param({"image_channels": 1}, (2, 1, 16, 16), (2, 2), id="grey"),
        pytest.param({"tokens": [1, 2], "image_size": [12, 16]}, (1, 3, 12, 16), (1, 2), id="json"),
    ],
)
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("head", ["linear", "conv"])
def test_shapes(sizes, image, grid, branches, head):
    encoder = ViTEncoder(6, branches=branches, **SMALL | sizes)
    decoder = ViTDecoder(6, head=head, **SMALL | sizes)
    tokens = encoder(images(*image))
    assert tokens.shape == (image[0], *grid, 6)
    assert decoder(tokens).shape == image


def test_empty_batch():
    encoder, decoder = ViTEncoder(6, **SMALL), ViTDecoder(6, **SMALL)
    assert decoder(encoder(images(0, 3, 16, 16))).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("tokens", "branches", "dim", "encoder_size"),
    [(16, 1, 64, 86_061_312), (16, 2, 64, 86_258_688), (11, 2, 64, 86_051_328)],
    ids=["VQ-4096", "VP2-4096", "MSVR10P2-4096"],
)
def test_the_published_sizes(tokens, branches, dim, encoder_size):
    with torch.device("meta"):
        encoder = ViTEncoder(dim, tokens=tokens, branches=branches)
        decoder = ViTDecoder(dim, tokens=tokens)
    assert parameters(encoder) - parameters(encoder.quant_conv) == encoder_size
    assert parameters(decoder) - parameters(decoder.post_quant_conv) == 85_865_472
    assert parameters(encoder.quant_conv) == 769 * dim // branches
    assert not [key for key in decoder.state_dict() if "patch_embed" in key]


def reference_tokens(encoder, image):
    """The queries' features, with timm's own embedding of the image."""
    backbone, (h, w) = encoder.backbone, encoder.tokens
    seen = backbone._pos_embed(backbone.patch_embed(image)) + encoder.lvl_embed.weight[0]
    grid = backbone.patch_embed.grid_size
    prefix = backbone.pos_embed.shape[1] - grid[0] * grid[1]
    positions = resample_abs_pos_embed(
        backbone.pos_embed[:, prefix:], [h, w], list(grid), num_prefix_tokens=0
    )
    parts = [seen]
    for p in range(encoder.branches):
        queries = encoder.latent_tokens[:, p * h * w : (p + 1) * h * w]
        queries = queries + positions + encoder.lvl_embed.weight[1 + p]
        parts.append(queries.repeat(len(image), 1, 1))
    x = backbone.norm(backbone.blocks(backbone.norm_pre(torch.cat(parts, 1))))
    return x[:, seen.shape[1] :]


def reference_image(decoder, tokens):
    """By patch, with timm's own embedding of the masked image."""
    backbone, (h, w), (p, q) = decoder.backbone, decoder.grid, decoder.patch_size
    masks = backbone._pos_embed(decoder.mask_token.repeat(len(tokens), h * w, 1))
    first = masks.shape[1] - h * w
    x = decoder.post_quant_conv(tokens).flatten(1, 2)
    positions = backbone.pos_embed
    prefix = positions.shape[1] - h * w
    before = masks[:, :first]
    grid = resample_abs_pos_embed(
        positions[:, prefix:], list(decoder.tokens), [h, w], num_prefix_tokens=0
    )
    x = torch.cat([before, x + grid], 1)
    levels = decoder.lvl_embed.weight
    x = backbone.norm_pre(torch.cat([masks + levels[0], x + levels[1]], 1))
    x = backbone.norm(backbone.blocks(x))[:, first : first + h * w]
    image = tokens.new_zeros(len(tokens), decoder.image_channels, h * p, w * q)
    for i in range(h):
        for j in range(w):
            patch = decoder.to_pixel(x[:, i * w + j]).unflatten(-1, (p, q, -1))
            image[:, :, i * p : (i + 1) * p, j * q : (j + 1) * q] = patch.movedim(-1, 1)
    return image


@pytest.mark.parametrize("name", BACKBONES)
def test_against_a_reference_with_gradients(name):
    sizes = SMALL | {"image_size": (16, 12), "patch_size": (4, 3), "tokens": (3, 2)}
    sizes |= BACKBONES[name]
    encoder, decoder = ViTEncoder(6, branches=2, **sizes), ViTDecoder(6, **sizes)
    lively(encoder), lively(decoder)
    assert isinstance(encoder.backbone.norm, nn.LayerNorm)
    image = images(2, 3, 16, 12)
    features = reference_tokens(encoder, image)
    expected = encoder.quant_conv(features).unflatten(1, (2, 3, 2))
    expected = torch.cat(expected.unbind(1), dim=-1)
    found = encoder(image)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(encoder, found, expected)
    tokens = torch.randn(2, 3, 2, 6)
    found, expected = decoder(tokens), reference_image(decoder, tokens)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(decoder, found, expected)


def assert_same_gradients(module, found, expected):
    """And every parameter has one."""
    weight = torch.randn_like(found)
    names, wanted = zip(*module.named_parameters(), strict=True)
    mine = torch.autograd.grad((found * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert a.abs().sum() > 0, name
        largest = b.abs().max().item()
        torch.testing.assert_close(a, b, atol=1e-4 * largest, rtol=1e-4, msg=name)


def test_registers_and_class_token_stand_before_the_image():
    encoder = ViTEncoder(6, **SMALL | BACKBONES["dinov2-registers"])
    decoder = ViTDecoder(6, **SMALL | BACKBONES["dinov2-registers"])
    lengths = []
    for part in (encoder, decoder):
        part.backbone.blocks[0].register_forward_hook(lambda _, x, __: lengths.append(x[0].shape))
    decoder(encoder(images()))
    assert lengths == [(2, 5 + 16 + 4, 24), (2, 5 + 16 + 5 + 4, 24)]


def test_the_initial_values():
    sizes = {"tokens": 11, "options": {"depth": 1}}
    encoder, decoder = ViTEncoder(8, branches=2, **sizes), ViTDecoder(8, **sizes)
    for start in (encoder.latent_tokens, decoder.mask_token):
        assert 0.9e-6 < start.std().item() < 1.1e-6
    for part in (encoder, decoder):
        assert abs(part.lvl_embed.weight.std().item() / (1 / 3 / 768) ** 0.5 - 1) < 0.1


def test_the_convolutional_head_is_the_linear_one_with_a_bias_a_colour():
    linear = lively(ViTDecoder(6, **SMALL))
    conv = ViTDecoder(6, head="conv", **SMALL)
    state = linear.state_dict()
    weight = state["to_pixel.weight"].unflatten(0, (4, 4, 3))
    state["to_pixel.weight"] = weight.permute(3, 2, 0, 1)
    state["to_pixel.bias"] = torch.tensor([0.1, 0.2, 0.3])
    conv.load_state_dict(state)
    with torch.no_grad():
        linear.to_pixel.bias.copy_(torch.tensor([0.1, 0.2, 0.3]).repeat(16))
    tokens = torch.randn(2, 2, 2, 6)
    torch.testing.assert_close(conv(tokens), linear(tokens))
    assert conv.last_layer is conv.to_pixel.weight
    assert linear.last_layer is linear.to_pixel.weight


@pytest.mark.parametrize("cls", [ViTEncoder, ViTDecoder])
@pytest.mark.parametrize("name", BACKBONES)
def test_config_round_trip(cls, name):
    more = {"branches": 2} if cls is ViTEncoder else {"head": "conv"}
    sizes = SMALL | {"image_size": (16, 8), "drop_path": 0.1, "checkpointing": True}
    module = cls(6, **sizes | BACKBONES[name] | more)
    text = json.dumps(describe(module))
    again = build(json.loads(text))
    assert json.dumps(describe(again)) == text
    again.load_state_dict(module.state_dict())
    x = images(1, 3, 16, 8) if cls is ViTEncoder else torch.randn(1, 2, 2, 6)
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_saved_and_loaded(tmp_path):
    quantizer = ProductQuantizer(VQ(3, 7), P=2)
    model = Tokenizer(ViTEncoder(6, branches=2, **SMALL), quantizer, ViTDecoder(6, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    image = images()
    assert torch.equal(again(image).image, model(image).image)


def test_meta_module_takes_a_state_dict():
    full = ViTEncoder(6, **SMALL)
    with torch.device("meta"):
        empty = ViTEncoder(6, **SMALL)
    empty.load_state_dict(full.state_dict(), assign=True)
    image = images()
    assert torch.equal(empty(image), full(image))


def test_deepcopy_computes_the_same():
    for module, x in (
        (ViTEncoder(6, **SMALL), images()),
        (ViTDecoder(6, **SMALL), torch.ones(1, 2, 2, 6)),
    ):
        assert torch.equal(copy.deepcopy(module)(x), module(x))


def of_timm(name="vit_base_patch14_dinov2", **options):
    return lively(timm.create_model(name, num_classes=0, **TINY | options))


def expected_backbone(source, image_size, patch_size):
    state = source.state_dict()
    grid = source.patch_embed.grid_size
    new = [image_size // patch_size] * 2
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new, list(grid))
    kernel = state["patch_embed.proj.weight"]
    if kernel.shape[-1] != patch_size:
        state["patch_embed.proj.weight"] = resample_patch_embed(kernel, [patch_size] * 2)
    return state


def assert_backbone(part, expected):
    state = part.backbone.state_dict()
    absent = {key for key in expected if key.startswith("patch_embed.")}
    assert state.keys() == expected.keys() - (absent if isinstance(part, ViTDecoder) else set())
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize("cls", [ViTEncoder, ViTDecoder])
def test_weights_from_a_file_are_resampled(cls, tmp_path):
    path = tmp_path / "dinov2.safetensors"
    source = of_timm(img_size=42)
    save_file(source.state_dict(), path)
    part = cls(6, **SMALL | {"patch_size": 4, "image_size": 32}, weights=path)
    assert_backbone(part, expected_backbone(source, 32, 4))
    # and its own configuration does not ask for the file
    assert of_sizes(build(describe(part))) == of_sizes(part)


def of_sizes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("cls", [ViTEncoder, ViTDecoder])
@pytest.mark.parametrize("how", ["model", "teacher"])
def test_weights_of_a_timm_model(cls, how):
    source = of_timm(img_size=42)
    expected = expected_backbone(source, 32, 4)
    source = TimmTeacher(copy.deepcopy(source)) if how == "teacher" else source
    part = cls(6, **SMALL | {"image_size": 32})
    assert part.load_backbone_(source) is part
    assert_backbone(part, expected)
    assert all(p.requires_grad for p in part.parameters())


def test_weights_of_a_timm_model_that_is_not_square():
    source = of_timm(img_size=(28, 42))
    encoder = ViTEncoder(6, **SMALL | {"image_size": (28, 42), "patch_size": 14})
    encoder.load_backbone_(source)
    image = images(1, 3, 28, 42)
    # without queries, the image alone is what timm computes
    seen = source.patch_embed(image)
    assert torch.equal(encoder.backbone.patch_embed(image), seen)
    assert torch.equal(encoder.backbone.forward_features(image), source.forward_features(image))


def clip_tower(act_layer=QuickGELU):
    norm = partial(nn.LayerNorm, eps=1e-5)
    tower = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=4, width=24, layers=2, heads=2, mlp_ratio=4.0, output_dim=8,
        act_layer=act_layer, norm_layer=norm, output_tokens=True,
    )  # fmt: skip
    return lively(tower).eval()


class TowerTeacher(Teacher):
    """As `CLIPTeacher`, of a tower of any size."""

    def __init__(self, tower) -> None:
        super().__init__(tower, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def extract(self, image):
        token, patches = self.model(image)
        return Features(token, patches.unflatten(1, (4, 4)))


@torch.no_grad()
@pytest.mark.parametrize("how", ["model", "teacher"])
def test_weights_of_a_clip_of_open_clip(how):
    tower, image = clip_tower(), images()
    expected, projection = tower(image)[0], tower.proj.clone()
    encoder = ViTEncoder(6, **SMALL, backbone="vit_base_patch16_clip_quickgelu_224")
    source = TowerTeacher(tower) if how == "teacher" else tower
    encoder.load_backbone_(source)
    # the tower normalizes its class token alone, and projects it
    found = encoder.backbone.eval().forward_features(image)[:, 0] @ projection
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    decoder = ViTDecoder(6, **SMALL, backbone="vit_base_patch16_clip_quickgelu_224")
    decoder.load_backbone_(source)
    for key, value in decoder.backbone.state_dict().items():
        assert torch.equal(value, encoder.backbone.state_dict()[key]), key


def test_weights_of_another_network():
    encoder = ViTEncoder(6, **SMALL)
    before = copy.deepcopy(encoder.state_dict())
    for source, message in (
        (of_timm(img_size=42, depth=3), r"have 14 others \(blocks.2.attn.proj.bias"),
        (of_timm(img_size=42, depth=1), r"lack 14 parts \(blocks.1.attn.proj.bias"),
        (
            of_timm(img_size=42, embed_dim=16),
            "cls_token of shape .1, 1, 24., the source .1, 1, 16.",
        ),
        (of_timm("vit_small_patch14_reg4_dinov2", img_size=42), r"1 others \(reg_token\)"),
        (clip_tower(), r"lack 5 parts .* 2 others \(norm_pre.bias, norm_pre.weight\)"),
        (nn.Conv2d(3, 4, 1), "not the network that the weights are of"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.load_backbone_(source)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_weights_of_another_activation():
    encoder = ViTEncoder(6, **SMALL, backbone="vit_base_patch16_clip_224")
    message = "has the activation GELU, the source QuickGELU; CLIP models of OpenAI"
    with pytest.raises(ValueError, match=message):
        encoder.load_backbone_(clip_tower())


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_checkpointing_is_exact(drop_path):
    quantizer = ProductQuantizer(VQ(3, 7, codebook=EMACodebook), P=2)
    sizes = SMALL | {"drop_path": drop_path, "options": TINY | {"init_values": 1.0}}
    model = Tokenizer(ViTEncoder(6, branches=2, **sizes), quantizer, ViTDecoder(6, **sizes))
    other = copy.deepcopy(model)
    other.encoder.checkpointing = other.decoder.checkpointing = True
    image = images(4, 3, 16, 16)
    for _ in range(2):
        losses = []
        for each in (model, other):
            torch.manual_seed(0)
            each.zero_grad()
            found, q = each(image)
            loss = F.mse_loss(found, image) + q.losses.total()
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
        for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert mine.grad is not None, key
            assert torch.equal(mine.grad, theirs.grad), key
    # statistics of codes, pending or not, are those of one forward pass a step
    for (key, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), key


def test_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        encoder = ViTEncoder(6, **SMALL, checkpointing=checkpointing)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(images())
        kept.append(total)
    assert kept[1] < kept[0] / 3


def test_drop_path_is_that_of_training():
    encoder = lively(ViTEncoder(6, **SMALL, drop_path=0.5))
    image = images()
    assert not torch.equal(encoder(image), encoder(image))
    encoder.eval()
    assert torch.equal(encoder(image), encoder(image))


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_bfloat16(name):
    sizes = SMALL | BACKBONES[name] | {"tokens": 3}
    encoder, decoder = lively(ViTEncoder(6, **sizes)), lively(ViTDecoder(6, **sizes))
    image = images()
    tokens = encoder(image)
    expected = decoder(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(image)
        torch.testing.assert_close(mixed.float(), tokens, atol=0.1, rtol=0.1)
        torch.testing.assert_close(decoder(tokens).float(), expected, atol=0.1, rtol=0.1)
    half = copy.deepcopy(encoder).bfloat16()(image.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), tokens, atol=0.1, rtol=0.1)
    assert decoder.bfloat16()(half).dtype == torch.bfloat16


def test_double_precision_gives_gradients():
    sizes = {"image_size": 4, "patch_size": 2, "tokens": (1, 2)}
    sizes |= {"options": {"embed_dim": 4, "depth": 1, "num_heads": 1}}
    encoder, decoder = lively(ViTEncoder(2, **sizes)), lively(ViTDecoder(2, **sizes))
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoder.double(), x)
    z = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decoder.double(), z)


@pytest.mark.parametrize("cls", [ViTEncoder, ViTDecoder])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "needs `dim` to be a positive integer, got 0"),
        ({"image_channels": 0}, "needs `image_channels` to be a positive integer, got 0"),
        ({"image_size": 0}, r"needs `image_size` to be a positive integer or two .*, got 0"),
        ({"tokens": (2, 2, 2)}, r"needs `tokens` to be .* \(height, width\), got \(2, 2, 2\)"),
        ({"patch_size": (4, -4)}, r"needs `patch_size` to be .* got \(4, -4\)"),
        (
            {"image_size": (18, 16)},
            r"needs an image_size that is a multiple of the patch_size \(4, 4\), got \(18, 16\); "
            r"\(16, 16\) is one",
        ),
        ({"drop_path": 1.0}, "needs 0 <= drop_path < 1, got 1.0"),
        ({"options": {"img_size": 16}}, "leaves timm's img_size to image_size; take it out"),
        ({"options": {"dynamic_img_size": True}}, "leaves timm's dynamic_img_size to image_size"),
        ({"options": {"patch_drop_rate": 0.1}}, "since every patch is seen"),
        ({"options": {"colour": 1}}, "timm's vit_base_patch14_dinov2 does not take .*colour=1"),
        (
            {"options": {"embed_dim": 10, "num_heads": 3}},
            r"cannot build timm's vit_base_patch14_dinov2 with options=.*'num_heads': 3",
        ),
        ({"backbone": "vit_base_patch14_dino2"}, "knows no model 'vit_base_patch14_dino2': timm"),
        (
            {"backbone": "vit_small_patch16_dinov3", "options": None, "patch_size": 16},
            "needs a plain vision transformer with learned positions, got vit_small_.*, a Eva",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(cls, options, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{message}"):
        cls(**{"dim": 6} | SMALL | options)


@pytest.mark.parametrize(("dim", "branches"), [(7, 2), (6, 0), (6, -1)])
def test_bad_branches(dim, branches):
    message = f"multiple of `branches`, got dim={dim} and branches={branches}"
    with pytest.raises(ValueError, match=message):
        ViTEncoder(dim, branches=branches, **SMALL)


def test_bad_head():
    with pytest.raises(ValueError, match="ViTDecoder has the heads linear, conv, got 'siren'"):
        ViTDecoder(6, head="siren", **SMALL)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 16, 16, 3), r"ViTEncoder expects channel-first images \(b, 3, H, W\)"),
        (torch.zeros(3, 16, 16), r"expects images \(b, 3, H, W\), got shape \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"floating-point images in \[-1, 1\]"),
        (
            torch.zeros(1, 3, 16, 20),
            r"ViTEncoder is built for images of \(16, 16\), got \(16, 20\); resize or crop them, "
            r"or build it with image_size=\(16, 20\)",
        ),
    ],
    ids=["channel-last", "no-batch", "bytes", "size"],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        ViTEncoder(6, **SMALL)(image)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 6, 2, 2), r"ViTDecoder expects channel-last tokens \(b, h, w, 6\)"),
        (torch.zeros(1, 4, 6), r"got shape \(1, 4, 6\); .* give flat tokens their grid"),
        (torch.zeros(1, 2, 2, 6, dtype=torch.int64), "floating-point tokens, got torch.int64"),
        (
            torch.zeros(1, 3, 2, 6),
            r"ViTDecoder is built for a grid of \(2, 2\) tokens, got \(3, 2\); "
            r"build it with tokens=\(3, 2\)",
        ),
    ],
    ids=["channel-first", "flat", "indices", "grid"],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        ViTDecoder(6, **SMALL)(tokens)


def test_a_missing_file_of_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ViTEncoder finds no file weights='.*none.pth'"):
        ViTEncoder(6, **SMALL, weights=tmp_path / "none.pth")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'ViTEncoder needs timm: pip install "xq\[vision\]"'):
        ViTEncoder(6, **SMALL)


PARTS = {
    "encoder": (lambda **more: ViTEncoder(6, branches=2, **SMALL, **more), (3, 16, 16)),
    "decoder": (lambda **more: ViTDecoder(6, **SMALL, **more), (2, 2, 6)),
    "conv-decoder": (lambda **more: ViTDecoder(6, head="conv", **SMALL, **more), (2, 2, 6)),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_in_one_graph(name, checkpointing):
    make, shape = PARTS[name]
    module = lively(make(checkpointing=checkpointing))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, *shape)
    expected, found = module(x), compiled(x)
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    theirs = torch.autograd.grad(found.square().sum(), list(module.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.compile
@pytest.mark.parametrize("name", PARTS)
def test_exports_with_any_batch(name):
    make, shape = PARTS[name]
    module = lively(make(checkpointing=True)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = torch.randn(size, *shape)
        torch.testing.assert_close(program.module()(x), module(x))
