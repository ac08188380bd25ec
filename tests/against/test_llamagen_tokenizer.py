"""LlamaGen's names around the CNN that it shares with XQ-GAN, whose own code gave the numbers."""

import pytest
import torch
from golden import assert_values, load
from hashed import hashed_parameter

from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.checkpoints.llamagen import FORMAT
from xq.quantizers import VQ

SIZES = {"channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "z_channels": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with torch.device("meta"):
        small = Tokenizer(CNNEncoder(8, **SIZES), VQ(8, 16), CNNDecoder(8, **SIZES))
    names = FORMAT.table({}).revert(small.state_dict())
    state = {key: hashed_parameter(key, tuple(value.shape)) for key, value in names.items()}
    # the numbers are those of the networks without the convolutions around the quantizer
    for conv in ("quant_conv", "post_quant_conv"):
        state[f"{conv}.weight"], state[f"{conv}.bias"] = (
            torch.eye(8)[..., None, None],
            torch.zeros(8),
        )
    state["quantize.codebook_used"] = torch.zeros(65536)
    assert FORMAT.recognise(state)
    return FORMAT.read(state)


@torch.no_grad()
def test_encoder_and_decoder(tokenizer):
    numbers = load("xqgan_cnn_hashed")
    assert_values(tokenizer.encoder(numbers["images"]), numbers["tokens"])
    assert_values(tokenizer.decoder(numbers["tokens"]), numbers["decoded"])


@torch.no_grad()
def test_codes_have_unit_length(tokenizer):
    codes = tokenizer.quantizer.decode(torch.arange(16))
    stored = hashed_parameter("quantize.embedding.weight", (16, 8))
    assert_values(codes, stored / stored.norm(dim=-1, keepdim=True))
