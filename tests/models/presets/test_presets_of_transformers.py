"""Published tokenizers of transformers: their sizes, tokens and bits."""

import math

import pytest
import torch

from xq.config import describe
from xq.models.presets import transformers as presets
from xq.quantizers import BSQ, VQ

# millions of numbers to learn, tokens of 256 x 256 pixels, bits of these, the quantizer; the first
# are those of the projects' own modules, where a list of their names tells them
KNOWN = {
    "ViT-VQGAN small": (None, 1024, 13312, VQ(32, 8192, normalize=True)),
    "ViT-VQGAN base": (None, 1024, 13312, VQ(32, 8192, normalize=True)),
    "BSQ-ViT 18": (174.816, 1024, 18432, BSQ(18, group_size=1)),
    "BSQ-ViT 36": (None, 1024, 36864, BSQ(36, group_size=1)),
    "TiTok-L-32": (641.055, 32, 384, VQ(12, 4096, normalize=True)),
    "TiTok-B-64": (204.814, 64, 768, VQ(12, 4096, normalize=True)),
    "TiTok-S-128": (83.675, 128, 1536, VQ(12, 4096, normalize=True)),
    "TiTok-BL-64 VQ": (390.016, 64, 832, VQ(64, 8192)),
    "TiTok-BL-128 VQ": (None, 128, 1664, VQ(64, 8192)),
    "TiTok-SL-256 VQ": (None, 256, 3328, VQ(64, 8192)),
}


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("row", presets.ROWS, ids=lambda row: row.name)
def test_sizes(row):
    numbers, tokens, bits, expected = KNOWN[row.name]
    with torch.device("meta"):
        tokenizer = row.make()
        images = torch.empty(1, 3, row.image_size, row.image_size)
    if numbers is not None:
        assert millions(tokenizer) == pytest.approx(numbers, abs=5e-4)
    quantizer = tokenizer.quantizer
    assert describe(quantizer) == describe(expected)
    features = tokenizer.encoder(images)
    assert features.shape[-1] == quantizer.dim
    assert features.numel() // quantizer.dim == tokens
    assert tokens * math.log2(quantizer.codebook_size) == bits
    assert tokenizer.decoder(features).shape == images.shape


def test_there_is_a_row_for_each():
    assert [row.name for row in presets.ROWS] == list(KNOWN)
    assert all(bool(row.source) == (row.rfid is not None) for row in presets.ROWS)


def test_sizes_of_vit_vqgan():
    """The paper counts 91 million in each half of the larger one."""
    with torch.device("meta"):
        small, base = presets.vit_vqgan("small"), presets.vit_vqgan()
    assert millions(base.encoder) == pytest.approx(91, abs=0.5)
    assert (small.encoder.width, small.encoder.depth, small.encoder.heads) == (512, 8, 8)
    assert small.encoder.config().items() >= small.decoder.config().items()


@torch.no_grad()
def test_the_smallest_at_full_size():
    tokenizer = presets.titok("s128").eval()
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    indices = tokenizer.encode(images)
    assert indices.shape == (1, 128)
    image = tokenizer.decode(indices)
    assert image.shape == images.shape
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("make", "wanted", "message"),
    [
        (presets.vit_vqgan, "huge", "vit_vqgan is published as 'small', 'base', got 'huge'"),
        (presets.bsq_vit, 12, "bsq_vit is published as 18, 36, got 12"),
        (presets.titok, "L-32", "titok is published as 'l32', 'b64', .*, got 'L-32'"),
    ],
)
def test_unknown_names(make, wanted, message):
    with pytest.raises(ValueError, match=message):
        make(wanted)
