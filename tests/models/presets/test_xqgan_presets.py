"""XQ-GAN's tokenizers by name; that they are what its files hold is tested with these."""

import math

import pytest
import torch

from xq.config import build
from xq.models import Tokenizer
from xq.models.presets import msbr10p2, msvr10p2, robusttok, vp2, vq, xqgan_sc, xqgan_v
from xq.models.presets.__main__ import measure
from xq.models.presets.xqgan import ROWS
from xq.quantizers import BSQ, FSQ, LFQ, VQ, Perturbed, ProductQuantizer, ResidualQuantizer

# places, indices at each, bits an image: table 2.3 of the configurations
SIZES = {
    "VQ-4096": (256, 1, 3072),
    "VQ-8192": (256, 1, 3328),
    "RobustTok": (256, 1, 3072),
    "VP2-4096": (256, 2, 6144),
    "VP2-16384": (256, 2, 7168),
    "MSVR10P2-4096": (286, 2, 6864),
    "MSVR10P2-8192": (286, 2, 7436),
    "MSVR10P2-16384": (286, 2, 8008),
    "MSBR10P2-4096": (286, 2, 6864),
    "MSBR10P2-16384": (286, 2, 8008),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_tokens_and_bits(row):
    size = measure(row)
    assert (size.positions, size.indices, round(size.bits)) == SIZES[row.name]
    assert size.bits == pytest.approx(round(size.bits))


@pytest.mark.parametrize(
    ("make", "codebook_size"),
    [(vq, 16384), (vp2, 8192), (msvr10p2, 1024), (msbr10p2, 8192), (vq, 0)],
)
def test_other_sizes_are_refused(make, codebook_size):
    message = rf"{make.__name__} is published with 4096 .* codes, got {codebook_size}"
    with pytest.raises(ValueError, match=message):
        make(codebook_size)


@pytest.mark.parametrize("make", [msvr10p2, robusttok])
def test_configuration(make):
    with torch.device("meta"):
        tokenizer = make()
        again = build(tokenizer.config() | {"class": "Tokenizer"}, [Tokenizer])
    assert again.config() == tokenizer.config()


def test_robusttok_learns_with_near_codes():
    with torch.device("meta"):
        perturbed = robusttok().quantizer
    assert isinstance(perturbed, Perturbed)
    assert (perturbed.delta, perturbed.alpha, perturbed.beta) == (100, 1.0, 0.1)


TREES = {
    "levels": lambda: FSQ([5, 5, 5]),
    "signs of two branches": lambda: ProductQuantizer(BSQ(4), 2),
    "three branches": lambda: ProductQuantizer(VQ(4, 16), 3),
    "steps": lambda: ResidualQuantizer(VQ(6, 16), 2),
    "scales": lambda: ResidualQuantizer(VQ(4, 16), multiscale=(1, 2, 4)),
    "scales of two branches": lambda: ProductQuantizer(
        ResidualQuantizer(LFQ(4), multiscale=(1, 2, 4)), 2
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda q: xqgan_sc(q, image_size=64), xqgan_v])
@pytest.mark.parametrize("name", TREES)
def test_any_tree_in_both_pipelines(name, make):
    quantizer = TREES[name]()
    with torch.device("meta"):
        tokenizer = make(quantizer).eval()
        tokens = tokenizer.encoder(torch.empty(1, 3, 64, 64))
        assert tokenizer.decoder(tokens).shape == (1, 3, 64, 64)
    # a token for 16 x 16 pixels, or all scales up to that
    places = 21 if "scales" in name else 16
    z, indices, _ = quantizer(torch.randn(tokens.shape))
    assert z.shape == tokens.shape
    assert indices.numel() == places * math.prod(quantizer.code_shape)


def test_starts_from_a_local_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ViTEncoder finds no file weights='none.pth'"):
        vq(4096, weights="none.pth")
    (tmp_path / "junk.pth").write_bytes(b"abc" * 100)
    for make in (vp2, msvr10p2, msbr10p2, robusttok):
        with pytest.raises(ValueError, match=r"ViTEncoder cannot use weights=.*junk.pth.*damaged"):
            make(weights=tmp_path / "junk.pth")
