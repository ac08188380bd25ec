"""Released files of convolutional tokenizers: every name of theirs, at full size, has its place."""

import pytest
import torch
from key_lists import listed, shapes

from xq.models.checkpoints import ibq, llamagen, open_magvit2, rqvae, taming, var
from xq.models.checkpoints.format import Format
from xq.models.presets import convolutional as presets
from xq.quantizers import GumbelVQ, Refine

PLAIN, GUMBEL = taming.FORMATS
FORMATS = [var.FORMAT, llamagen.FORMAT, PLAIN, GUMBEL, ibq.FORMAT, rqvae.FORMAT]
FORMATS += [open_magvit2.FORMAT]
COPIES = [f"quantizer.codebooks.{k}.weight" for k in (1, 2, 3)]
AVERAGES = [
    f"quantizer.codebooks.{k}.{name}"
    for k in range(4)
    for name in ("cluster_size_ema", "embed_ema")
]
# of each project: its list, the preset that it is, and what the way back does not restore
RELEASED = {
    "var": (var.FORMAT, "released", presets.var_vqvae, ["quantize.ema_vocab_hit_SV"]),
    "llamagen": (llamagen.FORMAT, "vq16", presets.llamagen_vq16, ["quantize.codebook_used"]),
    "taming": (PLAIN, "f16_1024", presets.vqgan, []),
    "ibq": (ibq.FORMAT, "released", presets.ibq, []),
    "rqvae": (rqvae.FORMAT, "shared", presets.rqgan, [*COPIES, *AVERAGES]),
    "open_magvit2": (open_magvit2.FORMAT, "released", presets.magvit2_lfq, []),
}


def on_meta(make):
    with torch.device("meta"):
        return make()


def reverted(format: Format, like: dict, make) -> dict:
    """What a module of xq is in the other project's names."""
    return format.table(like).revert(on_meta(make).state_dict())


def recognised(state: dict) -> list[str]:
    return [format.name for format in FORMATS if format.recognise(state)]


@pytest.mark.parametrize("project", RELEASED)
def test_released_file_there_and_back(project):
    format, section, preset, lost = RELEASED[project]
    state = listed(project)[section]
    assert recognised(state) == [format.name]
    tokenizer = format.read(state)
    assert not tokenizer.training
    assert tokenizer.config() == on_meta(preset).config()
    back = shapes(format.table(state).revert(tokenizer.state_dict()))
    assert back == {key: shape for key, shape in shapes(state).items() if key not in lost}
    assert set(lost) <= state.keys()


def test_vq8_of_llamagen():
    released = listed("llamagen")
    levels = {key: t for key, t in released["vq16"].items() if ".conv_blocks.4." not in key}
    state = reverted(llamagen.FORMAT, levels, presets.llamagen_vq8)
    differing = shapes(released["vq8_where_it_differs"])
    assert differing.items() <= shapes(state).items()
    assert recognised(state) == ["llamagen"]
    tokenizer = llamagen.FORMAT.read(state)
    assert tokenizer.config() == on_meta(presets.llamagen_vq8).config()
    assert tokenizer.encoder.stride == 8


def test_vqgan_with_more_codes_and_its_loss():
    released = listed("taming")
    more, loss = released["f16_16384_where_it_differs"], released["loss"]
    state = released["f16_1024"] | more | loss
    assert recognised(state) == ["taming"]
    tokenizer = PLAIN.read(state)
    assert tokenizer.config() == on_meta(lambda: presets.vqgan(16384)).config()
    back = shapes(PLAIN.table(state).revert(tokenizer.state_dict()))
    assert back == shapes(released["f16_1024"] | more)


def test_vqgan_with_gumbel():
    released = listed("taming")
    cnn = {
        key: tensor
        for key, tensor in released["f16_1024"].items()
        # one level less
        if not key.startswith(("encoder.down.4.", "decoder.up.4.", "quantize."))
    }
    state = reverted(GUMBEL, cnn, presets.vqgan_gumbel)
    assert shapes(released["gumbel"]).items() <= shapes(state).items()
    assert recognised(state) == ["taming_gumbel"]
    tokenizer = GUMBEL.read(state | released["loss"])
    assert isinstance(tokenizer.quantizer, GumbelVQ)
    assert tokenizer.config() == on_meta(presets.vqgan_gumbel).config()
    assert tokenizer.encoder.stride == 8


def test_discriminator_is_left_out():
    released = listed("open_magvit2")
    state = released["released"] | released["discriminator"]
    assert recognised(state) == ["open_magvit2"]
    assert open_magvit2.FORMAT.read(state).quantizer.dim == 18


@pytest.mark.parametrize("codebook_size", [1024, 8192, 262144])
def test_ibq_with_other_codebooks(codebook_size):
    codes = {"quantize.embedding.weight": torch.empty(codebook_size, 256, device="meta")}
    state = listed("ibq")["released"] | codes
    assert ibq.FORMAT.read(state).quantizer.codebook_size == codebook_size


def test_rqvae_with_codebooks_of_their_own():
    released = listed("rqvae")
    state = released["shared"] | released["separate"]
    # without values a file could be either
    assert rqvae.FORMAT.read(state).quantizer.shared
    odd = torch.empty(1025, 256, device="meta")
    with pytest.raises(
        ValueError, match=r"same codebook_size, got 2048 for VQ 0 and 1024 for VQ 3"
    ):
        rqvae.FORMAT.read(state | {"quantizer.codebooks.3.weight": odd})


@pytest.mark.parametrize(
    ("section", "count"), [("refinements_of_their_own", 3), ("one_refinement", 1)]
)
def test_var_with_other_refinements(section, count):
    released = listed("var")
    cnn = {k: t for k, t in released["released"].items() if not k.startswith("quantize.")}
    # the list is of 8 channels
    convolutions = {
        key: torch.empty([32 if size == 8 else size for size in tensor.shape], device="meta")
        for key, tensor in released[section].items()
        if ".quant_resi." in key
    }
    codes = {"quantize.embedding.weight": torch.empty(4096, 32, device="meta")}
    state = cnn | convolutions | codes
    assert recognised(state) == ["var"]
    tokenizer = var.FORMAT.read(state)
    assert [type(refine) for refine in tokenizer.quantizer.grid.refine] == [Refine] * count
    assert var.FORMAT.table(state).revert(tokenizer.state_dict()).keys() == state.keys()


def test_var_of_another_number_of_scales():
    hits = {"quantize.ema_vocab_hit_SV": torch.empty(4, 4096, device="meta")}
    state = listed("var")["released"] | hits
    message = r"hit_SV has 4 rows, so its scales are not the 10 of \(1, 2, .*`into` a tokenizer"
    with pytest.raises(ValueError, match=message):
        var.FORMAT.read(state)
    other = on_meta(presets.var_vqvae).with_scales((1, 4, 8, 16))
    assert var.FORMAT.read(state, other).quantizer.scales == (1, 4, 8, 16)


@pytest.mark.parametrize("project", RELEASED)
def test_unknown_and_missing_names(project):
    format, section, *_ = RELEASED[project]
    state = listed(project)[section]
    extra = {"encoder.surprise.weight": torch.empty(1, device="meta")}
    with pytest.raises(ValueError, match=r"encoder\.surprise\.weight"):
        format.read(state | extra)
    missing = "decoder.conv_out.bias"
    with pytest.raises(ValueError, match=r"lacks 1 .*decoder\.conv_out\.bias"):
        format.read({key: tensor for key, tensor in state.items() if key != missing})


def test_attention_at_another_resolution_has_no_place():
    state = listed("taming")["f16_1024"]
    more = {
        key.replace("down.4.attn", "down.3.attn"): tensor
        for key, tensor in state.items()
        if key.startswith("encoder.down.4.attn.")
    }
    with pytest.raises(ValueError, match=r"20 .*left over .*encoder\.conv_blocks\.3\.attn\.0\.k"):
        PLAIN.read(state | more)
