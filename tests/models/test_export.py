"""Programs of encoders and decoders: torch.export, and the operators that stand in for xq's."""

import io

import pytest
import torch

from xq.models import (
    CNNDecoder,
    CNNEncoder,
    LinearDecoder,
    LinearEncoder,
    Tokenizer,
    export_decoder,
    export_encoder,
)
from xq.models.export import _STANDARD
from xq.quantizers import BSQ, IBQ, VQ, ProductQuantizer, ResidualQuantizer
from xq.quantizers.lookup import METRICS, prepare
from xq.quantizers.lookup.plain import nearest_plain
from xq.quantizers.lookup.reference import nearest_reference
from xq.quantizers.lookup.table import Source

SIZES = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "z_channels": 4}


def linear(quantizer) -> Tokenizer:
    return Tokenizer(LinearEncoder(quantizer.dim, 2), quantizer, LinearDecoder(quantizer.dim, 2))


TOKENIZERS = {
    "cnn": lambda: Tokenizer(CNNEncoder(4, **SIZES), VQ(4, 37), CNNDecoder(4, **SIZES)),
    "scales": lambda: linear(
        ProductQuantizer(ResidualQuantizer(BSQ(3), multiscale=(1, (3, 4))), P=2)
    ),
}


def pictures(b: int) -> torch.Tensor:
    return torch.rand(b, 3, 6, 8, generator=torch.Generator().manual_seed(b)) * 2 - 1


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.compile
@pytest.mark.parametrize("name", TOKENIZERS)
def test_programs_take_batches_of_any_size(name: str) -> None:
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]()
    # in training mode, and from a batch of one
    encoder = saved_and_loaded(export_encoder(tokenizer, pictures(1)))
    decoder = saved_and_loaded(export_decoder(tokenizer, pictures(1)))
    assert all(part.training for part in tokenizer.modules())
    tokenizer.eval()
    for b in (1, 2, 5):
        indices = tokenizer.encode(pictures(b))
        assert torch.equal(encoder(pictures(b)), indices)
        torch.testing.assert_close(decoder(indices), tokenizer.decode(indices), atol=1e-6, rtol=0)


@pytest.mark.compile
@pytest.mark.parametrize(
    "quantizer",
    [ResidualQuantizer(VQ(4, 13), 2), IBQ(4, 16), BSQ(5)],
    ids=["residual", "ibq", "bsq"],
)
def test_standard_operators_do_the_same(quantizer) -> None:
    torch.manual_seed(0)
    tokenizer = linear(quantizer)
    program = export_encoder(tokenizer, pictures(2)).run_decompositions(_STANDARD)
    kinds = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {kind for kind in kinds if kind.startswith("xq") or "lshift" in kind}
    assert torch.equal(program.module()(pictures(3)), tokenizer.eval().encode(pictures(3)))


def test_other_sizes_are_refused_before_anything_is_traced() -> None:
    tokenizer = TOKENIZERS["cnn"]()
    for export in (export_encoder, export_decoder):
        with pytest.raises(ValueError, match="multiples of its stride 2, got \\(6, 7\\)"):
            export(tokenizer, torch.zeros(1, 3, 6, 7))
        with pytest.raises(ValueError, match="with one image or more, got 0"):
            export(tokenizer, torch.zeros(0, 3, 6, 8))


@pytest.mark.parametrize("ready", [False, True], ids=["codes", "table"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_the_plain_search_finds_the_nearest(metric: str, k: int, ready: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # far from the origin a distance written out would lose its digits
    far = 100 if metric == "euclidean" else 0
    x = torch.randn(2, 5, 7, 6, generator=generator) + far
    codes = torch.randn(67, 6, generator=generator) + far
    # broken codes are never the nearest
    codes[3], codes[5, 0], codes[66] = torch.nan, torch.inf, torch.inf
    table = prepare(codes, metric)
    rows, centre = (table.rows, table.centre) if ready else (None, None)
    found = nearest_plain(x, codes, metric, rows, centre, k, "")
    want = nearest_reference(x.flatten(0, 2).double(), Source(codes.double(), metric), k)
    assert found.shape == (2, 5, 7, k)
    assert torch.equal(found.flatten(0, 2), want)


def test_the_median_is_that_of_torch() -> None:
    median = _STANDARD[torch.ops.aten.median.dim]
    for size in (1, 4, 7):
        x = torch.randn(size, 3)
        assert torch.equal(median(x, 0)[0], x.median(0).values)
        assert torch.equal(median(x, 0, True)[0], x.median(0, keepdim=True).values)
        assert torch.equal(x.gather(0, median(x, 0, True)[1]), median(x, 0, True)[0])


def test_shifts_are_exact() -> None:
    bits = torch.arange(62)
    shifted = _STANDARD[torch.ops.aten.__lshift__.Tensor](torch.ones_like(bits), bits)
    assert shifted.tolist() == [1 << i for i in range(62)]
