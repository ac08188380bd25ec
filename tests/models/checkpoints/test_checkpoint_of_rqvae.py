"""Codebooks of RQ-VAE: a row that pads, copies of a shared one, running averages."""

import pytest
import torch

from xq.models import CNNDecoder, CNNEncoder, Tokenizer
from xq.models.checkpoints.rqvae import FORMAT
from xq.quantizers import VQ, ResidualQuantizer

SIZES = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}
CODES, DIM, DEPTH = 5, 4, 3


def small(*, shared: bool) -> Tokenizer:
    quantizer = ResidualQuantizer(VQ(DIM, CODES), DEPTH, shared=shared)
    return Tokenizer(CNNEncoder(DIM, **SIZES), quantizer, CNNDecoder(DIM, **SIZES))


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def case(request):
    """A tokenizer, and the file that the other project would have of it."""
    tokenizer = small(shared=request.param)
    names = {f"quantizer.codebooks.{k}.weight": torch.randn(CODES + 1, DIM) for k in range(DEPTH)}
    markers = {"encoder.mid.attn_1.q.weight": torch.zeros(0)}
    markers |= {f"encoder.down.{i}.block.0.conv1.weight": torch.zeros(0) for i in (0, 1)}
    networks = {
        key: tensor
        for key, tensor in tokenizer.state_dict().items()
        if not key.startswith("quantizer.")
    }
    file = FORMAT.table(names | markers).revert(networks)
    steps = tokenizer.quantizer.steps
    for k in range(DEPTH):
        step = steps[0 if request.param else k]
        weight = torch.cat([step.codebook.weight.detach(), torch.zeros(1, DIM)])
        file[f"quantizer.codebooks.{k}.weight"] = weight
        file[f"quantizer.codebooks.{k}.cluster_size_ema"] = torch.rand(CODES)
        file[f"quantizer.codebooks.{k}.embed_ema"] = torch.randn(CODES, DIM)
    return tokenizer.eval(), file


@torch.no_grad()
def test_reads_what_the_tokenizer_is(case):
    tokenizer, file = case
    assert FORMAT.recognise(file)
    read = FORMAT.read(file)
    assert read.quantizer.shared == tokenizer.quantizer.shared
    assert read.quantizer.codebook_size == CODES
    images = torch.randn(2, 3, 8, 8)
    indices = tokenizer.encode(images)
    assert torch.equal(read.encode(images), indices)
    assert torch.equal(read.decode(indices), tokenizer.decode(indices))


def test_row_that_pads_comes_back(case):
    tokenizer, file = case
    back = FORMAT.table(file).revert(tokenizer.state_dict())
    kept = [k for k in range(DEPTH) if f"quantizer.codebooks.{k}.weight" in back]
    assert kept == ([0] if tokenizer.quantizer.shared else [0, 1, 2])
    for key, tensor in back.items():
        assert torch.equal(tensor, file[key]), key
