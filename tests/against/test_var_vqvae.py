"""VAR's tokenizer through its table of names: a small one whose weights are hashed by its names."""

import pytest
import torch
from golden import assert_values, load
from hashed import hashed_images, hashed_parameter
from key_lists import listed

from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.checkpoints.var import FORMAT
from xq.quantizers import VQ, ResidualQuantizer

HITS = "quantize.ema_vocab_hit_SV"
SIZES = {"channels": 32, "z_channels": 32, "quant_kernel": 3}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with torch.device("meta"):
        quantizer = ResidualQuantizer(VQ(32, 64), depth=10, multiscale=True)
        small = Tokenizer(CNNEncoder(32, **SIZES), quantizer, CNNDecoder(32, **SIZES))
    # the names are those of the released file, the shapes of the small one
    theirs = FORMAT.table(listed("var")["released"]).revert(small.state_dict())
    assert theirs.keys() | {HITS} == listed("var")["released"].keys()
    state = {key: hashed_parameter(key, tuple(value.shape)) for key, value in theirs.items()}
    return FORMAT.read(state).with_scales((1, 2, 3, 4))


@torch.no_grad()
def test_encode_and_decode(tokenizer):
    numbers, images = load("var_vqvae"), hashed_images("var_vqvae_in", (1, 3, 64, 64))
    encoded = tokenizer.encoder(images)
    assert_values(encoded.movedim(-1, 1), numbers["encoded"])
    indices = tokenizer.encode(images)
    assert torch.equal(indices, numbers["indices"])
    assert_values(tokenizer.decode(indices), numbers["decoded"], atol=5e-5)
    first = next(tokenizer.partials(indices)).clamp(-1, 1)
    assert_values(first, numbers["first"], atol=5e-5)
