"""XQ-GAN's files: every name of theirs at full size has its place; numbers where weights are."""

from pathlib import Path

import pytest
import torch
from discriminator_checks import golden_shapes
from key_lists import listed, shapes

from xq.losses import DINODiscriminator, PatchGAN, StyleGANDiscriminator
from xq.models import Tokenizer, ViTDecoder, ViTEncoder
from xq.models.checkpoints import formats, load_checkpoint
from xq.models.checkpoints.load import _recognised
from xq.models.presets import xqgan as presets
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    Perturbed,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
)

PRESETS = {row.name: row.make for row in presets.ROWS}
# what the original's own module counts, without its frozen teachers
PARAMETERS = {
    "VQ-4096": 172_288_064,
    "VQ-8192": 172_238_880,
    "RobustTok": 172_288_064,
    "VP2-4096": 172_460_832,
    "VP2-16384": 173_247_264,
    "MSVR10P2-4096": 172_327_456,
    "MSVR10P2-8192": 172_589_600,
    "MSVR10P2-16384": 173_113_888,
    "MSBR10P2-4096": 171_955_692,
    "MSBR10P2-16384": 171_964_062,
}
LOST = ("semantic_model.", "detail_model.", "encoder.lvl1LC", "decoder.lvl1LC")
# with blocks of full strength, or tokens would hardly see the image
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}


def released(name: str) -> dict:
    lists = listed("xqgan")
    detail = lists["detail"] if name.startswith("MSBR") else {}
    return lists["common"] | detail | lists[name]


def on_meta(make) -> Tokenizer:
    with torch.device("meta"):
        return make()


def is_lost(key: str) -> bool:
    return key.startswith(LOST) or key.endswith(("ema_vocab_hit_SV", "scaler"))


def without_perturbation(tokenizer: Tokenizer) -> dict:
    config = tokenizer.config()
    if isinstance(tokenizer.quantizer, Perturbed):
        config["quantizer"] = config["quantizer"]["quantizer"]
    return config


def test_all_configurations_are_listed():
    assert PRESETS.keys() == PARAMETERS.keys() == listed("xqgan").keys() - {"common", "detail"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_file_there_and_back(name):
    state = released(name)
    format = _recognised(state)
    assert format.name == "xqgan"
    tokenizer, preset = format.read(state), on_meta(PRESETS[name])
    assert not tokenizer.training
    assert tokenizer.config() == without_perturbation(preset)
    for model in (tokenizer, preset):
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
        kept = {key: shape for key, shape in shapes(state).items() if not is_lost(key)}
        assert shapes(format.table(state).revert(model.state_dict())) == kept
        assert shapes(format.table({}).revert(model.state_dict())) == kept


def test_what_older_files_have_besides():
    state = released("MSVR10P2-4096")
    state |= {"sem_linear.weight": torch.empty(32, 64, 1, 1, device="meta")}
    state |= {"detail_model.of_sam": torch.empty(3, device="meta")}
    assert formats()["xqgan"].read(state).config() == on_meta(presets.msvr10p2).config()


def test_small_and_large_backbones():
    for name, head in (("small_patch14_reg4", "conv"), ("giant_patch14", "linear")):
        sizes = {"tokens": 4, "image_size": 64, "drop_path": 0.1, "backbone": f"vit_{name}_dinov2"}
        with torch.device("meta"):
            decoder = ViTDecoder(8, head=head, **sizes)
            model = Tokenizer(ViTEncoder(8, **sizes), VQ(8, 16, normalize=True), decoder)
        state = formats()["xqgan"].table({}).revert(model.state_dict())
        state["quantize.ema_vocab_hit_SV"] = torch.empty(16, device="meta")
        assert formats()["xqgan"].read(state).config() == model.config()


def multiscale(leaf: Quantizer, refinements: int, scales=(1, 2, 4), shrink=None) -> Quantizer:
    grid = Pyramid(scales, [Refine(leaf.dim) for _ in range(refinements)])
    return ResidualQuantizer(leaf, multiscale=grid, shrink=shrink)


QUANTIZERS = {
    "several scales": lambda: multiscale(VQ(8, 64, metric="cosine"), 2),
    "one refinement": lambda: ProductQuantizer(multiscale(VQ(8, 64, metric="cosine"), 1), 3),
    "none": lambda: ProductQuantizer(multiscale(BSQ(6), 0), 2),
    "three codes": lambda: ProductQuantizer(VQ(8, 64, normalize=True), 3),
}


def tiny(quantizer) -> Tokenizer:
    P = getattr(quantizer, "P", 1)
    part = {"tokens": 4, "image_size": 64, "options": TINY}
    encoder = ViTEncoder(quantizer.dim, branches=P, **part)
    return Tokenizer(encoder, quantizer, ViTDecoder(quantizer.dim, **part)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_models_of_ones_own(name, tmp_path):
    source, target = tiny(QUANTIZERS[name]()), tiny(QUANTIZERS[name]())
    table = formats()["xqgan"].table
    state = table({}).revert(source.state_dict())
    branches = [f"quantizes.{p}" for p in range(3)] if "quantizes.0" in str(state) else ["quantize"]
    if isinstance(source.quantizer, ProductQuantizer) and source.quantizer.P == 2:
        branches = ["quantizes.0", "quantizes.1"]
    for path in branches:
        hits = torch.zeros(64) if name == "three codes" else torch.zeros(3, 64)
        state[f"{path}.ema_vocab_hit_SV"] = hits
    torch.save({"model": state}, tmp_path / "own.pt")
    loaded = load_checkpoint(tmp_path / "own.pt", into=target)
    assert loaded is target
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(target(image).image, source(image).image)
    indices = source.encode(image)
    assert torch.equal(target.encode(image), indices)
    assert len(indices.unique()) > 2


def test_names_of_refinements():
    rules = {"qresi": 1, "0": 3, "qresi_ls.0": 3}
    for first, number in rules.items():
        pattern = {"qresi": "qresi", "0": "{}", "qresi_ls.0": "qresi_ls.{}"}[first]
        state = {
            f"quantize.quant_resi.{pattern.format(k)}.{part}": torch.full((2,), float(k))
            for k in range(number)
            for part in ("weight", "bias")
        }
        table = formats()["xqgan"].table(state)
        converted = table.convert(state)
        assert converted.keys() == {
            f"quantizer.grid.refine.{k}.{part}"
            for k in range(number)
            for part in ("weight", "bias")
        }
        back = table.revert(converted)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


SIGNS = {
    "spherical": ([6**-0.5] * 10, BSQ, 1.0),
    "spherical, shrinking": ([6**-0.5 * 0.8**k for k in range(10)], BSQ, 0.8),
    "of ones": ([1.0] * 10, LFQ, 1.0),
    "halving": ([0.5**k for k in range(10)], LFQ, 0.5),
}


def with_sizes(sizes) -> dict:
    """The names and shapes of a released file, and the sizes of its codes."""
    state = released("MSBR10P2-4096")
    for key in list(state):
        if key.startswith("quantizes."):
            state[key] = torch.zeros(10) if key.endswith("scaler") else state[key]
    scaler = torch.tensor(sizes)
    return state | {"quantizes.0.scaler": scaler, "quantizes.1.scaler": scaler}


@pytest.mark.parametrize("name", SIGNS)
def test_sizes_of_binary_codes_are_read(name):
    sizes, kind, shrink = SIGNS[name]
    sizes = [size * (6 / 12) ** 0.5 if kind is BSQ else size for size in sizes]
    state = with_sizes(sizes)
    with torch.device("meta"):
        tokenizer = formats()["xqgan"].build(state)
    for branch in tokenizer.quantizer.branches:
        assert isinstance(branch.steps[0], kind)
        assert branch.step_shrink == pytest.approx(shrink)


def test_other_sizes_of_binary_codes_are_refused():
    for sizes in ([0.3] * 10, [1.0, 0.5] * 5):
        with pytest.raises(ValueError, match="XQ-GAN's codes of 12 bits have the sizes"):
            formats()["xqgan"].build(with_sizes(sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizes.0.ema_vocab_hit_SV": (7, 4096)}, "do not tell their 7 scales up to 11 x 11"),
        ({"encoder.latent_tokens": (1, 240, 768)}, "has 240 queries in 2 square grids"),
        ({"encoder.model.pos_embed": (1, 200, 768)}, "has 199 patches in 1 square grids"),
        ({"encoder.model.pos_embed": (1, 257, 770)}, "pos_embed has 770 channels, DINOv2 has"),
        ({"encoder.latent_pos_embed": (1, 242, 768)}, r"no place for 1 tensors \(encoder.latent_p"),
        (
            {"quantizes.1.embedding.weight": (4096, 31)},
            "`dim` to be a multiple of `branches`, got dim=63",
        ),
    ],
)
def test_files_laid_out_otherwise(change, message):
    state = released("MSVR10P2-4096")
    state |= {key: torch.empty(shape, device="meta") for key, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        formats()["xqgan"].read(state)


@pytest.mark.parametrize("name", ["VQ-4096", "VP2-4096", "MSVR10P2-8192", "MSBR10P2-4096"])
def test_what_was_written_is_read_again(name):
    tokenizer, kind = on_meta(PRESETS[name]), formats()["xqgan"]
    state = kind.write(tokenizer)
    assert not any(key.endswith("ema_vocab_hit_SV") for key in state)
    if name.startswith("MSBR"):
        state |= {f"quantizes.{p}.scaler": torch.empty(10, device="meta") for p in range(2)}
    assert kind.read(state).config() == tokenizer.config()


def test_missing_tensors_are_named():
    state = released("VQ-4096")
    del state["decoder.mask_token"], state["encoder.model.blocks.3.ls1.gamma"]
    with pytest.raises(
        ValueError, match=r"lacks 2 \(decoder.mask_token, encoder.backbone.blocks.3.ls1.gamma"
    ):
        formats()["xqgan"].read(state)
    del state["quant_conv.weight"], state["encoder.lvl_embed.weight"]
    with pytest.raises(ValueError, match=r"there is no tensor 'encoder.lvl_embed.weight'"):
        formats()["xqgan"].read(state)


def test_convolutional_pipeline():
    text = (Path(__file__).parents[2] / "golden" / "xqgan_cnn_vq16.txt").read_text()
    rows = [line.split() for line in text.splitlines()]
    shaped = {key: tuple(map(int, sizes)) for key, *sizes in rows}
    shaped |= {
        "quant_conv.weight": (32, 256, 1, 1),
        "quant_conv.bias": (32,),
        "post_quant_conv.weight": (256, 32, 1, 1),
        "post_quant_conv.bias": (256,),
        "quantize.embedding.weight": (4096, 32),
    }
    uses = {"quantize.ema_vocab_hit_SV": (4096,)}
    state = {key: torch.empty(shape, device="meta") for key, shape in (shaped | uses).items()}
    format = _recognised(state)
    assert format.name == "xqgan_cnn"
    tokenizer = format.read(state)
    preset = on_meta(lambda: presets.xqgan_v(VQ(32, 4096, normalize=True)))
    assert tokenizer.config() == preset.config()
    assert shapes(format.table(state).revert(tokenizer.state_dict())) == shaped


def discriminators() -> dict:
    import timm

    small = {"img_size": 224, "embed_dim": 384, "depth": 12, "num_heads": 6}
    with torch.device("meta"):
        vit = timm.create_model("vit_small_patch16_224", num_classes=0, **small)
        return {
            "patchgan": PatchGAN(),
            "stylegan": StyleGANDiscriminator(256),
            "dino": DINODiscriminator(vit),
        }


@pytest.mark.parametrize("name", ["patchgan", "stylegan", "dino"])
def test_discriminators(name):
    module = discriminators()[name]
    shaped = golden_shapes(f"{name}.")
    state = {
        key: torch.empty(shape, device="meta", dtype=torch.int64 if "num_b" in key else None)
        for key, shape in shaped.items()
    }
    format = _recognised(state)
    assert format.name == f"xqgan_{name}"
    into = module if name == "dino" else None
    read = format.read(state, into)
    if into is None:
        assert read.config() == module.config()
    else:
        with pytest.raises(ValueError, match=r"hold no vision transformer for the discriminator"):
            format.read(state)
    back = shapes(format.table(state).revert(read.state_dict()))
    assert back == {key: shape for key, shape in shaped.items() if not key.endswith(".0.f")}


def test_discriminator_beside_the_model(tmp_path):
    disc = PatchGAN(channels=8)
    torch.save(
        {"model": {"a": torch.zeros(1)}, "discriminator": disc.state_dict()}, tmp_path / "x.pt"
    )
    read = load_checkpoint(tmp_path / "x.pt", weights="discriminator")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(read(images), disc.eval()(images))
