"""Published convolutional tokenizers: their sizes, tokens and bits."""

import math

import pytest
import torch

from xq.models.presets import convolutional as presets
from xq.quantizers import IBQ, LFQ, VQ, GumbelVQ, ResidualQuantizer

# millions of numbers to learn, stride, tokens of 256 x 256 pixels, bits of these; the first are
# those of the projects' own modules, where a list of their names tells them
KNOWN = {
    "vqgan": (presets.vqgan, 72.14, 16, 256, 2560),
    "vqgan_gumbel": (presets.vqgan_gumbel, None, 8, 1024, 13312),
    "rqgan": (presets.rqgan, 104.40, 32, 256, 3584),
    "var_vqvae": (presets.var_vqvae, 108.95, 16, 680, 8160),
    "llamagen_vq8": (presets.llamagen_vq8, None, 8, 1024, 14336),
    "llamagen_vq16": (presets.llamagen_vq16, 71.88, 16, 256, 3584),
    "magvit2_lfq": (presets.magvit2_lfq, 115.13, 16, 256, 4608),
    "ibq": (presets.ibq, 110.98, 16, 256, 3584),
}


@pytest.fixture(params=KNOWN)
def known(request):
    make, *numbers = KNOWN[request.param]
    with torch.device("meta"):
        return make(), *numbers


def test_sizes(known):
    tokenizer, millions, stride, tokens, bits = known
    assert tokenizer.encoder.stride == tokenizer.decoder.stride == stride
    if millions is not None:
        count = sum(p.numel() for p in tokenizer.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.005)
    quantizer = tokenizer.quantizer
    side = 256 // stride
    images = torch.empty(1, 3, 256, 256, device="meta")
    assert tokenizer.encoder(images).shape == (1, side, side, quantizer.dim)
    assert tokens_of(quantizer, side) == tokens
    assert tokens * math.log2(quantizer.codebook_size) == bits


def tokens_of(quantizer, side: int) -> int:
    if quantizer.scales:
        assert quantizer.grids[-1] == (side, side)
        return sum(height * width for height, width in quantizer.grids)
    return side**2 * math.prod(quantizer.code_shape)


def test_quantizers():
    with torch.device("meta"):
        made = {name: make().quantizer for name, (make, *_) in KNOWN.items()}
        larger = presets.vqgan(16384), presets.ibq(1024)
    assert [tokenizer.quantizer.codebook_size for tokenizer in larger] == [16384, 1024]
    kinds = [VQ, GumbelVQ, *[ResidualQuantizer] * 2, VQ, VQ, LFQ, IBQ]
    assert [type(quantizer) for quantizer in made.values()] == kinds
    assert (made["rqgan"].depth, made["rqgan"].shared) == (4, True)
    assert made["var_vqvae"].scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert len(made["var_vqvae"].grid.refine) == 4
    assert made["llamagen_vq16"].normalize
    assert not made["vqgan"].normalize


def test_rows_are_the_presets():
    names = [row.name for row in presets.ROWS]
    assert len(set(names)) == len(names)
    for row in presets.ROWS:
        with torch.device("meta"):
            tokenizer = row.make()
        assert row.image_size % tokenizer.encoder.stride == 0
        # every number says where it stands
        assert (row.rfid is None) == (not row.source)


@pytest.mark.parametrize("make", [presets.vqgan, presets.ibq])
def test_bad_codebook_size(make):
    with pytest.raises(ValueError, match="codebook_size"), torch.device("meta"):
        make(0)
